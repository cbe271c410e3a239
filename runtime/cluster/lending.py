"""What instances lend each other: the ledger is asked, and they are told."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import msgspec

from ...vmem.errors import VkvError
from ..engine.admission import Admission
from ..engine.memory.lending import CreditLine, LendingOrder
from ..engine.memory.memory_map import MemoryMap
from ..engine.stats import Borrowed
from ..request.sampling_params import SamplingParams
from .members import Members
from .policies import Ledger, Settlement
from .snapshot import ClusterSnapshot
from .stats import LoanStats, Member, holder_name, instance_of

_SHUN_S = 60.0  # for which nobody borrows from one that was slow
_MISS_S = 5.0  # and from one that was lost, or could not be reached: who is dead is known by then,
_SILENT_S = 2.0  # or else has answered nothing for so long: it may be stopped, and is not asked

Pair = tuple[int, int]
"""A debtor and a creditor."""

_log = logging.getLogger(__name__)


class LendingDesk:
    """Tells instances what they may borrow, whenever that changes. Of one event loop.

    Args:
        members: the instances.
        ledger: decides; None for one as it is by default.

    Attributes:
        ledger: as given.
    """

    def __init__(self, members: Members, ledger: Ledger | None = None) -> None:
        self.ledger = ledger or Ledger()
        self._members = members
        self._shunned: dict[Pair, float] = {}  # until when, on the monotonic clock
        self._told: dict[int, LendingOrder] = {}
        self._obeyed: dict[int, LendingOrder] = {}  # what they have said that they have heard
        self._settlement = Settlement()

    def settle(self, snapshot: ClusterSnapshot) -> None:
        """Ask the ledger, and send what is new."""
        lenders = {m.id: m for m in self._members.now() if m.lending is not None and m.lends_at}
        if not lenders:
            return
        now_s = time.monotonic()
        self._shunned = {
            pair: until
            for pair, until in self._shunned.items()
            if until > now_s or self._is_silent(pair[1])
        }
        self._shun_lost(lenders, now_s)
        shunned = frozenset(self._shunned)
        found = self.ledger.settle(msgspec.structs.replace(snapshot, shunned=shunned))
        for pair in found.slow:
            _log.warning("instance %d answers %d slowly, and is not asked for a while", *pair[::-1])
            self._shunned[pair] = now_s + _SHUN_S
        self._settlement = found
        for debtor in lenders.values():
            self._tell(debtor, self._order(debtor, lenders, found))
        for gone in self._told.keys() - lenders.keys():
            del self._told[gone]
            self._obeyed.pop(gone, None)

    def stats(self) -> tuple[LoanStats, ...]:
        """Who has what where, and may have. From any thread."""
        credits = {(c.debtor, c.creditor): c.num_tokens for c in self._settlement.credits}
        loans = {(loan.debtor, loan.creditor): loan for loan in self._members.loans()}
        borrowed = _borrowed(self._members.now())
        return tuple(
            LoanStats(
                debtor=pair[0],
                creditor=pair[1],
                num_loans=borrowed[pair].num_loans if pair in borrowed else 0,
                num_tokens=loans[pair].num_tokens if pair in loans else 0,
                bytes_a_step=_bytes_a_step(borrowed[pair]) if pair in borrowed else 0.0,
                credit_tokens=credits.get(pair, 0),
                answer_s=loans[pair].answer_s if pair in loans else None,
                is_shunned=pair in self._shunned,
            )
            for pair in sorted(loans.keys() | credits.keys() | borrowed.keys())
        )

    def has_loans(self, creditor: int) -> bool:
        """Whether an instance has, or may be about to get, tokens of others' requests."""
        if any(loan.creditor == creditor for loan in self._members.loans()):
            return True
        lines = (line for order in self._obeyed.values() for line in order.lines)
        name = holder_name(creditor)
        return any(line.creditor == name and line.num_tokens for line in lines)

    def _is_silent(self, instance: int) -> bool:
        link = self._members.link(instance)
        return link is not None and link.silent_s > _SILENT_S

    def _shun_lost(self, lenders: dict[int, Member], now_s: float) -> None:
        """Have nobody borrow from whom somebody has lost, or did not reach."""
        for debtor in lenders.values():
            assert debtor.lending is not None
            for name in debtor.lending.unreachable:
                creditor = self._members.named(name)
                if creditor is not None:
                    pairs = ((one, creditor) for one in lenders if one != creditor)
                    self._shunned |= {
                        pair: now_s + _MISS_S for pair in pairs if pair not in self._shunned
                    }

    def _order(self, debtor: Member, lenders: dict[int, Member], found: Settlement) -> LendingOrder:
        lines = []
        for credit in found.credits:
            creditor = lenders.get(credit.creditor)
            if credit.debtor == debtor.id and creditor is not None and creditor.lends_at:
                name, address = creditor.name, creditor.lends_at.told()
                lines.append(CreditLine(name, address, credit.num_tokens, credit.is_called))
        longest = longest_with(debtor, [one for one in lenders.values() if one is not debtor])
        gives_up = debtor.id in found.give_up
        return LendingOrder(longest=longest, lines=tuple(lines), gives_up=gives_up)

    def _tell(self, debtor: Member, order: LendingOrder) -> None:
        before, link = self._told.get(debtor.id), self._members.link(debtor.id)
        debtor.longest = order.longest
        if link is None or before == order:
            return
        self._told[debtor.id] = order
        answer = link.ask("lending", msgspec.json.encode(order).decode())
        answer.add_done_callback(lambda future: self._answered(debtor, order, future))

    def _answered(
        self, debtor: Member, order: LendingOrder, future: "asyncio.Future[int | MemoryMap | None]"
    ) -> None:
        if future.cancelled():
            return
        try:
            future.result()
            self._obeyed[debtor.id] = order
        except VkvError as error:  # it is gone, or refuses; it is told again
            _log.warning("instance %d was not told what it may borrow: %s", debtor.id, error)
            self._told.pop(debtor.id, None)


def _borrowed(members: Iterable[Member]) -> dict[Pair, Borrowed]:
    """What debtors said of each creditor, those included that have nothing now."""
    return {
        (member.id, creditor): one
        for member in members
        if member.stats is not None and member.stats.segments is not None
        for one in member.stats.segments.borrowed
        if (creditor := instance_of(one.holder)) is not None
    }


def _bytes_a_step(borrowed: Borrowed) -> float:
    return (borrowed.sent_bytes + borrowed.received_bytes) / max(1, borrowed.num_steps)


@dataclass(frozen=True, kw_only=True)
class LentAdmission(Admission):
    """What a cluster takes while instances that lend come and go.

    Attributes:
        now: what it takes now.
    """

    now: Callable[[], Admission]

    def check(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        max_tokens: int | None = None,
        was_let_in: bool = False,
    ) -> int:
        """As `Admission.check`, by what there is now."""
        return self.now().check(prompt, params, max_tokens=max_tokens, was_let_in=was_let_in)

    @classmethod
    def of(cls, now: Callable[[], Admission]) -> Self:
        """What `now` says, today and later."""
        today = now()
        return cls(**{one.name: getattr(today, one.name) for one in fields(Admission)}, now=now)


def admission_of(members: Sequence[Member]) -> Admission:
    """What each of a cluster's instances takes. One has arrived at least."""
    there = [m for m in members if m.face is not None]
    able = [m for m in there if not m.is_draining] or there
    assert able[0].face is not None
    admission = able[0].face.admission
    if any(m.lending is None for m in able):
        return admission
    longest = min(longest_with(m, [one for one in able if one is not m]) for m in able)
    longest = min(longest, admission.max_len - 1)
    if longest <= admission.longest:
        return admission
    return replace(admission, longest=longest, why_not_longer=None)


def longest_of(members: Sequence[Member]) -> int:
    """Tokens of the longest request that some instances take, together or one of them."""
    return max(
        (
            one.face.admission.longest
            if one.lending is None
            else longest_with(one, [m for m in members if m is not one])
            for one in members
            if one.face is not None
        ),
        default=0,
    )


def longest_with(debtor: Member, others: Sequence[Member]) -> int:
    """Tokens of the longest request that an instance takes, with what others may lend it."""
    assert debtor.lending is not None
    able = [m.lending for m in others if m.lending is not None and not m.is_draining]
    lent = sum(one.max_lent_tokens for one in able)
    alone = debtor.lending.longest_alone
    if debtor.role != "both":
        return alone
    return max(alone, debtor.lending.max_local_tokens + lent) if lent else alone
