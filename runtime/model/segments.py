"""Attention of requests whose first tokens lie elsewhere: asked there, merged here."""

from collections.abc import Sequence
from typing import Protocol

import torch

from ...allocator import SlotCache
from ...attention_backends import (
    AttentionBatch,
    LayerAttention,
    PartialAttention,
    PastBatch,
    SegmentedBatch,
    queries_of,
)


class Answer(Protocol):
    """Results that are on their way."""

    def wait(self) -> None:
        """Have them. Raises what went wrong."""
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
            batch: whose `slots` are the holder's.
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


class SegmentedStep:
    """One step's attention over what is here and what is elsewhere.

    Args:
        partial: attends to what is here, and merges.
        batch: all of it.
        holders: who has each of `batch.past`.
    """

    def __init__(
        self, partial: PartialAttention, batch: SegmentedBatch, holders: Sequence[SegmentHolder]
    ) -> None:
        self._partial = partial
        self._batch = batch
        self._own_rows, *past_rows = partial.slices(batch)
        self._num_rows = past_rows[-1].stop
        self._asked = [
            (holder, past, rows, queries_of(batch.own, sequences))
            for holder, (sequences, past), rows in zip(holders, batch.past, past_rows, strict=True)
        ]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        wanted: LayerAttention,
    ) -> torch.Tensor:
        """Attention over all keys, [num_tokens, num_heads, value_head_dim].

        The caches are those of the keys that are here; holders are asked first, and attend
        meanwhile if they can.
        """
        results = self._partial.empty(query, self._num_rows, value_cache.shape[3])
        answers = [
            holder.attend(layer, query[queries], past, wanted, results[rows])
            for holder, past, rows, queries in self._asked
        ]
        own = results[self._own_rows]
        self._partial.attend_own(query, key_cache, value_cache, self._batch, wanted, own)
        for answer in answers:
            answer.wait()
        return self._partial.merge(query, results, self._batch, wanted)


class SegmentedAttention:
    """Makes the steps of requests of which some begin in the tier.

    Args:
        partial: for what is here.
        holder: of the tier's cache.
    """

    def __init__(self, partial: PartialAttention, holder: SegmentHolder) -> None:
        self._partial = partial
        self._holder = holder

    def step(
        self,
        own: AttentionBatch,
        positions: Sequence[int],
        segments: Sequence[tuple[int, int] | None],
    ) -> SegmentedStep:
        """The attention of a step.

        Args:
            own: the batch over the slots.
            positions: of each sequence's first query, within the sequence.
            segments: of each sequence, the tier's slot with its first tokens, and how many they
                are; None for one whose slot has all. At least one is not None.
        """
        members = tuple(b for b, segment in enumerate(segments) if segment is not None)
        there = [segment for segment in segments if segment is not None]
        past = PastBatch(
            query_lens=tuple(own.query_lens[b] for b in members),
            positions=tuple(positions[b] for b in members),
            key_starts=(0,) * len(members),
            key_stops=tuple(num_tokens for _, num_tokens in there),
            slots=tuple(slot for slot, _ in there),
        )
        starts = tuple(0 if segment is None else segment[1] for segment in segments)
        batch = SegmentedBatch(own=own, key_starts=starts, past=((members, past),))
        return SegmentedStep(self._partial, batch, [self._holder])
