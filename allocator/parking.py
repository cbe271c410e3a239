"""Which parked slot serves the next request best: a pure policy over token sequences."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .slot import Slot


@dataclass(frozen=True)
class PrefixMatch:
    """A parked slot whose first `num_tokens` tokens are those of a request."""

    slot: Slot
    num_tokens: int
    num_parked_tokens: int


class ParkingLot:
    """Finished slots, still mapped, each tagged with its tokens; oldest first."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[Slot, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, slot: object) -> bool:
        return slot in self._tokens

    def __iter__(self) -> Iterator[Slot]:
        """The slots, least recently parked first; the lot may change meanwhile."""
        return iter(list(self._tokens))

    def add(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Park `slot`, whose rows hold the KV of `tokens`, as the most recent."""
        self._tokens[slot] = np.asarray(tokens, dtype=np.int64)

    def remove(self, slot: Slot) -> None:
        """Take `slot` out."""
        del self._tokens[slot]

    def num_tokens(self, slot: Slot) -> int:
        """Tokens that `slot` is tagged with."""
        return len(self._tokens[slot])

    def shorten(self, slot: Slot, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of `slot`; its age stays."""
        self._tokens[slot] = self._tokens[slot][:num_tokens]

    def best_prefix(self, tokens: Sequence[int]) -> PrefixMatch | None:
        """The slot that shares the longest prefix with `tokens`; the most recent of equals."""
        wanted = np.asarray(tokens, dtype=np.int64)
        best: PrefixMatch | None = None
        for slot, parked in self._tokens.items():
            length = _common_prefix(wanted, parked)
            if length and (best is None or length >= best.num_tokens):
                best = PrefixMatch(slot, length, len(parked))
        return best

    def largest(self) -> Slot:
        """The slot with the most pages mapped; the least recent of equals."""
        return max(self._tokens, key=lambda slot: slot.num_pages)

    def oldest(self) -> Slot:
        """The slot parked least recently."""
        return next(iter(self._tokens))


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length
