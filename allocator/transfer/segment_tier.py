"""The beginning of a long sequence in another cache, where attention goes to it.

    near:   … | tokens m … n in rows 0, 1, …  of a slot      new tokens come here
    far:    tokens 0 … m in rows 0, 1, …  of another         whole parts of them move there

Unlike what a `MemoryTier` keeps, they do not come back: they are attended where they are.
"""

import bisect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...vmem.errors import DriverError, InvalidOperation, Shortage, VkvError
from ..exits import Exits
from ..page_pool import Owner
from ..slot import Slot
from ..slot_cache import SlotCache
from .copier import CopyJob
from .memory_tier import MoveStats
from .transfers import Spans


class Lent(NamedTuple):
    """A stretch of a sequence that another process has taken in.

    Attributes:
        holder: who, by name.
        loan: what that knows it by.
        start, stop: the positions of its tokens.
    """

    holder: str
    loan: int
    start: int
    stop: int


@dataclass(eq=False)
class Segment:
    """The first tokens of a sequence, in the rows of a slot of the far cache.

    Attributes:
        holder: who attends to it.
        slot: whose rows they are, from row 0 on.
        num_tokens: how many they are; a multiple of the tier's `part_tokens`.
    """

    holder: str
    slot: Slot
    num_tokens: int


@dataclass(eq=False)
class Remainder:
    """A stretch of a sequence behind tokens that were lost, with no gap in it.

    Attributes:
        lent: what other processes have of it, from `start` on.
        slot: the rest; None if there is none.
        start, stop: the positions of its tokens.
    """

    lent: list[Lent]
    slot: Slot | None
    start: int
    stop: int


class SegmentTier:
    """Moves the beginnings of sequences from `near` to `far`. For one thread at a time.

    Args:
        near: the cache that sequences grow in.
        far: another in the host's memory, of the same token format.
        part_tokens: tokens move in multiples of it.

    Attributes:
        holder: a name for who attends to what is in `far`.
        exits: how slots of `far` are let go.
        moved: what was copied.
    """

    holder = "tier"

    def __init__(self, near: SlotCache, far: SlotCache, part_tokens: int) -> None:
        ours, theirs = near.geometry.token_format, far.geometry.token_format
        if ours.widths != theirs.widths or ours.dtype != theirs.dtype:
            raise InvalidOperation(f"tokens of {ours} cannot be kept as {theirs}")
        self.near = near
        self.far = far
        self.part_tokens = part_tokens
        self.exits = Exits(far)
        self.moved = MoveStats()

    @property
    def room_tokens(self) -> int:
        """Tokens, in whole parts, that it could take of a sequence that is not there yet."""
        return self.whole_parts(max(0, tokens_in(self.far, self.far.num_obtainable())))

    def whole_parts(self, num_tokens: int) -> int:
        """The most tokens, of so many, that can move."""
        return num_tokens // self.part_tokens * self.part_tokens

    def begin(
        self,
        tokens: Sequence[int],
        variant: str = "",
        *,
        owner: Owner | None = None,
        num_reserved: int = 0,
        found: tuple[Slot, int] | None = None,
    ) -> Segment:
        """A segment with as much as is parked of `tokens`, and the promise of memory for the first
        `num_reserved` tokens.

        `owner` is as of `SlotCache.adopt`. `found` is a slot of `far` that begins with them
        already, and with how many. Raises a Shortage or DriverError, with nothing changed but that
        what was found is parked.
        """
        slot, num_tokens = found or self.far.adopt(tokens, variant, owner=owner)
        num_tokens = self.whole_parts(num_tokens)
        try:
            self.far.truncate(slot, num_tokens)
            self.far.reserve(slot, num_reserved)
        except (Shortage, DriverError):
            self.exits.let_go(slot, tokens[: min(num_tokens, slot.num_tokens)], variant)
            raise
        return Segment(self.holder, slot, num_tokens)

    def append(self, segment: Segment, slot: Slot, num_tokens: int) -> None:
        """Copy the first `num_tokens` rows of the near `slot` behind the segment's tokens.

        Raises a Shortage or DriverError, with the segment as it was.
        """
        start, stop = segment.num_tokens, segment.num_tokens + num_tokens
        try:
            self.far.grow(segment.slot, stop)
            source, target = self.near.spans(slot, 0, num_tokens), self.far.spans
            job = _copy(self.near, source, target(segment.slot, start, stop))
        except (Shortage, DriverError):
            self.moved.num_failed += 1
            if segment.slot.num_tokens > start:
                with suppress(DriverError):  # then pages to spare stay, until the slot goes
                    self.far.truncate(segment.slot, start)
            raise
        self.moved.count(job, num_tokens)
        segment.num_tokens = stop

    def release(self, segment: Segment, tokens: Sequence[int], variant: str = "") -> None:
        """Let the segment go. It is parked for whoever begins with `tokens`, which are all of its
        tokens, or none."""
        self.exits.let_go(segment.slot, tokens[: segment.num_tokens], variant)


def split_off(cache: SlotCache, exits: Exits, slot: Slot, start: int, stop: int) -> Slot:
    """A new slot with rows `start … stop` of another, which stays as it is.

    Pages that others share, or a file has, are left to them. Raises a Shortage or DriverError, with
    nothing changed.
    """
    fresh = cache.open(slot.owner)
    if start == stop:
        return fresh
    try:
        cache.grow(fresh, stop - start)
        _copy(cache, cache.spans(slot, start, stop), cache.spans(fresh, 0, stop - start))
    except (Shortage, DriverError):
        exits.let_go(fresh)
        raise
    return fresh


def put_before(
    cache: SlotCache,
    exits: Exits,
    slot: Slot,
    num_rows: int,
    num_before: int,
    fill: Callable[[Spans], None],
) -> Slot:
    """A new slot with `num_before` rows that `fill` fills, and then the first `num_rows` of
    another of the same owner, which stays as it is.

    Raises a Shortage, DriverError or what `fill` raises, with nothing changed.
    """
    fresh = cache.open(slot.owner)
    try:
        cache.grow(fresh, num_before + num_rows)
        fill(cache.spans(fresh, 0, num_before))
        if num_rows:
            target = cache.spans(fresh, num_before, num_before + num_rows)
            _copy(cache, cache.spans(slot, 0, num_rows), target)
    except VkvError:
        exits.let_go(fresh)
        raise
    return fresh


def put_behind(cache: SlotCache, slot: Slot, num_rows: int, other: Slot, num_more: int) -> None:
    """Copy the first `num_more` rows of `other` behind the first `num_rows` of `slot`.

    Raises a Shortage or DriverError, with those rows as they were.
    """
    cache.grow(slot, num_rows + num_more)
    if num_more:
        target = cache.spans(slot, num_rows, num_rows + num_more)
        _copy(cache, cache.spans(other, 0, num_more), target)


def staging(cache: SlotCache, num_tokens: int) -> Spans:
    """Memory beside a cache for so many of its tokens, on their way through this process."""
    widths = cache.geometry.token_format.widths
    return [[torch.empty(num_tokens * width, dtype=torch.uint8)] for width in widths]


def part_of(staged: Spans, num_tokens: int, start: int, stop: int) -> Spans:
    """Tokens `start … stop` of what is staged, of `num_tokens`."""
    parts = []
    for (piece,) in staged:
        width = len(piece) // num_tokens
        parts.append([piece[start * width : stop * width]])
    return parts


def _copy(owner: SlotCache, source: Spans, target: Spans) -> CopyJob:
    """Copy at once what `owner` has. Raises DriverError if that fails."""
    job = CopyJob(source, target, after=owner.pool.driver.record_fence())
    job.run()
    if job.error is not None:
        raise DriverError(f"{job.num_bytes} bytes of KV could not be copied") from job.error
    return job


def tokens_in(cache: SlotCache, num_pages: int) -> int:
    """The most tokens that a slot can have with so many pages; below 0 without any."""
    return bisect.bisect_right(range(cache.max_len), num_pages, key=cache.num_pages) - 1
