"""Cut a step's attention into tiles that need a mask only where one is unavoidable.

A tile is a run of one sequence's queries over a run of its keys. Tiles over the same queries
are merged by log-sum-exp (`merge.py`), so each may use the cheapest kernel that fits: most tiles
see all their keys, or are plainly causal, and need no mask at all.
"""

from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise

import torch

from .base import AttentionBatch

# Queries a masked or materialised tile holds at once. It bounds the wasted half of a band
# (a tile of a window w computes this many + w keys a query) and the size of the logits.
QUERIES_PER_TILE = 128
KEYS_PER_TILE = 1024


class Mask(Enum):
    NONE = auto()  # every query sees every key of the tile
    CAUSAL = auto()  # as many keys as queries, lower triangle
    BAND = auto()  # anything else: causal edge, window edge or both


@dataclass(frozen=True, slots=True)
class Tile:
    """Keys `keys` of the block's sequence; `offset` is the first query's own key among them."""

    keys: slice  # relative to the sequence's `first_key`
    offset: int
    mask: Mask


@dataclass(frozen=True, slots=True)
class Block:
    """A run of queries of one sequence, and the tiles whose results are merged into it."""

    queries: slice  # of the flat ones
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """What one sequence of the batch computes; keys before `first_key` are out of every window."""

    index: int
    slot: int
    first_key: int
    kv_len: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    sequences: tuple[SequencePlan, ...]
    decode_only: bool  # every sequence has one query, hence one block of one unmasked tile


def plan_step(batch: AttentionBatch, window: int | None, *, bounded: bool) -> StepPlan:
    """Plan all sequences of a step.

    Args:
        window: as in `LayerAttention`.
        bounded: cut tiles so that no more than `QUERIES_PER_TILE` x `KEYS_PER_TILE` logits a head
            exist at once, for kernels that materialise them.
    """
    sequences = []
    first_query = 0  # among the flat ones
    for index, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        assert 1 <= query_len <= kv_len, "a sequence's queries are the last of its tokens"
        first_key = 0 if window is None else max(0, kv_len - query_len - window + 1)
        first_position = kv_len - query_len
        spans = _query_spans(first_position, kv_len, window, bounded)
        blocks = tuple(
            Block(
                slice(first_query + start - first_position, first_query + stop - first_position),
                tuple(_tiles(start, stop, first_key, window, bounded)),
            )
            for start, stop in spans
        )
        sequences.append(SequencePlan(index, batch.slots[index], first_key, kv_len, blocks))
        first_query += query_len
    return StepPlan(tuple(sequences), decode_only=max(batch.query_lens) == 1)


def _query_spans(start: int, stop: int, window: int | None, bounded: bool) -> list[tuple[int, int]]:
    """Cut the queries at positions `[start, stop)` into blocks."""
    spans = []
    # Queries at positions below the window see everything before them: one block, no band.
    unwindowed = stop if window is None else min(stop, max(start, window))
    if not bounded and start < unwindowed:
        spans.append((start, unwindowed))
        start = unwindowed
    spans += [(at, min(at + QUERIES_PER_TILE, stop)) for at in range(start, stop, QUERIES_PER_TILE)]
    return spans


def _tiles(start: int, stop: int, first_key: int, window: int | None, bounded: bool) -> list[Tile]:
    """The tiles of the queries at positions `[start, stop)`, all their visible keys covered."""
    seen_from = 0 if window is None else max(0, start - window + 1)
    is_band = window is not None and stop > window
    if bounded:
        edges = [*range(seen_from, stop, KEYS_PER_TILE), stop]
    elif is_band or start == 0 or stop - start == 1:  # a lone query sees every key there is
        edges = [seen_from, stop]
    else:  # a prefix that all queries see whole, then the causal triangle
        edges = [seen_from, start, stop]
    return [
        Tile(
            slice(low - first_key, high - first_key),
            start - low,
            _mask(start, stop, low, high, window),
        )
        for low, high in pairwise(edges)
    ]


def _mask(start: int, stop: int, low: int, high: int, window: int | None) -> Mask:
    """The mask of queries at positions `[start, stop)` over keys at `[low, high)`."""
    sees_last_key = high - 1 <= start  # the first query does, so all do
    sees_first_key = window is None or low > stop - 1 - window  # the last query does
    if sees_last_key and sees_first_key:
        return Mask.NONE
    if sees_first_key and (low, high) == (start, stop):
        return Mask.CAUSAL
    return Mask.BAND


def hidden_keys(
    num_queries: int, num_keys: int, offset: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """Which keys of a tile each query must not see, bool [num_queries, num_keys]."""
    position = torch.arange(offset, offset + num_queries, device=device).unsqueeze(1)
    key = torch.arange(num_keys, device=device)
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    return hidden
