"""One limit on the memory of several caches."""

import re
import threading
import weakref
from typing import Protocol

from ..vmem import OwnedLock, ProcessOwner
from ..vmem.errors import InvalidConfig

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or a text such as "64MiB", "1.5 GB" or "2G" (binary). At least 1."""
    number: float = -1
    if isinstance(size, int) and not isinstance(size, bool):
        number = size
    elif isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        if match and match[2].upper() in _UNITS:
            number = float(match[1]) * _UNITS[match[2].upper()]
    if number < 1:
        raise InvalidConfig(
            f"{size!r} is not an amount of memory; use bytes or a text such as '64MiB' or '2GB'"
        )
    return int(number)


class Member(Protocol):
    """A cache under the limit, as the others see it."""

    def reclaimable_bytes(self) -> int:
        """What `give_up` could free."""
        ...

    def give_up(self, num_bytes: int) -> None:
        """Return about `num_bytes` that no live request needs, or all such, to the system."""
        ...


class MemoryLimit:
    """A limit that several caches keep together, each with pages of its own.

    Memory moves to where requests are: a cache that runs short has others give up what only
    finished requests hold. What live requests hold is never taken.

    The caches also share one lock, `lock`, which each holds while it changes its slots. Two that
    run short at the same time so cannot wait for each other. A forked child is refused
    (ForkedProcess).

    Args:
        num_bytes: the most bytes of pages that the caches may have together; or a text such as
            "4GiB". `resize` makes it less for a while.

    Example:
        >>> limit = MemoryLimit("4GiB")
        >>> pools = [PagePool(driver, limit) for driver in drivers]
    """

    def __init__(self, num_bytes: int | str) -> None:
        self.num_bytes = self._given_bytes = parse_bytes(num_bytes)
        self.lock = threading.RLock()
        owner = ProcessOwner("this memory limit")
        self._guard = OwnedLock(owner, self.lock)
        self._accounts = OwnedLock(owner)  # nothing else is locked while it is held
        self._taken = 0
        self._members: weakref.WeakSet[Member] = weakref.WeakSet()

    @property
    def taken_bytes(self) -> int:
        """Bytes that exist or are promised now."""
        return self._taken

    @property
    def room_bytes(self) -> int:
        """Bytes that could still be taken."""
        return self.num_bytes - self._taken

    def take(self, num_bytes: int) -> bool:
        """Take `num_bytes` if there is room for them, else nothing; negative gives back."""
        with self._accounts:
            if num_bytes > max(0, self.num_bytes - self._taken):  # beyond it after `resize`
                return False
            self._taken += num_bytes
            return True

    def resize(self, num_bytes: int | str | None = None) -> None:
        """Keep to less from now on; None for as much as there was at first.

        Members give up what only finished requests hold beyond it. What live requests hold stays
        theirs until they end or give way, and goes by the next `enforce`. Raises InvalidConfig for
        more than there was at first, which the members' caches are made for.
        """
        wanted = self._given_bytes if num_bytes is None else parse_bytes(num_bytes)
        if wanted > self._given_bytes:
            raise InvalidConfig(
                f"{wanted} bytes are more than the {self._given_bytes} that caches under this "
                "limit were made for; make the limit as large as it will ever be"
            )
        with self._guard:
            self.num_bytes = wanted
        self.enforce()

    def enforce(self) -> None:
        """Have members give up what is beyond the limit since it went down, and what they can by
        now; at once where nothing is."""
        if self.room_bytes >= 0:
            return
        with self._guard:
            for member in list(self._members):
                if self.room_bytes < 0:
                    member.give_up(-self.room_bytes)

    def join(self, member: Member) -> None:
        """Count `member`, held weakly, among those that give up memory for others."""
        with self._guard:
            self._members.add(member)

    def reclaimable_bytes(self, asker: Member) -> int:
        """What the others could give up for `asker`."""
        with self._guard:
            return sum(member.reclaimable_bytes() for member in self._others(asker))

    def make_room(self, asker: Member, num_bytes: int) -> None:
        """Have the others give up memory until `num_bytes` could be taken, as far as they can."""
        with self._guard:
            for member in self._others(asker):
                short = num_bytes - self.room_bytes
                if short > 0:
                    member.give_up(short)

    def _others(self, asker: Member) -> list[Member]:
        return [member for member in self._members if member is not asker]
