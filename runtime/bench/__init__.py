"""The benchmark harness: what `vkv bench` runs and records."""
