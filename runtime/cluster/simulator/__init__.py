"""A cluster on a virtual clock: the real scheduler and policies, over a cache that only counts."""
