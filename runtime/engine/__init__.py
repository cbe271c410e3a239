"""The step loop, and what builds, feeds and measures it."""
