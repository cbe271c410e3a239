"""What the server counts, under vLLM's names and with its buckets, and what is vkv's own."""

from .requests import SHARED, Metrics

__all__ = ["SHARED", "Metrics"]
