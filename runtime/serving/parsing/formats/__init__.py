"""One way of writing calls a file."""
