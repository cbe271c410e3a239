"""What multiplies by a 4-bit weight."""
