"""What runs are looked at with."""
