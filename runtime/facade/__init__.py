"""vkv: virtual-memory KV cache runtime for large language models."""
