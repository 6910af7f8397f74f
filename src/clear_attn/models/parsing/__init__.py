"""What adapters share to parse the arguments of a call."""
