"""Several models that share blocks, run together: each block is in memory once."""
