"""What is in deploy/ works as it is."""
