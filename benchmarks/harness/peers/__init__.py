"""Other systems, each in a process of its own."""
