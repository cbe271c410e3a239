"""Who has segments, and attends to them for their owners."""

from typing import Protocol

import torch

from ....allocator import SlotCache
from ....attention_backends import LayerAttention, PartialAttention, PastBatch


class Answer(Protocol):
    """Results that are on their way."""

    def wait(self) -> None:
        """Have them. Raises `HolderLost` if they will not come."""
        ...


class SegmentHolder(Protocol):
    """Whoever has segments: this process, in another cache; or another one."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        batch: PastBatch,
        wanted: LayerAttention,
        results: torch.Tensor,
    ) -> Answer:
        """Begin to attend to the segments of a batch, of several requests together.

        Args:
            query: [num_tokens, num_heads, head_dim].
            batch: whose `slots` are what the holder knows its segments by.
            results: filled once the answer is there; as of `PartialAttention.attend_past`.
        """
        ...


class _Done:
    def wait(self) -> None:
        """They are there."""


class LocalHolder:
    """Segments in a cache of this process, in the host's memory: attended at once.

    Args:
        cache: where they are.
        partial: of a backend of its own, since it is asked between other batches.
    """

    def __init__(self, cache: SlotCache, partial: PartialAttention) -> None:
        self._cache = cache
        self._partial = partial

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        batch: PastBatch,
        wanted: LayerAttention,
        results: torch.Tensor,
    ) -> Answer:
        keys, values = self._cache.layer(layer)
        self._partial.attend_past(query, keys, values, batch, wanted, results)
        return _Done()
