"""How much to guess where a guess costs next to nothing: as much as was right."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ..request.request import Request

_FIRST = 4  # tokens of a request's first guess
_MOST_SKIPPED = 5  # as a power of two: steps that a request that is guessed wrong sits out


@dataclass
class _Run:
    """How well a request can be guessed.

    Attributes:
        length: tokens to guess next.
        num_missed: guesses in a row of which no token was right.
        num_skipped: steps to sit out still.
    """

    length: int = _FIRST
    num_missed: int = 0
    num_skipped: int = 0


class Luck:
    """Each request's guesses double in length while they are right. Where nothing is, they get
    rare."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._runs: WeakKeyDictionary[Request, _Run] = WeakKeyDictionary()

    def length(self, request: Request, num_decodes: int, num_unseen: int) -> int:
        """As of `Pace`."""
        run = self._runs.setdefault(request, _Run())
        if run.num_skipped:
            run.num_skipped -= 1
            return 0
        return min(run.length, self._max_tokens)

    def note(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """As of `Pace`."""
        run = self._runs[request]
        if num_accepted == num_drafted:
            run.length = min(2 * run.length, self._max_tokens)
        else:
            run.length = num_accepted + 1
        run.num_missed = 0 if num_accepted else run.num_missed + 1
        run.num_skipped = 2 ** min(run.num_missed, _MOST_SKIPPED) - 1
