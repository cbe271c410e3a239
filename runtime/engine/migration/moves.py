"""What the two ends of a move have in common: a name, a lease, and a memory of what has ended."""

import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

from ....allocator.transfer import TransferKey
from ...request.spec import SequenceKey

_MOST_ENDED = 4096  # whose end is remembered, for verbs that come late


class Move:
    """One attempt to move one sequence, at one of its ends.

    Attributes:
        key, epoch: name it.
    """

    def __init__(self, key: SequenceKey, epoch: int, lease_s: float | None = None) -> None:
        self.key = key
        self.epoch = epoch
        self._lease_s = lease_s
        self.renew()

    @property
    def transfer_key(self) -> TransferKey:
        """Its name among the transfers of a cache."""
        return TransferKey(f"{self.key[0]}/{self.key[1]}", self.epoch)

    def renew(self) -> None:
        """Begin the lease anew: who asked for the move has shown that it lives."""
        self._ends_s = None if self._lease_s is None else time.monotonic() + self._lease_s

    @property
    def is_late(self) -> bool:
        """True if its lease has run out."""
        return self._ends_s is not None and time.monotonic() > self._ends_s


AnyMove = TypeVar("AnyMove", bound=Move)


class Moves(Generic[AnyMove]):
    """The last attempt of each sequence: of those under way all, of those that ended many."""

    def __init__(self) -> None:
        self._known: OrderedDict[SequenceKey, AnyMove] = OrderedDict()
        self._under_way: dict[SequenceKey, AnyMove] = {}

    def __len__(self) -> int:
        """Those under way."""
        return len(self._under_way)

    def __iter__(self) -> Iterator[AnyMove]:
        """Those under way, of which some may end meanwhile."""
        return iter(list(self._under_way.values()))

    def get(self, key: SequenceKey) -> AnyMove | None:
        """The last attempt of a sequence, under way or ended; None if none is remembered."""
        return self._known.get(key)

    def note(self, move: AnyMove, *, is_under_way: bool) -> None:
        """Remember an attempt in place of the one before it, which has ended."""
        self._known[move.key] = move
        self._known.move_to_end(move.key)
        if is_under_way:
            self._under_way[move.key] = move
        if len(self._known) > _MOST_ENDED:
            for key in list(self._known)[: _MOST_ENDED // 2]:
                if key not in self._under_way:
                    del self._known[key]

    def ended(self, move: AnyMove) -> None:
        """One has ended. Ending twice is harmless."""
        if self._under_way.get(move.key) is move:
            del self._under_way[move.key]
