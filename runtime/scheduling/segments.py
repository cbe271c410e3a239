"""Requests longer than the pool: most of their tokens lie elsewhere, and are attended there.

Of a request that may get more tokens than the pool holds, the slot has `local_tokens` at most. When
it would have more, whole parts of it move, all of them if there is room: to the end of the
request's segment in the tier, or, where that has none, to engines in other processes. Only what is
in the slot counts against the pool.

Source: Infinite-LLM, arXiv:2401.02669, section 5.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from ...allocator import Exits, Slot, SlotCache
from ...allocator.transfer import Lent, MoveStats, Segment, SegmentTier, Spans, split_off
from ...vmem.errors import DriverError, OutOfPages, Shortage, TransferError
from ..request.request import Request
from .kv_files import KVFiles

_log = logging.getLogger(__name__)


class Creditor(Protocol):
    """Another engine, which takes tokens in and attends to them.

    Attributes:
        name: of whoever attends to them.
    """

    name: str

    def take(self, spans: Spans, start: int, num_tokens: int) -> int | None:
        """Copy tokens `start …` of a sequence there; returns the loan, None if there is no room.

        Raises a TransferError if it cannot be reached any more.
        """
        ...

    def give_back(self, loan: int) -> None:
        """What was lent is not needed any more. Never fails."""
        ...


class Segments:
    """Keeps the slots of long requests short.

    Args:
        cache: where the slots are.
        exits: how slots of `cache` are let go.
        kv_files: files that a segment may begin with.
        tier: where the beginnings go; None for nowhere.
        make_way: has the tier let go of what it holds for requests that wait; False if nothing.
        part_tokens: what moves is a multiple of it.
        local_tokens: the most tokens that a long request has in its slot; at least two parts.

    Attributes:
        creditors: who else takes tokens in, by name; the first is asked first.
        lent: what moved to them.
    """

    def __init__(
        self,
        cache: SlotCache,
        exits: Exits,
        kv_files: KVFiles,
        *,
        tier: SegmentTier | None,
        make_way: Callable[[], bool],
        part_tokens: int,
        local_tokens: int,
    ) -> None:
        self.tier = tier
        self.local_tokens = local_tokens
        self.creditors: dict[str, Creditor] = {}
        self.lent = MoveStats()
        self._cache = cache
        self._exits = exits
        self._kv_files = kv_files
        self._part_tokens = part_tokens
        self._make_way = make_way

    def is_long(self, request: Request) -> bool:
        """True of one that may outgrow the pool, and whose tokens are too many for a slot now."""
        return request.num_tokens > self.local_tokens and self._may_outgrow(request)

    def _may_outgrow(self, request: Request) -> bool:
        if self.tier is None and not self.creditors:
            return False
        # The last token is never computed, so it needs no room.
        most = request.num_prompt_tokens + request.max_tokens - 1
        most = min(most, self._cache.max_len)
        return self._cache.num_pages(most) > self._cache.pool.limit_pages

    # -- a slot, and room in it ----------------------------------------------------------------

    def open(self, request: Request, tokens: Sequence[int], budget: int) -> tuple[Slot, int]:
        """Give a long request a slot, and what the tier has of it.

        Returns the slot, and how many tokens to compute now, `budget` at most. `tokens` are those
        that may be found computed. Raises a Shortage or DriverError, with the request as it was.
        """
        segment = None
        if self.tier is not None:
            try:
                segment = self._begin(self.tier, request, tokens)
            except Shortage:
                if not self._make_way():
                    raise
                segment = self._begin(self.tier, request, tokens)
        slot = None
        try:
            slot = self._cache.open(request.spec.owner)
            num_there = 0 if segment is None else segment.num_tokens
            left = min(request.num_tokens - num_there, self.local_tokens)
            count = min(left, budget)
            self._cache.reserve(slot, left)
            self._cache.grow(slot, count)
        except (Shortage, DriverError):
            if slot is not None:
                self._exits.let_go(slot)
            if self.tier is not None and segment is not None:
                self.tier.release(segment, tokens, request.variant)
            raise
        request.segment = segment
        return slot, count

    def _begin(self, tier: SegmentTier, request: Request, tokens: Sequence[int]) -> Segment:
        """What a file or the tier has of a request, in the tier, and the promise of memory there
        for all of its tokens, unless others have to take some in."""
        found = None
        if self._kv_files.may_have_some:
            least = tier.far.prefix_length(tokens, request.variant) + self._part_tokens
            found = self._kv_files.open_slot(
                tier.far, tokens, request.variant, least=least, exits=tier.exits
            )
        wanted = 0 if self.creditors else tier.whole_parts(request.num_tokens)
        return tier.begin(tokens, request.variant, num_reserved=wanted, found=found)

    def make_room(self, request: Request, count: int) -> int:
        """Have room in a request's slot for `count` more tokens, or as many as it may have.

        Returns how many. Raises a Shortage or DriverError, with the request as it was.
        """
        slot = request.slot
        assert slot is not None
        num_local = request.num_computed - request.slot_start
        if num_local + count <= self.local_tokens or not self._may_outgrow(request):
            return count
        part, lacking = self._part_tokens, num_local + count - self.local_tokens
        num_whole = num_local // part
        num_moving, least = num_whole * part, min(num_whole, -(-lacking // part)) * part
        if num_moving:
            try:
                self._shorten(request, slot, num_moving, num_local)
            except Shortage:  # for all: each stretch costs queries of its own, so few are better
                if num_moving == least:
                    raise
                num_moving = least
                self._shorten(request, slot, num_moving, num_local)
        return min(count, self.local_tokens - (num_local - num_moving))

    def _shorten(self, request: Request, slot: Slot, num_moving: int, num_local: int) -> None:
        """Have the first rows of a slot elsewhere, and the rest in a new one."""
        fresh = split_off(self._cache, self._exits, slot, num_moving, num_local)
        try:
            self._move(request, slot, num_moving)
        except (Shortage, DriverError):
            self._exits.let_go(fresh)
            raise
        request.slot = fresh
        self._exits.let_go(slot)
        with suppress(Shortage, DriverError):  # then it asks again when it needs it
            left = request.num_tokens - request.slot_start
            self._cache.reserve(fresh, min(left, self.local_tokens))

    def _move(self, request: Request, slot: Slot, num_tokens: int) -> None:
        """Have the first rows of a slot elsewhere: in the tier as long as it has room, and all of
        the request before them is there."""
        shortage: Shortage | None = None
        if self.tier is not None and not request.lent:
            try:
                self._append(self.tier, request, slot, num_tokens)
                return
            except Shortage as error:
                shortage = error
            if not self.creditors and self._make_way():
                self._append(self.tier, request, slot, num_tokens)
                return
        lent: list[Lent] = []
        while (done := sum(one.stop - one.start for one in lent)) < num_tokens:
            one = self._lend(request, slot, done, num_tokens)
            if one is None:
                self._give_back(lent)
                raise shortage or OutOfPages(
                    f"nobody has room for {num_tokens} tokens of {request}"
                )
            lent.append(one)
        request.lent += lent
        self.lent.num_moves += len(lent)
        self.lent.num_tokens += num_tokens
        self.lent.num_bytes += num_tokens * self._cache.geometry.token_format.token_bytes

    def _lend(self, request: Request, slot: Slot, start: int, stop: int) -> Lent | None:
        """Have a creditor take rows from `start` on: as many whole parts as any has room for, those
        up to `stop` at most. None if nobody takes even one."""
        position = request.slot_start + start
        for end in range(stop, start, -self._part_tokens):
            spans = self._cache.spans(slot, start, end)
            for name, creditor in list(self.creditors.items()):
                try:
                    loan = creditor.take(spans, position, end - start)
                except TransferError as error:
                    _log.warning("%s takes no more tokens in: %s", name, error)
                    del self.creditors[name]
                    continue
                if loan is not None:
                    return Lent(name, loan, position, position + end - start)
        return None

    def _give_back(self, lent: Sequence[Lent]) -> None:
        for one in lent:
            if one.holder in self.creditors:
                self.creditors[one.holder].give_back(one.loan)

    def _append(self, tier: SegmentTier, request: Request, slot: Slot, num_tokens: int) -> None:
        segment = request.segment or tier.begin(())
        try:
            tier.append(segment, slot, num_tokens)
        except (Shortage, DriverError):
            if request.segment is None:
                tier.release(segment, ())
            raise
        request.segment = segment

    # -- ends ----------------------------------------------------------------------------------

    def let_go(self, request: Request, slot: Slot, *, keep: bool) -> None:
        """Let a request's slot go, and what is elsewhere; with `keep` the tier parks its part."""
        if keep and self.tier is not None and not request.lent:
            rest = request.num_computed - request.slot_start
            rest = rest // self._part_tokens * self._part_tokens
            with suppress(Shortage, DriverError):  # then that is computed again
                if rest:
                    self._append(self.tier, request, slot, rest)
        self._exits.let_go(slot)
        segment, request.segment = request.segment, None
        if segment is not None and self.tier is not None:
            self.tier.release(segment, request.token_ids if keep else (), request.variant)
        lent, request.lent = request.lent, []
        self._give_back(lent)

    def settle(self) -> None:
        """Give back what could not be given back before."""
        if self.tier is not None:
            self.tier.exits.retry()
