"""Whose turn it is where others lend too little, or might lend more."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ....allocator import SlotCache
from ....vmem.errors import DriverError, OutOfLoans, Shortage
from ...request.request import Request
from ...request.spec import SequenceKey
from ..plan import Plan

if TYPE_CHECKING:
    from ..segments import Segments
    from ..tiers import Tiers


def able(
    plan: Plan, requests: Mapping[SequenceKey, Request], segments: "Segments | None"
) -> tuple[Plan, tuple[Request, OutOfLoans] | None]:
    """A plan in which nobody gives way in vain: without the first newcomer that others would have
    to lend to, nor those behind it. And who that is."""
    if segments is None or not plan.preempt:  # where nobody gives way, it is refused in its turn
        return plan, None
    for place, key in enumerate(plan.admit):
        try:
            segments.check_loans(requests[key])
        except OutOfLoans as refusal:
            return plan.of_first(place), (requests[key], refusal)
    return plan, None


def who_does_without(running: Sequence[Request], request: Request) -> Request | None:
    """Who does without what others lend, of which there is too little: of those that have tokens
    elsewhere the last admitted gives way, and the last itself stands aside for a step. None where
    it waits."""
    if request not in running:
        return None
    if request.mending is not None:  # others need not give way: all of it may be computed again
        return request
    later = running[running.index(request) + 1 :]
    return next((other for other in reversed(later) if other.is_spread), request)


def lend_out(
    cache: SlotCache,
    tiers: "Tiers",
    running: Sequence[Request],
    request: Request,
    granted: dict[Request, int],
    wanted_tokens: int,
) -> bool:
    """Have others take tokens in, so that a request gets memory. False if that cannot be."""
    chosen = tiers.lend_out(running, request, wanted_tokens)
    if chosen is None:
        return False
    if count := granted.get(chosen):  # its slot is another
        assert chosen.slot is not None
        try:
            cache.grow(chosen.slot, chosen.num_computed - chosen.slot_start + count)
        except (Shortage, DriverError):
            del granted[chosen]
    return True
