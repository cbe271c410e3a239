"""Tokens of one simulated instance's requests in another's memory.

Which of a request's tokens leave its slot, and when, the engine's own `Segments` say, over a cache
that counts; who may have how many at whom, the cluster's ledger. Here is what is between them: room
at a creditor, loans that are called, and what both sides' steps take longer for it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import msgspec

from ....allocator import SlotCache
from ....allocator.transfer import Spans
from ....vmem.errors import InvalidConfig
from ...request.request import Request
from ...scheduling.scheduler import Scheduler
from ...scheduling.segments import Segments
from ..policies.ledger import Credit
from .costs import DecodeRun, LoanCost
from .counting_cache import CountedSlot, CountingCache
from .pipeline import Items

_SPARED = 16  # an instance keeps one of so many parts of its memory for its own requests at least
_REMEMBERED = 64  # steps, of which the engine's loans take the median


class LoanConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How instances lend each other memory.

    Attributes:
        cost: of asking creditors.
        most_tokens: of the longest request that is taken.
        token_bytes: keys and values of a token.
        part_tokens: what is lent is a multiple of it.
        spare_tokens: room that a creditor keeps for its own requests.
        share: of its memory that an instance keeps of a request that may outgrow it, at most.
        wait_s: until a request fails that memory is too short for.
    """

    most_tokens: int
    cost: LoanCost = LoanCost()
    token_bytes: int = 0
    part_tokens: int = 512
    spare_tokens: int = 512
    share: float = 0.5
    wait_s: float = 5.0

    def __post_init__(self) -> None:
        if min(self.most_tokens, self.part_tokens) < 1 or not 0 < self.share <= 1:
            raise InvalidConfig(
                f"most_tokens {self.most_tokens}, part_tokens {self.part_tokens} and share "
                f"{self.share}: use a token at least, and a share above 0 and at most 1"
            )
        if self.spare_tokens < 0 or self.wait_s < 0:
            raise InvalidConfig(
                f"spare_tokens {self.spare_tokens} and wait_s {self.wait_s} are not negative"
            )


class _Fence:
    def wait(self) -> None:
        """Nothing runs."""


class _Driver:
    def record_fence(self) -> _Fence:
        return _Fence()


class _Pool(NamedTuple):
    limit_pages: int
    driver: _Driver


class _TokenFormat(NamedTuple):
    token_bytes: int
    widths: tuple[int, ...] = ()


class _Geometry(NamedTuple):
    token_format: _TokenFormat


class SegmentedCache(CountingCache):
    """A cache that counts, of which `Segments` can move tokens that are not there.

    Args:
        token_bytes: of a token's keys and values.
    """

    def __init__(self, capacity_tokens: int, *, token_bytes: int, **options: Any) -> None:
        super().__init__(capacity_tokens, **options)
        self.pool = _Pool(self.capacity_pages, _Driver())
        self.geometry = _Geometry(_TokenFormat(token_bytes))

    def spans(self, slot: CountedSlot, start: int, stop: int) -> Spans:
        """As of `SlotCache`: no bytes."""
        return []


class Lender:
    """What an instance has for others: a `Lender` of its scheduler's tiers.

    Owners are asked at once to take away what is called back, and the time that the runtime gives
    them for that is not waited for.

    Args:
        spare_tokens: as of `LoanConfig`.
        on_change: called before room is taken, and after it is given back.
    """

    is_leaving = False

    def __init__(
        self, cache: CountingCache, spare_tokens: int, on_change: Callable[[], None]
    ) -> None:
        self._cache = cache
        self._spare_tokens = spare_tokens
        self._on_change = on_change
        self._numbers = itertools.count(1)
        self._loans: dict[int, tuple[CountedSlot, Account]] = {}
        self.num_tokens = 0  # of all

    def has(self, number: int) -> bool:
        """Whether a loan has not ended."""
        return number in self._loans

    def take(self, account: "Account", num_tokens: int) -> int | None:
        """As of `Creditor`."""
        self._on_change()  # what was foreseen counted on this room
        cache = self._cache
        wanted = cache.num_pages(num_tokens) + cache.num_pages(self._spare_tokens)
        if wanted > cache.num_obtainable():
            return None
        slot = cache.open()
        cache.grow(slot, num_tokens)
        number = next(self._numbers)
        self._loans[number] = slot, account
        self.num_tokens += num_tokens
        return number

    def give_back(self, number: int) -> None:
        """End a loan."""
        slot, _ = self._loans.pop(number)
        self.num_tokens -= slot.num_tokens
        self._cache.close(slot)
        self._on_change()

    def give_way(self) -> bool:
        """As of `tiers.Lender`: the newest loan leaves."""
        if not self._loans:
            return False
        number = max(self._loans)
        self._loans[number][1].call_back(number)
        return True

    def forget(self) -> None:
        """As of `tiers.Lender`: no model changes here."""


class Account:
    """What a debtor has at a creditor: a `Creditor` of its engine's loans.

    Args:
        answer_s: as of `Creditor`.
        on_call: called with a loan that is to leave.
    """

    def __init__(
        self, creditor: int, lender: Lender, answer_s: float, on_call: Callable[[str, int], None]
    ) -> None:
        self.name = str(creditor)
        self.wanted: tuple[int, ...] = ()
        self.answer_s: float | None = answer_s
        self.num_steps = self.sent_bytes = self.received_bytes = 0  # nothing is sent
        self.waited_s = 0.0
        self.lender = lender
        self._on_call = on_call

    def take(self, spans: Spans, start: int, num_tokens: int) -> int | None:
        """As of `Creditor`."""
        return self.lender.take(self, num_tokens)

    def fetch(self, spans: Spans, loan: int, start: int, num_tokens: int) -> None:
        """As of `Creditor`: no bytes."""

    def give_back(self, loan: int) -> None:
        """As of `Creditor`."""
        self.lender.give_back(loan)

    def call_back(self, loan: int) -> None:
        """The creditor needs its memory."""
        self.wanted = (loan,)
        self._on_call(self.name, loan)
        self.wanted = ()


class NoLoans:
    """Of an instance that neither borrows nor lends: `Loans` that make no difference."""

    has_moved = may_lend = False
    num_lent_here = 0
    max_lent_tokens = 0
    max_local_tokens = None

    def have_room(self, items: Items, num_steps: int) -> bool:
        """As of `Loans`."""
        return True

    def step_s(self, items: Items, counts: Mapping[Request, int] | None = None) -> float:
        """As of `Loans`."""
        return 0.0

    def note_steps(self, run: DecodeRun, num_steps: int) -> None:
        """As of `Loans`."""


class Loans:
    """What one instance borrows and lends.

    Args:
        context_s: what a step takes for a token that it attends to.
        clock: the time now.
        on_change: called before something changes here that was not the instance's own doing.

    Attributes:
        segments: of the engine, which decide what leaves.
        lender: what it has for others.
        has_moved: the last step waits for what has moved, and those after it do not.
    """

    def __init__(
        self,
        config: LoanConfig,
        cache: SegmentedCache,
        scheduler: Scheduler,
        context_s: float,
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.config = config
        self.lender = Lender(cache, config.spare_tokens, on_change)
        self._cache = cache
        self._scheduler = scheduler
        self._context_s = context_s
        self._on_change = on_change
        self.has_moved = False
        self._is_settling = False
        self._num_charged = 0  # moved tokens that a step has waited for
        tiers, part = scheduler.tiers, config.part_tokens
        kept = int(cache.capacity_tokens * config.share) // part * part
        self.segments = tiers.segments = Segments(
            cast(SlotCache, cache),
            tiers.exits,
            tiers.kv_files,
            tier=None,
            make_way=lambda: False,
            part_tokens=part,
            local_tokens=max(part, kept),
            num_layers=1,  # an answer here is that of all layers together
            clock=clock,
        )
        tiers.lenders.append(self.lender)

    @property
    def num_lent_here(self) -> int:
        """Tokens that it holds for others."""
        return self.lender.num_tokens

    @property
    def max_local_tokens(self) -> int:
        """As of `InstanceSnapshot`."""
        return self.segments.local_tokens

    @property
    def max_lent_tokens(self) -> int:
        """The most that it may hold for others."""
        part, capacity = self.config.part_tokens, self._cache.capacity_tokens
        spare = max(self.config.spare_tokens, capacity // _SPARED)
        return max(0, capacity - spare) // part * part

    def meet(self, creditor: int, lender: Lender) -> None:
        """Another instance may have tokens of this one's requests, once there is a credit."""
        cost = self.config.cost
        answer_s = cost.holder_s + cost.byte_s * cost.query_bytes
        account = Account(creditor, lender, answer_s, self._call)
        self.segments.loans.creditors[account.name] = account

    def part(self, creditor: int) -> None:
        """It is there no more, and has nothing."""
        self.segments.loans.creditors.pop(str(creditor), None)

    def place(self, credits: Sequence[Credit], *, longest: int, gives_up: bool) -> bool:
        """What this instance may have where from now on, in the order in which it asks; requests
        of `longest` tokens may be there. True if that changes anything."""
        loans = self.segments.loans
        limits = {str(credit.creditor): credit.num_tokens for credit in credits}
        called = {str(credit.creditor) for credit in credits if credit.is_called}
        before = loans.limits, loans.called
        loans.place(
            limits,
            called,
            has_lenders=longest > self._cache.capacity_tokens,
            has_to_give_up=gives_up,
        )
        self._is_settling = gives_up or self._is_beyond()
        return before != (limits, called) or gives_up

    @property
    def may_lend(self) -> bool:
        """Whether others would take tokens in now, so that one that waits may run."""
        return self.segments.loans.room() > 0

    def _is_beyond(self) -> bool:
        loans = self.segments.loans
        limits = loans.limits or {}
        return any(loans.num_lent(name) > limits.get(name, 0) for name in loans.creditors)

    # -- steps -------------------------------------------------------------------------------

    def have_room(self, items: Items, num_steps: int) -> bool:
        """Whether nothing has to move in so many steps of decodes, the first of which is
        scheduled."""
        if self._is_settling:
            return False
        return all(
            end + num_steps - 1 - request.slot_start <= self.segments.local_tokens
            for request, end in items
            if self.segments.is_long(request)
        )

    def step_s(self, items: Items, counts: Mapping[Request, int] | None = None) -> float:
        """What a step takes longer: its creditors are asked, what has moved is copied, and this
        instance attends for debtors.

        `counts` are tokens of each request in a step that the scheduler gave; None for one each.
        """
        if counts is not None:  # the scheduler was asked, and what had to leave has left
            self._is_settling = self._is_settling and self._is_beyond()
        num_queries, holders = 0, set[str]()
        for request, _ in items:
            if request.lent:
                num_queries += len(request.lent) * (counts[request] if counts is not None else 1)
                holders.update(one.holder for one in request.lent)
        loans, cost = self.segments.loans, self.config.cost
        every = (loans.lent, loans.moved_on, loans.came_home)
        moved = sum(stats.num_tokens for stats in every) - self._num_charged
        self._num_charged += moved
        self.has_moved = moved > 0
        moving_s = moved * self.config.token_bytes / cost.move_bytes_per_s
        attending_s = self._context_s * self.lender.num_tokens
        return cost.asking_s(len(holders), num_queries) + moving_s + attending_s

    def note_steps(self, run: DecodeRun, num_steps: int) -> None:
        """Steps are over."""
        for number in range(max(0, num_steps - _REMEMBERED), num_steps):
            self.segments.loans.note_step(run.first_s + run.more_s * number)

    # -- ends --------------------------------------------------------------------------------

    def _call(self, creditor: str, loan: int) -> None:
        """A loan is to leave: for elsewhere, or with its request's place."""
        self._on_change()
        running = self._scheduler.running
        for request in self.segments.recall(running):
            self._scheduler.preempt(request)
        owners = [
            request
            for request in running
            if any((one.holder, one.loan) == (creditor, loan) for one in request.lent)
        ]
        for request in owners:
            self.segments.loans.num_lost += 1
            self._scheduler.preempt(request)
