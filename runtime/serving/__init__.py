"""The server: HTTP here, the engine in a process of its own."""
