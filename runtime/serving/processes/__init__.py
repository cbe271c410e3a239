"""The server's processes, and who looks after them."""
