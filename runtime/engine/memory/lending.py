"""What an engine says of its loans, and what it is told to borrow."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from ...request.request import Request
from ...request.spec import SequenceKey
from .segments import PART_TOKENS, SPARE_TOKENS, longest_alone

if TYPE_CHECKING:
    from ...scheduling.scheduler import Scheduler
    from ...scheduling.segments import Segments
    from ..engine import Engine

_SPARED = 16  # an engine keeps one of so many parts of its memory for its own requests at least


class HeldLoan(msgspec.Struct, frozen=True):
    """What a creditor has of an engine's requests.

    Attributes:
        creditor: its name.
        answer_s: for how long an answer is waited for in a layer, by the median.
    """

    creditor: str
    num_tokens: int
    answer_s: float | None = None


class Lacking(msgspec.Struct, frozen=True):
    """A request that stands still until others take tokens of it in.

    Attributes:
        num_tokens: so many, beside those that they have.
    """

    key: SequenceKey
    num_tokens: int


class LendingReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine has with others.

    Attributes:
        longest_alone: tokens of the longest request that its own memory holds.
        max_local_tokens: the most that it has itself of one that may be longer.
        max_lent_tokens: the most that it may hold for others.
        layer_s: what a layer of its steps takes, by the median.
        loans: what others have of its requests.
        spread: those requests.
        unreachable: creditors that it might have tokens at, and did not reach, or lost.
        refusing: creditors that took nothing in a moment ago, though they were to have room.
        lacking: who stands still until others lend more.
        tier_tokens: tokens of requests longer than its memory that are in its own tier, and those
            that it has room for.
    """

    longest_alone: int
    max_local_tokens: int
    max_lent_tokens: int
    layer_s: float | None = None
    loans: tuple[HeldLoan, ...] = ()
    spread: tuple[SequenceKey, ...] = ()
    unreachable: tuple[str, ...] = ()
    refusing: tuple[str, ...] = ()
    lacking: Lacking | None = None
    tier_tokens: int = 0


class CreditLine(msgspec.Struct, frozen=True):
    """What an engine may have at a creditor.

    Attributes:
        creditor: its name.
        address: where it is, as of `Address.told`.
        num_tokens: the most that may be there.
        is_called: what is beyond that leaves at once.
    """

    creditor: str
    address: str
    num_tokens: int
    is_called: bool = False


class LendingOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine may have with others from now on; it takes the place of the order before.

    Attributes:
        longest: tokens of the longest request that is let in.
        lines: the first is asked first.
        gives_up: its requests that are longer than its memory give their slots up, now.
    """

    longest: int
    lines: tuple[CreditLine, ...] = ()
    gives_up: bool = False


def report_of(engine: "Engine", unreachable: tuple[str, ...] = ()) -> LendingReport | None:
    """What an engine has with others now; None if it can have nothing."""
    segments = engine.scheduler.tiers.segments
    if segments is None:
        return None
    loans, cache = segments.loans, engine.cache
    growth_tokens = cache.growth_tokens
    num_pages = cache.pool.limit_pages
    if (limit := cache.pool.shared_limit) is not None:  # which may be less than it was
        num_pages = min(num_pages, limit.num_bytes // cache.pool.driver.page_bytes)
    most = num_pages // cache.num_pages(growth_tokens) * growth_tokens
    spare = max(SPARE_TOKENS, most // _SPARED)
    step_s = loans.step_s
    return LendingReport(
        longest_alone=longest_alone(cache),
        max_local_tokens=segments.local_tokens,
        max_lent_tokens=max(0, most - spare) // PART_TOKENS * PART_TOKENS,
        layer_s=None if step_s is None else step_s / segments.num_layers,
        loans=tuple(
            HeldLoan(name, loans.num_lent(name), creditor.answer_s)
            for name, creditor in loans.creditors.items()
            if loans.num_lent(name)
        ),
        spread=tuple(r.key for r in engine.scheduler.running if r.is_spread),
        unreachable=unreachable,
        refusing=loans.refusing(),
        lacking=_lacking(engine.scheduler, segments),
        tier_tokens=_tier_tokens(segments, engine.scheduler.running),
    )


def _tier_tokens(segments: "Segments", running: Iterable[Request]) -> int:
    if segments.tier is None:
        return 0
    held = sum(request.segment.num_tokens for request in running if request.segment is not None)
    return held + segments.tier.room_tokens


def _lacking(scheduler: "Scheduler", segments: "Segments") -> Lacking | None:
    if scheduler.lacking is None:
        return None
    request, _ = scheduler.lacking
    return Lacking(request.key, segments.num_lacking(request))
