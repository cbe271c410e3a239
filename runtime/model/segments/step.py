"""Attention of requests whose first tokens lie elsewhere: asked there, merged here."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch

from ....attention_backends import (
    AttentionBatch,
    LayerAttention,
    PartialAttention,
    PastBatch,
    SegmentedBatch,
    queries_of,
)
from .holders import SegmentHolder


class Place(NamedTuple):
    """A stretch of a sequence's tokens that lies elsewhere.

    Attributes:
        holder: who has it.
        slot: what that knows it by.
        start, stop: the positions of its tokens.
    """

    holder: str
    slot: int
    start: int
    stop: int


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
        meanwhile if they can. Raises HolderLost if one is lost; the others' answers are had first,
        so that they can be asked again.
        """
        results = self._partial.empty(query, self._num_rows, value_cache.shape[3])
        with ExitStack() as answers:  # leaving it waits for all of them, whatever happens
            for holder, past, rows, queries in self._asked:
                answer = holder.attend(layer, query[queries], past, wanted, results[rows])
                answers.callback(answer.wait)
            own = results[self._own_rows]
            self._partial.attend_own(query, key_cache, value_cache, self._batch, wanted, own)
        return self._partial.merge(query, results, self._batch, wanted)


class SegmentedAttention:
    """Makes the steps of requests some of whose tokens lie elsewhere.

    Args:
        partial: for what is here.
        holders: who may have segments, by name. They come and go.
    """

    def __init__(self, partial: PartialAttention, holders: dict[str, SegmentHolder]) -> None:
        self.partial = partial
        self.holders = holders

    def step(
        self,
        own: AttentionBatch,
        positions: Sequence[int],
        places: Sequence[Sequence[Place]],
    ) -> SegmentedStep:
        """The attention of a step. Each holder is asked once a layer.

        Args:
            own: the batch over the slots.
            positions: of each sequence's first query, within the sequence.
            places: of each sequence, what of it is elsewhere, in order and without a gap; what is
                in the slot follows. There is one at least.
        """
        asked: dict[str, list[tuple[int, Place]]] = {}
        for sequence, of_one in enumerate(places):
            for place in of_one:
                asked.setdefault(place.holder, []).append((sequence, place))
        past = tuple(
            (
                tuple(sequence for sequence, _ in members),
                PastBatch(
                    query_lens=tuple(own.query_lens[b] for b, _ in members),
                    positions=tuple(positions[b] for b, _ in members),
                    key_starts=tuple(place.start for _, place in members),
                    key_stops=tuple(place.stop for _, place in members),
                    slots=tuple(place.slot for _, place in members),
                ),
            )
            for members in asked.values()
        )
        starts = tuple(of_one[-1].stop if of_one else 0 for of_one in places)
        batch = SegmentedBatch(own=own, key_starts=starts, past=past)
        return SegmentedStep(self.partial, batch, [self.holders[name] for name in asked])
