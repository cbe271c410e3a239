"""The `vkv` command."""
