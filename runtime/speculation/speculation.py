"""How many tokens to guess: as many as proved right, while there is room."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from ...allocator import SlotCache
from ...vmem.errors import DriverError, Shortage
from ..request.request import Request, ScheduledRequest
from .drafter import Drafter

_FIRST = 4  # tokens of a request's first guess
_MOST_SKIPPED = 5  # as a power of two: steps that a request that is guessed wrong sits out


@dataclass
class _Pace:
    """How well a request can be guessed.

    Attributes:
        length: tokens to guess next.
        num_missed: guesses in a row of which no token was right.
        num_skipped: steps to sit out still.
    """

    length: int = _FIRST
    num_missed: int = 0
    num_skipped: int = 0


class Speculation:
    """Adds guesses to the decodes of a step.

    Each request's guesses double in length while they are right. Where nothing is, they get rare.
    All of a step's share `max_rows`: the more requests decode, the less is guessed, since a step
    costs the less for a further token the fewer it has.

    Args:
        drafter: guesses.
        max_tokens: tokens of a guess.
        max_rows: tokens that a step may sample or verify.

    Attributes:
        num_drafted, num_accepted: tokens that were guessed, and those among them that came.
    """

    def __init__(self, drafter: Drafter, *, max_tokens: int, max_rows: int) -> None:
        self.drafter = drafter
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.num_drafted = self.num_accepted = 0
        self._paces: WeakKeyDictionary[Request, _Pace] = WeakKeyDictionary()

    def extend(
        self, items: Sequence[ScheduledRequest], cache: SlotCache, max_batch_tokens: int
    ) -> list[ScheduledRequest]:
        """A step's items with guesses behind those that decode, and memory behind the guesses.

        They take what nobody else wants: tokens that the step has left, memory that is free.
        """
        budget = max_batch_tokens - sum(item.num_tokens for item in items)
        return [
            item if not item.draft or _is_backed(cache, item) else replace(item, draft=())
            for item in self.drafted(items, budget)
        ]

    def drafted(self, items: Sequence[ScheduledRequest], budget: int) -> list[ScheduledRequest]:
        """The items with guesses of `budget` tokens together, nothing behind them yet."""
        room = min(budget, self.max_rows - sum(item.samples for item in items))
        decoding = [item for item in items if _decodes(item)]
        wanted: dict[Request, int] = {}
        for left, item in zip(range(len(decoding), 0, -1), decoding, strict=True):
            num_tokens = min(self._length(item.request), room // left)
            if num_tokens > 0:
                wanted[item.request] = num_tokens
                room -= num_tokens
        drafts = self.drafter.draft(wanted) if wanted else {}
        return [
            replace(item, draft=tuple(draft)) if (draft := drafts.get(item.request)) else item
            for item in items
        ]

    def note_step(
        self, items: Sequence[ScheduledRequest], num_tokens: Mapping[Request, int]
    ) -> None:
        """Note how much of each draft was right, and so lies in its slot.

        `num_tokens` are those that each request got: one more than guesses of it were right.
        """
        for item in items:
            if item.draft:
                num_accepted = num_tokens[item.request] - 1
                item.request.num_computed += num_accepted
                self.note(item, num_accepted)

    def note(self, item: ScheduledRequest, num_accepted: int) -> None:
        """So many of an item's guesses were right."""
        self.num_drafted += len(item.draft)
        self.num_accepted += num_accepted
        pace = self._paces[item.request]
        if num_accepted == len(item.draft):
            pace.length = min(2 * pace.length, self.max_tokens)
        else:
            pace.length = num_accepted + 1
        pace.num_missed = 0 if num_accepted else pace.num_missed + 1
        pace.num_skipped = 2 ** min(pace.num_missed, _MOST_SKIPPED) - 1

    def _length(self, request: Request) -> int:
        """Tokens to guess of a request; 0 for one that cannot have more, or sits out."""
        pace = self._paces.setdefault(request, _Pace())
        if pace.num_skipped:
            pace.num_skipped -= 1
            return 0
        left = request.max_tokens - request.num_output_tokens - 1  # the last is never guessed
        return max(0, min(pace.length, self.max_tokens, left))


def _decodes(item: ScheduledRequest) -> bool:
    request = item.request
    is_decode = request.num_output_tokens > 0 and item.num_tokens == 1
    return is_decode and not request.num_pending and not request.is_spread


def _is_backed(cache: SlotCache, item: ScheduledRequest) -> bool:
    """Back an item's draft; False where there is no memory to spare."""
    slot = item.request.slot
    assert slot is not None, item
    if item.stop > slot.ready_tokens and not cache.pool.num_available:
        return False
    try:
        cache.grow(slot, item.stop)
    except (Shortage, DriverError):
        return False
    return True
