"""`vkv bench long`: contexts beyond one pool, and memory that instances lend each other."""
