"""Which ranges of addresses are reserved, and how much of each is backed."""

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Reservation:
    """A reserved range and how many of its pages are backed."""

    address: int
    size: int
    num_mapped: int = 0

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.size


class AddressSpace:
    """Reservations, none of which overlaps another. For one thread at a time."""

    def __init__(self) -> None:
        self._by_address: dict[int, Reservation] = {}
        self._starts: list[int] = []  # the keys of it, sorted

    def __iter__(self) -> Iterator[Reservation]:
        """All of them as they are now; some may be added or removed meanwhile."""
        return iter(list(self._by_address.values()))

    def add(self, address: int, size: int) -> None:
        """A range is reserved."""
        self._by_address[address] = Reservation(address, size)
        insort(self._starts, address)

    def remove(self, address: int) -> None:
        """The one that starts at `address` is given back."""
        del self._by_address[address]
        self._starts.remove(address)

    def at(self, address: int) -> Reservation | None:
        """The one that starts there."""
        return self._by_address.get(address)

    def around(self, address: int, size: int = 0) -> Reservation | None:
        """The one that `[address, address + size)` lies in."""
        index = bisect_right(self._starts, address)
        if not index:
            return None
        reservation = self._by_address[self._starts[index - 1]]
        return reservation if address + size <= reservation.end else None
