"""The two errors of this package. It imports nothing of ours, so they are plain ValueErrors;
`vkv.LLM` raises them again as `BadCheckpoint` and `UnsupportedModel` of the library's tree."""


class QuantError(ValueError):
    """A quantised tensor or checkpoint that cannot be right; the message names the tensor."""


class UnsupportedQuantization(QuantError):
    """A scheme that is known to exist and is not read here; the message says what is."""
