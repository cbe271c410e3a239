"""Requests longer than the pool: most of their tokens lie elsewhere, and are attended there.

Of a request that may get more tokens than the pool holds, the slot has `local_tokens` at most. When
it would have more, whole parts of it move, all of them if there is room: to the end of the
request's segment in the tier, or, where that has none, to engines in other processes. Only what is
in the slot counts against the pool.

Source: Infinite-LLM, arXiv:2401.02669, section 5.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from ...allocator import Exits, Slot, SlotCache
from ...allocator.transfer import Segment, SegmentTier, split_off, tokens_in
from ...vmem.errors import DriverError, OutOfLoans, Shortage
from ..request.request import Request
from .kv_files import KVFiles
from .lending import Gaps, Loans


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
        num_layers: of the model.
        clock: as of `Loans`.

    Attributes:
        loans: what other engines have of requests.
        gaps: requests some of whose tokens others have lost.
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
        num_layers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tier = tier
        self.local_tokens = local_tokens
        self.loans = Loans(cache, exits, part_tokens, clock)
        self.gaps = Gaps(
            cache,
            exits,
            self.loans,
            part_tokens=part_tokens,
            local_tokens=local_tokens,
            may_outgrow=self._may_outgrow,
            move=self._move,
            clock=clock,
        )
        self._cache = cache
        self._exits = exits
        self._kv_files = kv_files
        self._part_tokens = part_tokens
        self._make_way = make_way
        self.num_layers = num_layers

    def is_long(self, request: Request) -> bool:
        """True of one that may outgrow the pool, and whose tokens are too many for a slot now."""
        return request.num_tokens > self.local_tokens and self._may_outgrow(request)

    def _may_outgrow(self, request: Request) -> bool:
        if self.tier is None and not self.loans.has_lenders:
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
        self.check_loans(request)
        if self.tier is not None:
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

    def check_loans(self, request: Request) -> None:
        """Raises OutOfLoans if a request that waits is long, and what has to be elsewhere may not
        be lent now: so that no two begin that then wait for each other."""
        loans = self.loans
        if loans.limits is None or not loans.has_lenders or not self.is_long(request):
            return
        if loans.has_to_give_up:
            raise OutOfLoans(f"{request} waits until older ones have what they need of others")
        wanted = self.num_lacking(request)
        if wanted > loans.room():
            raise OutOfLoans(f"{wanted} tokens of {request} have to be lent; {loans.room()} may be")

    def num_lacking(self, request: Request) -> int:
        """Tokens of a long request that others have to take in so that it can begin, or go on."""
        if request.slot is not None:
            return self._part_tokens
        room = 0 if self.tier is None else self.tier.room_tokens
        return max(0, request.num_tokens - self.local_tokens - room)

    def _begin(self, tier: SegmentTier, request: Request, tokens: Sequence[int]) -> Segment:
        """What a file or the tier has of a request, in the tier, and the promise of memory there
        for all of its tokens, or as many as it has room for where others take some in."""
        try:
            return self._begin_there(tier, request, tokens)
        except Shortage:
            if not self._make_way():
                raise
            return self._begin_there(tier, request, tokens)

    def _begin_there(self, tier: SegmentTier, request: Request, tokens: Sequence[int]) -> Segment:
        found = None
        if self._kv_files.may_have_some:
            least = tier.far.prefix_length(tokens, request.variant) + self._part_tokens
            found = self._kv_files.open_slot(
                tier.far,
                tokens,
                request.variant,
                owner=request.spec.owner,
                least=least,
                exits=tier.exits,
            )
        wanted = tier.whole_parts(request.num_tokens)
        if self.loans.has_lenders:
            wanted = min(wanted, tier.room_tokens)
        return tier.begin(
            tokens, request.variant, owner=request.spec.owner, num_reserved=wanted, found=found
        )

    def make_room(self, request: Request, count: int) -> int:
        """Have room in a request's slot for `count` more tokens, or as many as it may have.

        Returns how many. Raises a Shortage or DriverError, with the request as it was.
        """
        if request.mending is None:
            return self._make_room(request, count)
        try:
            self.gaps.close(request)
            count = self._make_room(request, count)
        except OutOfLoans:
            self.gaps.note(request, is_short=True)
            raise
        self.gaps.note(request, is_short=False)
        return count

    def _make_room(self, request: Request, count: int) -> int:
        slot, mending = request.slot, request.mending
        assert slot is not None
        most = self.local_tokens if mending is None else mending.room_tokens
        num_local = request.num_computed - request.slot_start
        if num_local + count <= most or not (mending or self._may_outgrow(request)):
            return count
        part, lacking = self._part_tokens, num_local + count - most
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
        return min(count, most - (num_local - num_moving))

    def _shorten(
        self,
        request: Request,
        slot: Slot,
        num_moving: int,
        num_local: int,
        *,
        is_long: bool = True,
    ) -> None:
        """Have the first rows of a slot elsewhere, and the rest in a new one."""
        fresh = split_off(self._cache, self._exits, slot, num_moving, num_local)
        try:
            self._move(request, slot, num_moving, is_long=is_long)
        except (Shortage, DriverError):
            self._exits.let_go(fresh)
            raise
        request.slot = fresh
        self._exits.let_go(slot)
        if not is_long:
            return
        with suppress(Shortage, DriverError):  # then it asks again when it needs it
            mending = request.mending
            most = self.local_tokens if mending is None else mending.room_tokens
            left = request.num_uncomputed + request.num_computed - request.slot_start
            self._cache.reserve(fresh, min(left, most))

    def _move(self, request: Request, slot: Slot, num_tokens: int, *, is_long: bool = True) -> None:
        """Have the first rows of a slot elsewhere: those of long requests in the tier as long as it
        has room, and all of the request before them is there."""
        tier = self.tier if is_long and not request.lent else None
        if tier is None:
            request.lent += self.loans.lend(slot, request.slot_start, num_tokens)
            return
        with suppress(Shortage):
            self._append(tier, request, slot, num_tokens)
            return
        try:
            request.lent += self.loans.lend(slot, request.slot_start, num_tokens)
            return
        except OutOfLoans:
            if not self._make_way() and self.loans.has_lenders:
                raise
        try:
            self._append(tier, request, slot, num_tokens)
        except Shortage as shortage:
            if not self.loans.has_lenders:
                raise
            raise OutOfLoans(f"nobody takes in what the tier does not: {shortage}") from shortage

    def _append(self, tier: SegmentTier, request: Request, slot: Slot, num_tokens: int) -> None:
        segment = request.segment or tier.begin((), owner=request.spec.owner)
        try:
            tier.append(segment, slot, num_tokens)
        except (Shortage, DriverError):
            if request.segment is None:
                tier.release(segment, ())
            raise
        request.segment = segment

    # -- more requests at once -------------------------------------------------------------------

    def lend_out(
        self, running: Sequence[Request], refused: Request, wanted_tokens: int
    ) -> Request | None:
        """Memory is short for `refused`: have others take old tokens of the running request that
        has most, which is returned, with another slot.

        None if nobody does, if it does not help, or if it costs more than it brings.
        """
        room = self.loans.room() if self.loans.limits is not None else 0
        if not room or not self.loans.pays(self.num_layers, len(running)):
            return None
        movable = {r: self._num_movable(r, room) for r in running}
        chosen = max(movable, key=movable.__getitem__, default=None)
        if chosen is None or chosen.slot is None or not movable[chosen]:
            return None
        freed = min(room, sum(movable.values()))
        lacking = self._cache.num_pages(wanted_tokens) - self._cache.num_obtainable()
        if refused.slot is None and lacking > self._cache.num_pages(freed):
            return None  # it would not run for that
        num_local = chosen.num_computed - chosen.slot_start
        try:
            self._shorten(chosen, chosen.slot, movable[chosen], num_local, is_long=False)
        except (Shortage, DriverError):
            return None
        return chosen

    def _num_movable(self, request: Request, room: int) -> int:
        """Tokens that could leave a slot for others now; what stays is copied, and so must fit."""
        if request.slot is None or request.num_pending or request.segment is not None:
            return 0
        if request.slot.num_pins:  # it is on its way to another engine, or is saved
            return 0
        num_local = request.num_computed - request.slot_start
        count = min(num_local, room) // self._part_tokens * self._part_tokens
        rest = self._cache.num_pages(num_local - count)
        return count if rest <= self._cache.num_obtainable() else 0

    def recall(self, running: Sequence[Request]) -> list[Request]:
        """Have loans leave from where they may not stay. Returns requests that have to give their
        slots up for it."""
        stuck = self.loans.settle(running, self._room_at_home)
        if self.loans.has_to_give_up:
            stuck += [r for r in running[::-1] if self.is_long(r) and r not in stuck]
        stuck += self.gaps.given_up(r for r in running[::-1] if r not in stuck)
        return [request for request in stuck if request.slot is not None]

    def _room_at_home(self, request: Request) -> int:
        """Tokens that a request may have in its slot beside those that are there, with a part to
        spare for others."""
        if request.mending is not None:
            return 0
        num_local = request.num_computed - request.slot_start
        if self._may_outgrow(request):
            return self.local_tokens - num_local
        obtainable = self._cache.num_obtainable() - self._cache.num_pages(self._part_tokens)
        return max(0, tokens_in(self._cache, obtainable) - num_local)  # what is there is copied

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
        self.loans.give_back(request.all_lent)
        for one in request.behind:
            if one.slot is not None:
                self._exits.let_go(one.slot)
        request.lent, request.mending = [], None

    def settle(self) -> None:
        """Give back what could not be given back before."""
        if self.tier is not None:
            self.tier.exits.retry()
