"""Guesses put behind what a step computes, while there is room."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ...allocator import SlotCache
from ...vmem.errors import DriverError, Shortage
from ..request.request import Request, ScheduledRequest
from .drafter import Drafter
from .luck import Luck
from .worth import StepTimes, Worth

_log = logging.getLogger(__name__)


class Pace(Protocol):
    """How many tokens to guess of a request."""

    def length(self, request: Request, num_decodes: int, num_unseen: int) -> int:
        """Tokens to guess next; 0 for none. `num_decodes` requests decode in this step, and whoever
        guesses has not seen `num_unseen` tokens of this one (`Drafter.num_unseen`)."""
        ...

    def note(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """So many of a request's guesses were right."""
        ...


@dataclass(frozen=True, kw_only=True)
class SpeculationStats:
    """What was guessed so far.

    Attributes:
        drafter: who guesses: "ngram", "draft" or "surrogate".
        num_drafts: guesses, each of several tokens.
        num_drafted, num_accepted: their tokens, and those among them that came.
        draft_time_s: that steps waited for guesses.
        kv_bytes: memory that exists for the keys and values of a model that guesses.
    """

    drafter: str
    num_drafts: int
    num_drafted: int
    num_accepted: int
    draft_time_s: float
    kv_bytes: int


class Speculation:
    """Adds guesses to the decodes of a step.

    All of a step's share `max_rows`: the more requests decode, the less is guessed, since a step
    costs the less for a further token the fewer it has. A drafter that raises is not asked again.

    Args:
        drafter: guesses.
        max_tokens: tokens of a guess.
        max_rows: tokens that a step may sample or verify.
        pace: how much is guessed; None for what suits the drafter.
        clock: seconds.

    Attributes:
        drafter, pace: as given.
        num_drafted, num_accepted: tokens that were guessed, and those among them that came.
    """

    def __init__(
        self,
        drafter: Drafter,
        *,
        max_tokens: int,
        max_rows: int,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.drafter = drafter
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.num_drafts = self.num_drafted = self.num_accepted = 0
        self.pace = pace or (Worth(max_tokens) if drafter.takes_time else Luck(max_tokens))
        self._clock = clock
        self._draft_time_s = 0.0
        self._draft_s = self._drafted_at_s = 0.0  # of this step
        self._has_failed = False

    def extend(
        self, items: Sequence[ScheduledRequest], cache: SlotCache, max_batch_tokens: int
    ) -> list[ScheduledRequest]:
        """A step's items with guesses behind those that decode, and memory behind the guesses.

        They take what nobody else wants: tokens that the step has left, memory that is free.
        """
        self.drafter.let_go()
        budget = max_batch_tokens - sum(item.num_tokens for item in items)
        before = cache if self.drafter.takes_time else None
        return [
            item if not item.draft or _back(cache, item, item.stop) else replace(item, draft=())
            for item in self.drafted(items, budget, before)
        ]

    def drafted(
        self, items: Sequence[ScheduledRequest], budget: int, cache: SlotCache | None = None
    ) -> list[ScheduledRequest]:
        """The items with guesses of `budget` tokens together.

        With a `cache` there is memory behind them before anything is guessed.
        """
        start_s = self._clock()
        self.drafter.num_caught_up = 0
        wanted = self._wanted(items, budget)
        if cache is not None:
            of = {item.request: item for item in items}
            wanted = {
                request: num
                for request, num in wanted.items()
                if _back(cache, of[request], of[request].stop + num)
            }
        drafts = self._ask(wanted) if wanted else {}
        self._drafted_at_s = self._clock()
        self._draft_s = self._drafted_at_s - start_s if wanted else 0.0
        self._draft_time_s += self._draft_s
        return [
            replace(item, draft=tuple(draft)) if (draft := drafts.get(item.request)) else item
            for item in items
        ]

    def note_step(
        self, items: Sequence[ScheduledRequest], num_tokens: Mapping[Request, int]
    ) -> None:
        """Note how much of each draft was right, and so lies in its slot.

        `num_tokens` are those that each request got: one more than guesses of it were right. The
        items have been computed, guesses aside.
        """
        lengths = [len(item.draft) for item in items]
        if isinstance(self.pace, Worth):
            num_decodes = sum(map(_decodes, items))
            times = StepTimes(
                num_decodes=num_decodes,
                is_plain_batch=num_decodes == len(items),
                num_drafted=sum(lengths),
                longest=max(lengths),
                num_caught_up=self.drafter.num_caught_up,
                draft_s=self._draft_s,
                step_s=self._clock() - self._drafted_at_s,
            )
            self.pace.note_step(times)
        for item in items:
            if item.draft:
                num_accepted = num_tokens[item.request] - 1
                item.request.num_computed += num_accepted
                self.note(item, num_accepted)

    def note(self, item: ScheduledRequest, num_accepted: int) -> None:
        """So many of an item's guesses were right."""
        self.num_drafts += 1
        self.num_drafted += len(item.draft)
        self.num_accepted += num_accepted
        self.pace.note(item.request, len(item.draft), num_accepted)

    def stats(self) -> SpeculationStats:
        """What was guessed so far."""
        return SpeculationStats(
            drafter=self.drafter.kind,
            num_drafts=self.num_drafts,
            num_drafted=self.num_drafted,
            num_accepted=self.num_accepted,
            draft_time_s=self._draft_time_s,
            kv_bytes=self.drafter.kv_bytes,
        )

    def _wanted(self, items: Sequence[ScheduledRequest], budget: int) -> dict[Request, int]:
        """How many tokens to guess of whom."""
        if self._has_failed:
            return {}
        room = min(budget, self.max_rows - sum(item.samples for item in items))
        # One that is computed again may have a single token of those that it has, and not the last.
        decoding = [item for item in items if item.samples and _decodes(item)]
        wanted: dict[Request, int] = {}
        for left, item in zip(range(len(decoding), 0, -1), decoding, strict=True):
            if not room // left:
                continue
            num_tokens = min(self._length(item.request, len(decoding)), room // left)
            if num_tokens > 0:
                wanted[item.request] = num_tokens
                room -= num_tokens
        return wanted

    def _length(self, request: Request, num_decodes: int) -> int:
        """Tokens to guess of a request; 0 for one that cannot have more, or sits out."""
        left = request.max_tokens - request.num_output_tokens - 1  # the last is never guessed
        if left <= 0:
            return 0
        return min(self.pace.length(request, num_decodes, self.drafter.num_unseen(request)), left)

    def _ask(self, wanted: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        try:
            return self.drafter.draft(wanted)
        except (Shortage, DriverError):
            return {}
        except Exception:  # noqa: BLE001 - no request depends on a guess
            _log.exception("nothing is guessed any more (speculative)")
            self._has_failed = True
            return {}


def _decodes(item: ScheduledRequest) -> bool:
    request = item.request
    is_decode = request.num_output_tokens > 0 and item.num_tokens == 1
    return is_decode and not request.num_pending and not request.is_spread


def _back(cache: SlotCache, item: ScheduledRequest, stop: int) -> bool:
    """Back the tokens of an item's slot before `stop`; False where there is no memory to spare."""
    slot = item.request.slot
    assert slot is not None, item
    if stop > slot.ready_tokens and cache.pool.num_available <= 0:
        return False
    try:
        cache.grow(slot, stop)
    except (Shortage, DriverError):
        return False
    return True
