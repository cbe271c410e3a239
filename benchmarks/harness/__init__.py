"""The benchmark harness, installed as `vkv.bench`."""
