"""The beginning of a long sequence in another cache, where attention goes to it.

    near:   … | tokens m … n in rows 0, 1, …  of a slot      new tokens come here
    far:    tokens 0 … m in rows 0, 1, …  of another         whole parts of them move there

Unlike what a `MemoryTier` keeps, they do not come back: they are attended where they are.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...vmem.errors import DriverError, InvalidOperation, Shortage
from ..exits import Exits
from ..slot import Slot
from ..slot_cache import SlotCache
from .copier import CopyJob
from .memory_tier import MoveStats
from .transfers import Spans


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


class SegmentTier:
    """Moves the beginnings of sequences from `near` to `far`. For one thread at a time.

    Args:
        near: the cache that sequences grow in.
        far: another in the host's memory, of the same token format.
        near_exits: how slots of `near` are let go.
        part_tokens: tokens move in multiples of it.

    Attributes:
        holder: a name for who attends to what is in `far`.
        exits: how slots of `far` are let go.
        moved: what was copied.
    """

    holder = "tier"

    def __init__(
        self, near: SlotCache, far: SlotCache, near_exits: Exits, part_tokens: int
    ) -> None:
        ours, theirs = near.geometry.token_format, far.geometry.token_format
        if ours.widths != theirs.widths or ours.dtype != theirs.dtype:
            raise InvalidOperation(f"tokens of {ours} cannot be kept as {theirs}")
        self.near = near
        self.far = far
        self.part_tokens = part_tokens
        self.exits = Exits(far)
        self._near_exits = near_exits
        self.moved = MoveStats()

    def whole_parts(self, num_tokens: int) -> int:
        """The most tokens, of so many, that can move."""
        return num_tokens // self.part_tokens * self.part_tokens

    def begin(
        self,
        tokens: Sequence[int],
        variant: str = "",
        *,
        num_reserved: int = 0,
        found: tuple[Slot, int] | None = None,
    ) -> Segment:
        """A segment with as much as is parked of `tokens`, and the promise of memory for the first
        `num_reserved` tokens.

        `found` is a slot of `far` that begins with them already, and with how many. Raises a
        Shortage or DriverError, with nothing changed but that what was found is parked.
        """
        slot, num_tokens = found or self.far.adopt(tokens, variant)
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
            job = self._copy(
                self.near.spans(slot, 0, num_tokens), self.far.spans(segment.slot, start, stop)
            )
        except (Shortage, DriverError):
            self.moved.num_failed += 1
            if segment.slot.num_tokens > start:
                with suppress(DriverError):  # then pages to spare stay, until the slot goes
                    self.far.truncate(segment.slot, start)
            raise
        self.moved.count(job, num_tokens)
        segment.num_tokens = stop

    def move(self, segment: Segment, slot: Slot, num_tokens: int, num_held: int) -> Slot:
        """Append the first `num_tokens` rows of the near `slot`; returns a new slot with the rest
        of its `num_held`.

        The old slot stays as it is; it is its owner's to let go. Raises a Shortage or DriverError,
        with nothing changed.
        """
        rest = num_held - num_tokens
        fresh = self.near.open()
        try:
            if rest:
                self.near.grow(fresh, rest)
                self._copy(
                    self.near.spans(slot, num_tokens, num_held),
                    self.near.spans(fresh, 0, rest),
                )
            self.append(segment, slot, num_tokens)
        except (Shortage, DriverError):
            self._near_exits.let_go(fresh)
            raise
        return fresh

    def release(self, segment: Segment, tokens: Sequence[int], variant: str = "") -> None:
        """Let the segment go. It is parked for whoever begins with `tokens`, which are all of its
        tokens, or none."""
        self.exits.let_go(segment.slot, tokens[: segment.num_tokens], variant)

    def _copy(self, source: Spans, target: Spans) -> CopyJob:
        """Copy at once. Raises DriverError if that fails."""
        job = CopyJob(source, target, after=self.near.pool.driver.record_fence())
        job.run()
        if job.error is not None:
            raise DriverError(f"{job.num_bytes} bytes of KV could not be copied") from job.error
        return job
