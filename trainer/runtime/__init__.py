"""What a process runs on: launch, devices, files, signals."""
