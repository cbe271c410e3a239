"""Simulated clusters and the search for placements: `vkv simulate` and `vkv place`."""
