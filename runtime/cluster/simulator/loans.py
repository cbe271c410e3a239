"""Tokens of one simulated instance's requests in another's memory.

Which of a request's tokens leave its slot, and when, the engine's own `Segments` say, over a cache
that counts; who may have how many at whom, the cluster's ledger. Here is what is between them: room
at a creditor, loans that are called, and what both sides' steps take longer for it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self, cast

import msgspec

from ....allocator import SlotCache
from ....allocator.transfer import Spans
from ....vmem.errors import InvalidConfig
from ...request.request import Request
from ...scheduling.scheduler import Scheduler
from ...scheduling.segments import Segments
from ..policies.ledger import Credit
from .costs import LoanCost
from .counting_cache import CountedSlot, CountingCache
from .pipeline import Items


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


class SegmentedCache(CountingCache):
    """A cache that counts, of which `Segments` can move tokens that are not there.

    Args:
        token_bytes: of a token's keys and values.
    """

    def __init__(self, capacity_tokens: int, *, token_bytes: int, **options: Any) -> None:
        super().__init__(capacity_tokens, **options)
        self.pool = _Pool(self.capacity_pages, _Driver())
        self.token_bytes = token_bytes

    @property
    def geometry(self) -> Self:
        """As of `SlotCache`: here it is enough that its `token_format` has `token_bytes`."""
        return self

    @property
    def token_format(self) -> Self:
        """As of `geometry`."""
        return self

    def spans(self, slot: CountedSlot, start: int, stop: int) -> Spans:
        """As of `SlotCache`: no bytes."""
        return []


class Lender:
    """What an instance has for others: a `Guest` of its scheduler.

    Args:
        spare_tokens: as of `LoanConfig`.
        on_change: called before room is taken, and after it is given back.
    """

    def __init__(
        self, cache: CountingCache, spare_tokens: int, on_change: Callable[[], None]
    ) -> None:
        self._cache = cache
        self._spare_tokens = spare_tokens
        self._on_change = on_change
        self._numbers = itertools.count(1)
        self._loans: dict[int, tuple[CountedSlot, Account]] = {}
        self.num_tokens = 0  # of all

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

    def give_back(self, number: int) -> int:
        """End a loan; returns its tokens. Without effect, and 0, on one that has ended."""
        slot, _ = self._loans.pop(number, (None, None))
        if slot is None:
            return 0
        num_tokens = slot.num_tokens
        self._cache.close(slot)
        self.num_tokens -= num_tokens
        self._on_change()
        return num_tokens

    def give_way(self) -> bool:
        """As of `Guest`: memory is short here, so the newest loan ends, and with it the place of
        the request that it is of."""
        if not self._loans:
            return False
        number = max(self._loans)
        _, account = self._loans[number]
        account.lost(number)
        return True

    def forget(self) -> None:
        """As of `Guest`: no model changes here."""


class Account:
    """What a debtor has at a creditor: a `Creditor` of its `Segments`.

    Args:
        on_lost: called with a loan that is to end against the debtor's will.

    Attributes:
        limit_tokens: its credit.
        num_tokens: that are lent to it there.
    """

    def __init__(self, creditor: int, lender: Lender, on_lost: Callable[[int, int], None]) -> None:
        self.creditor = creditor
        self.name = str(creditor)
        self.limit_tokens = 0
        self.num_tokens = 0
        self._lender = lender
        self._on_lost = on_lost

    def take(self, spans: Spans, start: int, num_tokens: int) -> int | None:
        """As of `Creditor`: within the credit."""
        if self.num_tokens + num_tokens > self.limit_tokens:
            return None
        number = self._lender.take(self, num_tokens)
        self.num_tokens += num_tokens if number is not None else 0
        return number

    def give_back(self, loan: int) -> None:
        """As of `Creditor`."""
        self.num_tokens -= self._lender.give_back(loan)

    def lost(self, loan: int) -> None:
        """The creditor needs its memory."""
        self._on_lost(self.creditor, loan)
        self.give_back(loan)  # if nobody has yet


class NoLoans:
    """Of an instance that neither borrows nor lends: `Loans` that make no difference."""

    num_lent_here = 0
    max_lent_tokens = 0
    max_local_tokens = None

    def have_room(self, items: Items, num_steps: int) -> bool:
        """As of `Loans`."""
        return True

    def step_s(self, items: Items, counts: Mapping[Request, int] | None = None) -> float:
        """As of `Loans`."""
        return 0.0


class Loans:
    """What one instance borrows and lends.

    Args:
        context_s: what a step takes for a token that it attends to.
        on_change: called before something changes here that was not the instance's own doing.

    Attributes:
        lender: what it has for others.
        num_lost: loans that ended against its will.
    """

    def __init__(
        self,
        config: LoanConfig,
        cache: SegmentedCache,
        scheduler: Scheduler,
        context_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.config = config
        self.lender = Lender(cache, config.spare_tokens, on_change)
        self.accounts: dict[int, Account] = {}
        self.num_lost = 0
        self._cache = cache
        self._scheduler = scheduler
        self._context_s = context_s
        self._on_change = on_change
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
        )
        tiers.guests.append(self.lender)

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
        part = self.config.part_tokens
        return max(0, self._cache.capacity_tokens - self.config.spare_tokens) // part * part

    def meet(self, creditor: int, lender: Lender) -> None:
        """Another instance may have tokens of this one's requests, once there is a credit."""
        account = Account(creditor, lender, self._lost)
        self.accounts[creditor] = self.segments.creditors[account.name] = account

    def part(self, creditor: int) -> None:
        """It is there no more, and has nothing."""
        account = self.accounts.pop(creditor)
        self.segments.creditors.pop(account.name, None)

    def take_credits(self, credits: Sequence[Credit]) -> bool:
        """What this instance may have where from now on, in the order in which it asks; what is
        called leaves. True if it may have more than before somewhere."""
        limits = {credit.creditor: credit.num_tokens for credit in credits}
        has_more = False
        for creditor, account in self.accounts.items():
            limit = limits.get(creditor, 0)
            has_more |= limit > account.limit_tokens
            account.limit_tokens = limit
        in_order = [*limits, *(creditor for creditor in self.accounts if creditor not in limits)]
        known = [self.accounts[creditor] for creditor in in_order if creditor in self.accounts]
        self.segments.creditors = {account.name: account for account in known}
        for credit in credits:
            if credit.is_called and credit.creditor in self.accounts:
                self._leave(self.accounts[credit.creditor])
        return has_more

    def give_up(self) -> None:
        """Have requests that are longer than the memory computed again, so that others go on."""
        for request in self._scheduler.running[::-1]:
            if request.lent or self.segments.is_long(request):
                self._on_change()
                self._scheduler.preempt(request)

    def _leave(self, account: Account) -> None:
        """Have what is beyond a credit elsewhere; where nobody has room, its request is computed
        again. The newest loans go first."""
        while account.num_tokens > account.limit_tokens:
            loans = [
                (one.loan, place, request)
                for request in self._scheduler.running
                for place, one in enumerate(request.lent)
                if one.holder == account.name
            ]
            _, place, request = max(loans, key=lambda found: found[0])
            self._on_change()
            if not self._forward(request, place):
                self.num_lost += 1
                self._scheduler.preempt(request)

    def _forward(self, request: Request, place: int) -> bool:
        """Move one of a request's loans to another creditor; False if none has room."""
        one = request.lent[place]
        for account in self.accounts.values():
            if account.name == one.holder:
                continue
            loan = account.take([], one.start, one.stop - one.start)
            if loan is not None:
                request.lent[place] = one._replace(holder=account.name, loan=loan)
                self.segments.lent.num_tokens += one.stop - one.start
                self.segments.creditors[one.holder].give_back(one.loan)
                return True
        return False

    # -- steps -------------------------------------------------------------------------------

    def have_room(self, items: Items, num_steps: int) -> bool:
        """Whether nothing has to go elsewhere in so many steps of decodes, the first of which is
        scheduled."""
        return all(
            end + num_steps - 1 - request.slot_start <= self.segments.local_tokens
            for request, end in items
            if request.is_spread or self.segments.is_long(request)
        )

    def step_s(self, items: Items, counts: Mapping[Request, int] | None = None) -> float:
        """What a step takes longer: its creditors are asked, what it moved to them is copied, and
        this instance attends for debtors.

        `counts` are tokens of each request in the step; None for one each.
        """
        num_queries, holders = 0, set[str]()
        for request, _ in items:
            if request.lent:
                num_queries += len(request.lent) * (counts[request] if counts is not None else 1)
                holders.update(one.holder for one in request.lent)
        moved = self.segments.lent.num_tokens - self._num_charged
        self._num_charged += moved
        moving_s = moved * self.config.token_bytes / self.config.cost.move_bytes_per_s
        attending_s = self._context_s * self.lender.num_tokens
        return self.config.cost.asking_s(len(holders), num_queries) + moving_s + attending_s

    # -- ends --------------------------------------------------------------------------------

    def _lost(self, creditor: int, loan: int) -> None:
        """The request that it is of is computed again."""
        self._on_change()
        self.num_lost += 1
        name = str(creditor)
        for request in self._scheduler.running[::-1]:
            if any((one.holder, one.loan) == (name, loan) for one in request.lent):
                self._scheduler.preempt(request)
