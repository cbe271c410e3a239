"""Guesses from what a request's own tokens say: text that quotes, code that is edited.

Source: prompt lookup decoding (A. Saxena, 2023), in the words of LZ77: the text goes on as it did
where its last tokens came before.
"""

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

from ..request.request import Request
from .drafter import Drafter

_LEAST = 3  # tokens that must have come before; two come again by chance too often
_MOST_COMPARED = 64  # tokens that places are compared by
_MOST_PLACES = 8  # that are looked at, the latest first
_MOST_READ = 8192  # tokens taken in at a time, lest a long prompt hold up a step: some 25 ms
_TOKEN_BITS = 21


class PromptLookup(Drafter):
    """Guesses what followed where a request's last tokens came before.

    Of several such places it takes the one that most tokens agree with, the latest of equals.
    """

    kind = "ngram"

    def __init__(self) -> None:
        self._places: WeakKeyDictionary[Request, _Places] = WeakKeyDictionary()

    def draft(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        """As of `Drafter`."""
        return {request: self._draft(request, num) for request, num in wanted.items()}

    def close(self) -> None:
        """As of `Drafter`."""
        self._places.clear()

    def _draft(self, request: Request, num_tokens: int) -> list[int]:
        places = self._places.get(request)
        if places is None:
            places = self._places[request] = _Places()
        tokens = request.token_ids
        if not places.read(tokens) or (after := places.best(tokens)) is None:
            return []
        drafted: list[int] = []
        for index in range(after, after + num_tokens):  # which may run into what it guesses itself
            behind = index - len(tokens)
            drafted.append(tokens[index] if behind < 0 else drafted[behind])
        return drafted


class _Places:
    """Where each run of `_LEAST` tokens came last, and where before that."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # from a run to where the token behind it is
        self._before: list[int] = []  # from a place to the one before with the same run; -1

    def read(self, tokens: Sequence[int]) -> bool:
        """Take in tokens that have come since, at most `_MOST_READ`; whether those were all."""
        if not self._before:
            self._before = [-1] * min(_LEAST, len(tokens))
        first = len(self._before)
        for end in range(first, min(first + _MOST_READ, len(tokens) + 1)):
            if end < _LEAST:
                self._before.append(-1)
                continue
            run = _packed(tokens, end)
            self._before.append(self._last.get(run, -1))
            self._last[run] = end
        return len(self._before) == len(tokens) + 1

    def best(self, tokens: Sequence[int]) -> int | None:
        """Where the token is that followed the longest equal run; None if there is none."""
        end = len(tokens)
        place = self._before[end]
        best, longest = None, 0
        for _ in range(_MOST_PLACES):
            if place < 0:
                break
            length = _num_equal(tokens, place, end)
            if length > longest:
                best, longest = place, length
            place = self._before[place]
        return best


def _packed(tokens: Sequence[int], end: int) -> int:
    packed = 0
    for token in tokens[end - _LEAST : end]:
        packed = packed << _TOKEN_BITS | token
    return packed


def _num_equal(tokens: Sequence[int], place: int, end: int) -> int:
    """Tokens before `place` that are those before `end`, at most `_MOST_COMPARED`."""
    most = min(place, _MOST_COMPARED)
    return next((n for n in range(most) if tokens[place - 1 - n] != tokens[end - 1 - n]), most)
