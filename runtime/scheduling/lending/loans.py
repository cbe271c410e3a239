"""What requests of an engine have with others: lent, moved on, and taken home again.

Source: Infinite-LLM, arXiv:2401.02669, section 5.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import median
from typing import Protocol

from ....allocator import Exits, Slot, SlotCache
from ....allocator.transfer import Lent, MoveStats, Spans, part_of, put_before, staging
from ....vmem.errors import DriverError, OutOfLoans, Shortage, TransferError
from ...request.request import Request

_STAGED_PARTS = 8  # of a loan that moves on, in this process's memory at a time
_RETRY_S = 0.25  # after what could come home did not
_REFUSES_S = 2.0  # for which who took nothing in is not asked to take more
_BUDGET_S = 0.05  # of moving between two steps, beyond the loan that is under way
_STEPS = 64  # whose times are remembered

_log = logging.getLogger(__name__)


class Creditor(Protocol):
    """Another engine, which takes tokens in and attends to them.

    Attributes:
        name: of whoever attends to them.
        wanted: loans whose memory it needs soon.
        num_steps: in which it was asked, so far.
        sent_bytes, received_bytes: for that, so far: queries and results.
        waited_s: for results, so far.
    """

    name: str
    wanted: tuple[int, ...]
    num_steps: int
    sent_bytes: int
    received_bytes: int
    waited_s: float

    @property
    def answer_s(self) -> float | None:
        """For how long an answer is waited for in a layer, by the median; None if not known."""
        ...

    def take(self, spans: Spans, start: int, num_tokens: int) -> int | None:
        """Copy tokens `start …` of a sequence there; returns the loan, None if there is no room.

        Raises a TransferError if it cannot be reached any more.
        """
        ...

    def fetch(self, spans: Spans, loan: int, start: int, num_tokens: int) -> None:
        """Copy tokens of a loan here, from its row `start` on. It stays a loan.

        Raises a TransferError if it, or the loan, is lost.
        """
        ...

    def give_back(self, loan: int) -> None:
        """What was lent is not needed any more. Never fails."""
        ...


class Loans:
    """Lends parts of sequences to others, and has them go where they may be.

    Args:
        cache: where the slots are.
        exits: how slots of `cache` are let go.
        part_tokens: what is lent is a multiple of it.
        clock: seconds, which only go forward.

    Attributes:
        creditors: by name; the first is asked first.
        limits: the most tokens that may be at each; None where nobody places loans, and each takes
            what it has room for.
        called: creditors from which what is beyond the limit leaves at once.
        has_to_give_up: requests that are longer than the pool make room for others', and none
            begins, as long as that is so.
        lent, moved_on, came_home: what moved there, from one to another, and back.
        num_called: loans that left since they were called.
        num_called_back, num_lost: loans that others ended, and that went with others; their tokens
            are computed again.
        mended_tokens, redone_tokens: those that were computed again by themselves; and those of
            requests that had to be computed again from the start for such a loan.
    """

    def __init__(
        self,
        cache: SlotCache,
        exits: Exits,
        part_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.creditors: dict[str, Creditor] = {}
        self.limits: Mapping[str, int] | None = None
        self.called: Collection[str] = ()
        self.has_to_give_up = False
        self._has_lenders = False
        self.lent, self.moved_on, self.came_home = MoveStats(), MoveStats(), MoveStats()
        self.num_called = self.num_called_back = self.num_lost = 0
        self.mended_tokens = self.redone_tokens = 0
        self._cache = cache
        self._exits = exits
        self._part_tokens = part_tokens
        self._token_bytes = cache.geometry.token_format.token_bytes
        self._clock = clock
        self._num_lent: Counter[str] = Counter()
        self._refused_s: dict[str, float] = {}  # when somebody took nothing in, though it might
        self._retry_at_s = 0.0
        self._steps_s: deque[float] = deque(maxlen=_STEPS)

    # -- room --------------------------------------------------------------------------------

    @property
    def has_lenders(self) -> bool:
        """Whether somebody might lend, now or later."""
        return bool(self.creditors) if self.limits is None else self._has_lenders

    def place(
        self,
        limits: Mapping[str, int],
        called: Collection[str] = (),
        *,
        has_lenders: bool,
        has_to_give_up: bool = False,
    ) -> None:
        """Have so many tokens at each creditor at most, in this order, from now on."""
        known = self.creditors
        order = [name for name in limits if name in known]
        order += [name for name in known if name not in limits]
        self.creditors = {name: known[name] for name in order}
        self.limits, self.called = limits, called
        self._has_lenders, self.has_to_give_up = has_lenders, has_to_give_up
        self._retry_at_s = 0.0

    def num_lent(self, name: str) -> int:
        """Tokens that a creditor has."""
        return self._num_lent[name]

    def refusing(self) -> tuple[str, ...]:
        """Creditors that took nothing in a moment ago, though they were to have room."""
        since_s = self._clock() - _REFUSES_S
        self._refused_s = {name: at for name, at in self._refused_s.items() if at > since_s}
        return tuple(self._refused_s)

    def room(self, but: str | None = None) -> int:
        """Tokens that others may still take; no promise that they do."""
        return sum(self._room(name) for name in self.creditors if name != but)

    def _room(self, name: str) -> int:
        if self.limits is None:
            return self._cache.max_len
        if name in self.called:
            return 0
        left = max(0, self.limits.get(name, 0) - self._num_lent[name])
        return left // self._part_tokens * self._part_tokens

    def pays(self, num_layers: int, num_running: int) -> bool:
        """Whether one more request in a step is worth the wait for the next creditor's answers.

        What is not measured yet is tried.
        """
        name = next((name for name in self.creditors if self._room(name)), None)
        if name is None:
            return False
        answer_s, step_s = self.creditors[name].answer_s, self.step_s
        if self._num_lent[name] or answer_s is None or step_s is None:
            return True
        return answer_s * num_layers * num_running < step_s

    def note_step(self, time_s: float) -> None:
        """A step took so long."""
        self._steps_s.append(time_s)

    @property
    def step_s(self) -> float | None:
        """What a step takes, by the median of the last ones; None before there was any."""
        return median(self._steps_s) if self._steps_s else None

    # -- there -------------------------------------------------------------------------------

    def lend(self, slot: Slot, position: int, num_tokens: int) -> list[Lent]:
        """Have others take the first rows of a slot, which are tokens `position …` of a sequence.

        Raises OutOfLoans, with nothing lent, if they have not got room for all.
        """
        lent = self._lend(lambda a, b: self._cache.spans(slot, a, b), position, num_tokens)
        _count(self.lent, len(lent), num_tokens, self._token_bytes)
        return lent

    def _lend(
        self,
        spans: Callable[[int, int], Spans],
        position: int,
        num_tokens: int,
        but: str | None = None,
    ) -> list[Lent]:
        lent: list[Lent] = []
        done = 0
        while done < num_tokens:
            one = self._lend_some(spans, position, done, num_tokens, but)
            if one is None:
                self.give_back(lent)
                names = ", ".join(self.creditors) or "none of those that lent"
                raise OutOfLoans(f"nobody takes {num_tokens} tokens in; asked were {names}")
            lent.append(one)
            done += one.stop - one.start
        return lent

    def _lend_some(
        self,
        spans: Callable[[int, int], Spans],
        position: int,
        start: int,
        stop: int,
        but: str | None,
    ) -> Lent | None:
        """Have a creditor take as many whole parts as any has room for; None if none has."""
        for end in range(stop, start, -self._part_tokens):
            for name, creditor in list(self.creditors.items()):
                if name == but or self._room(name) < end - start:
                    continue
                try:
                    loan = creditor.take(spans(start, end), position + start, end - start)
                except TransferError as error:
                    _log.warning("%s takes no more tokens in: %s", name, error)
                    self.creditors.pop(name, None)
                    continue
                if loan is None and end - start == self._part_tokens:
                    self._refused_s[name] = self._clock()
                elif loan is not None:
                    self._num_lent[name] += end - start
                    return Lent(name, loan, position + start, position + end)
        return None

    def give_back(self, lent: Iterable[Lent]) -> None:
        """They are not needed any more."""
        for one in lent:
            self._num_lent[one.holder] -= one.stop - one.start
            if not self._num_lent[one.holder]:
                del self._num_lent[one.holder]
            if one.holder in self.creditors:
                self.creditors[one.holder].give_back(one.loan)

    # -- and elsewhere -------------------------------------------------------------------------

    def settle(
        self, running: Sequence[Request], room_at_home: Callable[[Request], int]
    ) -> list[Request]:
        """Have loans leave from where they may not stay; of the youngest requests first.

        `room_at_home` says how many tokens more a request may have in its slot. Returns requests
        some of whose tokens have to leave, and find no room anywhere.
        """
        if not self._num_lent.total():
            return []
        stuck = []
        until_s = self._clock() + _BUDGET_S
        for request in running[::-1]:
            for one in request.all_lent[::-1]:
                if self._clock() > until_s:
                    return stuck
                is_wanted = one.holder in self.creditors and (
                    one.loan in self.creditors[one.holder].wanted
                )
                has_to = is_wanted or (one.holder in self.called and self._is_beyond(one.holder))
                if request.num_pending or not (has_to or self._may_leave(one.holder)):
                    continue
                if request.mending is not None and self._clock() < self._retry_at_s:
                    continue
                if self._move(request, one, room_at_home(request)):
                    self.num_called += has_to
                elif has_to and not (is_wanted and request.mending):  # which mends that as well
                    stuck.append(request)
                    break
                else:
                    self._retry_at_s = self._clock() + _RETRY_S
        return stuck

    def _is_beyond(self, name: str) -> bool:
        return self.limits is not None and self._num_lent[name] > self.limits.get(name, 0)

    def _may_leave(self, name: str) -> bool:
        """Whether something of a creditor is to leave when that is possible."""
        return self._is_beyond(name) and self._clock() >= self._retry_at_s

    def _move(self, request: Request, one: Lent, room_at_home: int) -> bool:
        num_tokens = one.stop - one.start
        if one.holder not in self.creditors:
            return False  # it is lost, as the next step will see
        if request.lent[-1:] == [one] and num_tokens <= room_at_home:
            try:
                self._take_home(request, one)
                return True
            except (Shortage, DriverError) as error:
                _log.debug("%s does not come home: %s", one, error)
            except TransferError as error:
                _log.warning("%s does not come home: %s", one, error)
                return False
        if self.limits is None or self.room(one.holder) < num_tokens:
            return False
        try:
            self._move_on(request, one)
        except (OutOfLoans, TransferError) as error:
            _log.warning("%s does not move on: %s", one, error)
            return False
        return True

    def _take_home(self, request: Request, one: Lent) -> None:
        """Have the last tokens that are elsewhere in the slot again.

        Raises a Shortage, DriverError or TransferError, with nothing changed.
        """
        slot, num_tokens = request.slot, one.stop - one.start
        assert slot is not None
        request.slot = put_before(
            self._cache,
            self._exits,
            slot,
            request.num_computed - request.slot_start,
            num_tokens,
            lambda spans: self.creditors[one.holder].fetch(spans, one.loan, 0, num_tokens),
        )
        request.lent.remove(one)
        self._exits.let_go(slot)
        self.give_back([one])
        _count(self.came_home, 1, num_tokens, self._token_bytes)

    def _move_on(self, request: Request, one: Lent) -> None:
        """Have others take tokens of another creditor, by way of this process.

        Raises OutOfLoans or a TransferError, with nothing changed.
        """
        creditor, most = self.creditors[one.holder], _STAGED_PARTS * self._part_tokens
        found: list[Lent] = []
        try:
            for start in range(one.start, one.stop, most):
                count = min(most, one.stop - start)
                staged = staging(self._cache, count)
                creditor.fetch(staged, one.loan, start - one.start, count)
                found += self._lend(
                    lambda a, b, staged=staged, count=count: part_of(staged, count, a, b),
                    start,
                    count,
                    one.holder,
                )
        except (OutOfLoans, TransferError):
            self.give_back(found)
            raise
        every = (request.lent, *(stretch.lent for stretch in request.behind))
        lent = next(some for some in every if one in some)
        place = lent.index(one)
        lent[place : place + 1] = found
        self.give_back([one])
        _count(self.moved_on, 1, one.stop - one.start, self._token_bytes)


def _count(stats: MoveStats, num_moves: int, num_tokens: int, token_bytes: int) -> None:
    stats.num_moves += num_moves
    stats.num_tokens += num_tokens
    stats.num_bytes += num_tokens * token_bytes
