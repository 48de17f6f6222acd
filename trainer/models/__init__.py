"""Models: torch only."""
