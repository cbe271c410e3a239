"""What others had of a request and lost is computed again; what they did not lose stays.

    tokens    0 …         | a … b         | b …                    | c … d        | d …
              lent, slot  | the first gap | behind it: lent, slot  | another gap  | behind that

A request with gaps is a prompt under way as far as the scheduler sees: its slot gets the tokens of
the first gap, and whole parts of them move elsewhere where they are too many for it. Once they are
all there, it goes on behind the gap.
"""

import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from itertools import pairwise

from ....allocator import Exits, Slot, SlotCache
from ....allocator.transfer import Lent, Remainder, put_behind, tokens_in
from ....vmem.errors import DriverError, Shortage
from ...request.request import Mending, Request
from .loans import Loans

_PATIENCE_S = 5.0  # of one that has gaps, with who places loans, and hears of a loss in less


class Gaps:
    """Opens and closes gaps in running requests.

    Args:
        cache: where the slots are.
        exits: how slots of `cache` are let go.
        loans: what others have.
        part_tokens: what is lent is a multiple of it.
        local_tokens: the most tokens that a slot has of a request that may outgrow the pool.
        may_outgrow: says whether a request may.
        move: has the first rows of a request's slot elsewhere, or raises a Shortage or DriverError.
        clock: seconds, which only go forward.
    """

    def __init__(
        self,
        cache: SlotCache,
        exits: Exits,
        loans: Loans,
        *,
        part_tokens: int,
        local_tokens: int,
        may_outgrow: Callable[[Request], bool],
        move: Callable[[Request, Slot, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._exits = exits
        self._loans = loans
        self._part_tokens = part_tokens
        self._local_tokens = local_tokens
        self._may_outgrow = may_outgrow
        self._move = move
        self._clock = clock

    def open(self, request: Request, gone: Collection[Lent]) -> bool:
        """Leave gaps where loans of a request were, and have it go on at the first of them.

        False, with nothing changed, if memory is too short for that: then all of the request is
        to be computed again.
        """
        assert not request.num_pending, request
        begin = 0 if request.segment is None else request.segment.num_tokens
        here = Remainder(request.lent, request.slot, begin, request.num_computed)
        spare = None
        if request.mending is not None and request.num_computed == request.slot_start:
            spare, here.slot = here.slot, None  # a gap's, and nothing of it is there yet
        found = [one for stretch in (here, *request.behind) for one in _left_of(stretch, gone)]
        if found[0].start > begin:
            found.insert(0, Remainder([], None, begin, begin))
        first, *behind = found
        mending = request.mending or Mending(behind, 0, 0)
        if first.slot is None:
            first.slot = spare
        if first.slot is None:
            room = self._room(max(b.start - a.stop for a, b in pairwise(found)))
            first.slot = self._open_slot(request, room)
            if first.slot is None:
                if request.mending is None:  # else who preempts it notes that
                    self.note_redo(request)
                return False
            mending.room_tokens = room
        mending.behind, mending.short_since_s = behind, None
        mending.num_lost += sum(one.stop - one.start for one in gone)
        served = min(request.num_computed, request.num_prompt_tokens)
        request.num_served = max(request.num_served, served)
        request.lent, request.slot, request.num_computed = first.lent, first.slot, first.stop
        request.mending = mending
        self._loans.give_back(gone)
        return True

    def _room(self, num_lost: int) -> int:
        """The most tokens of a gap that a slot has at a time, so that a part is to spare for others
        where there is that much."""
        part = self._part_tokens
        most = tokens_in(self._cache, self._cache.num_obtainable())
        return min(num_lost, self._local_tokens, max(part, most - part)) // part * part

    def _open_slot(self, request: Request, num_tokens: int) -> Slot | None:
        slot = None
        try:
            slot = self._cache.open(request.spec.owner)
            self._cache.reserve(slot, num_tokens)
        except (Shortage, DriverError):
            if slot is not None:
                self._exits.let_go(slot)
            return None
        return slot

    def close(self, request: Request) -> None:
        """Have a request go on behind gaps whose tokens are all there again; nothing before that.

        Raises a Shortage or DriverError, with the gap as it was.
        """
        mending = request.mending
        while mending and mending.behind and request.num_computed == mending.behind[0].start:
            self._close_first(request, mending)
        if mending and not mending.behind:
            request.mending = None
            self._loans.mended_tokens += mending.num_lost

    def _close_first(self, request: Request, mending: Mending) -> None:
        slot, behind = request.slot, mending.behind[0]
        assert slot is not None
        num_here = request.num_computed - request.slot_start
        is_joined = num_here > 0 and self._join(request, slot, num_here, behind)
        if num_here and not is_joined:
            self._move(request, slot, num_here)
        request.lent += behind.lent
        request.num_computed = behind.stop
        del mending.behind[0]
        if is_joined and behind.slot is not None:
            self._exits.let_go(behind.slot)
        elif behind.slot is not None:
            request.slot = behind.slot
            self._exits.let_go(slot)
        with suppress(Shortage, DriverError):  # then it asks again when it needs it
            if behind.slot is None:
                self._cache.truncate(slot, 0)
            most = mending.room_tokens if mending.behind else self._local_tokens
            if request.slot is not None and (mending.behind or self._may_outgrow(request)):
                left = request.num_computed + request.num_uncomputed - request.slot_start
                self._cache.reserve(request.slot, min(left, most))

    def _join(self, request: Request, slot: Slot, num_here: int, behind: Remainder) -> bool:
        """Have the slot behind a gap in that of the gap's tokens. False if there is no room."""
        num_behind = behind.stop - behind.start
        if behind.lent or behind.slot is None:
            return False
        if self._may_outgrow(request) and num_here + num_behind > self._local_tokens:
            return False
        try:
            put_behind(self._cache, slot, num_here, behind.slot, num_behind)
        except (Shortage, DriverError):
            return False
        return True

    def note(self, request: Request, *, is_short: bool) -> None:
        """A request with gaps found somebody who takes in what is too much for its slot, or not."""
        mending = request.mending
        if mending is None:
            return
        if not is_short:
            mending.short_since_s = None
        elif mending.short_since_s is None:
            mending.short_since_s = self._clock()

    def given_up(self, running: Iterable[Request]) -> list[Request]:
        """Those that nobody has taken tokens of for too long, to be computed again as a whole."""
        patience_s = 0.0 if self._loans.limits is None else _PATIENCE_S
        found = []
        for request in running:
            since_s = None if request.mending is None else request.mending.short_since_s
            if since_s is not None and self._clock() - since_s >= patience_s:
                found.append(request)
        return found

    def note_redo(self, request: Request) -> None:
        """All of a request is computed again for what was lost."""
        stretches = request.behind
        self._loans.redone_tokens += stretches[-1].stop if stretches else request.num_computed


def _left_of(stretch: Remainder, gone: Collection[Lent]) -> list[Remainder]:
    """What is left of a stretch without some loans."""
    found: list[Remainder] = []
    lent: list[Lent] = []
    start = stretch.start
    for one in stretch.lent:
        if one not in gone:
            lent.append(one)
            continue
        if lent:
            found.append(Remainder(lent, None, start, one.start))
        lent, start = [], one.stop
    if lent or stretch.slot is not None:
        found.append(Remainder(lent, stretch.slot, start, stretch.stop))
    return found
