"""The protocols that clients speak, each in a file."""
