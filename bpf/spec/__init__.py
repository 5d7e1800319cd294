"""What is asked for: run and grid specs, their fields in words, and the files they come from."""
