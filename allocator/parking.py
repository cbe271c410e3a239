"""Which parked slot serves the next request best: a comparison of token sequences alone."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .slot import Slot


@dataclass(frozen=True)
class PrefixMatch:
    """A parked slot whose first `num_tokens` tokens are those of a request."""

    slot: Slot
    num_tokens: int
    num_parked_tokens: int


@dataclass(frozen=True)
class _Tag:
    """What a parked slot's KV was computed from: int64 tokens, and a variant."""

    tokens: np.ndarray
    variant: str


class ParkingLot:
    """Finished slots, still mapped, each tagged with its tokens and their variant; oldest first.

    A *variant* names what else the KV depends on, or who may read it: an adapter, a tenant's salt.
    Tokens of one variant are never found under another.
    """

    def __init__(self) -> None:
        self._tags: OrderedDict[Slot, _Tag] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tags)

    def __contains__(self, slot: object) -> bool:
        return slot in self._tags

    def __iter__(self) -> Iterator[Slot]:
        """The slots, least recently parked first; the lot may change meanwhile."""
        return iter(list(self._tags))

    def add(self, slot: Slot, tokens: Sequence[int], variant: str = "") -> None:
        """Park `slot`, which holds the KV of `tokens`, as the most recent."""
        self._tags[slot] = _Tag(np.asarray(tokens, dtype=np.int64), variant)

    def remove(self, slot: Slot) -> None:
        """Take `slot` out."""
        del self._tags[slot]

    def num_tokens(self, slot: Slot) -> int:
        """Tokens that `slot` is tagged with."""
        return len(self._tags[slot].tokens)

    def shorten(self, slot: Slot, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of `slot`; its age stays."""
        tag = self._tags[slot]
        self._tags[slot] = replace(tag, tokens=tag.tokens[:num_tokens])

    def touch(self, slot: Slot) -> None:
        """Make `slot` the most recent."""
        self._tags.move_to_end(slot)

    def best_prefix(self, tokens: Sequence[int], variant: str = "") -> PrefixMatch | None:
        """The slot that shares the longest prefix with `tokens`; the most recent of equals.

        Only slots of the same variant count, and none whose pages are changing hands.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        best: PrefixMatch | None = None
        for slot, tag in self._tags.items():
            may_serve = tag.variant == variant and slot.loan is None
            length = common_prefix(wanted, tag.tokens) if may_serve else 0
            if length and (best is None or length >= best.num_tokens):
                best = PrefixMatch(slot, length, len(tag.tokens))
        return best

    def largest(self) -> Slot | None:
        """The slot with the most pages that are memory, of those not pinned; the least recent of
        equals."""
        loose = (slot for slot in self._tags if not slot.num_pins)
        return max(loose, key=lambda slot: slot.num_pages - sum(slot.file_pages), default=None)

    def oldest(self) -> Slot | None:
        """The slot parked least recently that is not pinned."""
        return next((slot for slot in self._tags if not slot.num_pins), None)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that two sequences, int64, have in common from the start."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length
