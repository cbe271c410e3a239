"""How requests without a slot are lined up, for each kind of order."""

import bisect
import heapq
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from ..request.request import Request
from .accounts import Account, Accounts
from .plan import Order

Place = tuple[int, int]
"""In order of arrival, but for those that lost a slot, which come before."""

_Entry = tuple[float, int, int, Account]
"""A tenant's counter, its number among equals, one of the entry, and whose it is."""

_MOST_GONE = 64  # entries of requests that have left; more, beside as many again, are swept out


class Lines(ABC):
    """Requests in line, of whom an order may choose the first."""

    def came(self, request: Request) -> None:  # noqa: B027 - nothing to do for most
        """A new request waits, in line or out of it."""

    def returned(self, request: Request) -> None:  # noqa: B027
        """A request that has lost its slot waits."""

    @abstractmethod
    def add(self, request: Request, place: Place) -> None:
        """One of those that wait stands in line."""

    def move(self, request: Request, place: Place) -> None:  # noqa: B027
        """The priority of one in line has changed."""

    @abstractmethod
    def left(self, request: Request, place: Place | None) -> None:
        """A request does not wait any more; `place` is where it stood, or None out of line."""

    @abstractmethod
    def first(self, num_free: int, num_running: int) -> list[Request]:
        """Of whom an order may choose: as of `Snapshot.waiting`."""


def lines_for(order: Order, accounts: Accounts) -> Lines:
    """Lines as an order wants them."""
    if order.lines == "priority":
        return PriorityLines(order.rank)
    if order.lines == "tenant":
        return TenantLines(accounts)
    return ArrivalLine()


class Line:
    """Requests by place, the least first. Each operation costs a logarithm of their number."""

    def __init__(self) -> None:
        self._numbers = itertools.count()  # so that no place is like one that was left
        self._places: dict[Request, tuple[Any, int]] = {}
        # The first in line, sorted, then a heap of the others. One that has left stays in either,
        # with a place that is not its own any more.
        self._head: list[tuple[tuple[Any, int], Request]] = []
        self._others: list[tuple[tuple[Any, int], Request]] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, request: Request, place: Any) -> None:
        """Have a request stand at a place, which no other has."""
        self._places[request] = numbered = (place, next(self._numbers))
        if self._head and numbered < self._head[-1][0]:
            bisect.insort(self._head, (numbered, request), key=lambda entry: entry[0])
        else:
            heapq.heappush(self._others, (numbered, request))

    def remove(self, request: Request) -> None:
        """Take a request out. Raises KeyError if it is not there."""
        del self._places[request]
        if len(self._others) > 2 * len(self._places) + _MOST_GONE:
            self._others = [entry for entry in self._others if self._is_current(*entry)]
            heapq.heapify(self._others)

    def first(self, count: int) -> list[Request]:
        """The first `count` in line, or all of them."""
        self._head = [entry for entry in self._head if self._is_current(*entry)]
        while len(self._head) < count and self._others:
            place, request = heapq.heappop(self._others)
            if self._is_current(place, request):
                self._head.append((place, request))
        return [request for _, request in self._head[:count]]

    def _is_current(self, place: tuple[Any, int], request: Request) -> bool:
        return self._places.get(request) == place


class ArrivalLine(Lines):
    """One line."""

    def __init__(self) -> None:
        self._line = Line()

    def add(self, request: Request, place: Place) -> None:
        self._line.add(request, place)

    def left(self, request: Request, place: Place | None) -> None:
        if place is not None:
            self._line.remove(request)

    def first(self, num_free: int, num_running: int) -> list[Request]:
        return self._line.first(max(1, num_free))


class PriorityLines(Lines):
    """One line by priority and age, and the same requests by their own priority alone.

    Places in line do not change with time, since all grow older alike. Who came first is the first
    of equals, one that lost its slot too.

    Args:
        rank: as of `Order`.
    """

    def __init__(self, rank: Callable[[int, float], float]) -> None:
        self._rank = rank
        self._by_rank = Line()
        self._by_priority = Line()

    def add(self, request: Request, place: Place) -> None:
        came_s = request.queued_time_s
        rank = self._rank(request.priority, -came_s)  # as if it were the clock's zero now
        self._by_rank.add(request, (rank, came_s, place))
        self._by_priority.add(request, (request.priority, came_s, place))

    def move(self, request: Request, place: Place) -> None:
        self.left(request, place)
        self.add(request, place)

    def left(self, request: Request, place: Place | None) -> None:
        if place is not None:
            self._by_rank.remove(request)
            self._by_priority.remove(request)

    def first(self, num_free: int, num_running: int) -> list[Request]:
        found = self._by_rank.first(max(1, num_free))
        if num_free <= 0:
            found += [r for r in self._by_priority.first(num_running) if r not in found]
        return found


class TenantLines(Lines):
    """A line for each tenant, and the tenants by their counters.

    A tenant that comes back to the line is lifted to the least counter of those that are in it, or
    if nobody is to that of the last who was: what it did not ask for meanwhile is not owed to it.
    """

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        accounts.on_lowered = self._lowered
        self._lines: dict[str, Line] = {}
        # Tenants with a line, by counters that were theirs: a counter grows, and is looked at again
        # when it is the least. One entry of a tenant is current, that of `_entries`.
        self._heap: list[_Entry] = []
        self._entries: dict[Account, _Entry] = {}
        self._numbers = itertools.count()
        self._last: Account | None = None  # whose line ended last

    def came(self, request: Request) -> None:
        account = self._accounts.of(request)
        if not account.num_waiting:
            least = self._least(1)
            behind = least[0] if least else self._last
            if behind is not None:
                account.counter = max(account.counter, behind.counter)
        account.num_waiting += 1

    def returned(self, request: Request) -> None:
        self._accounts.of(request).num_waiting += 1  # and is not lifted, since it was not idle

    def left(self, request: Request, place: Place | None) -> None:
        account = self._accounts.of(request)
        account.num_waiting -= 1
        if place is None:
            return
        line = self._lines[account.tenant]
        line.remove(request)
        account.num_in_line -= 1
        if not len(line):
            del self._lines[account.tenant], self._entries[account]
            self._last = account

    def add(self, request: Request, place: Place) -> None:
        account = self._accounts.of(request)
        line = self._lines.get(account.tenant)
        if line is None:
            line = self._lines[account.tenant] = Line()
            self._enter(account, next(self._numbers))
            self._sweep()
        line.add(request, place)
        account.num_in_line += 1

    def first(self, num_free: int, num_running: int) -> list[Request]:
        """A few of each of the tenants with the least counters: the more, the less it got. Where
        none is free, one of as many as run: of them, those may take a place."""
        if num_free <= 0:
            least = self._least(max(1, num_running))
            return [self._lines[account.tenant].first(1)[0] for account in least]
        return [
            request
            for rank, account in enumerate(self._least(num_free), start=1)
            for request in self._lines[account.tenant].first(max(1, num_free // rank))
        ]

    def _enter(self, account: Account, number: int) -> None:
        """Have a tenant stand by its counter; of equals, by `number`."""
        entry = (account.counter, number, next(self._numbers), account)
        self._entries[account] = entry
        heapq.heappush(self._heap, entry)

    def _lowered(self, account: Account) -> None:
        if account in self._entries:
            self._enter(account, self._entries[account][1])
            self._sweep()

    def _sweep(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + _MOST_GONE:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def _least(self, count: int) -> list[Account]:
        """The tenants in line with the least counters, `count` at most."""
        found: list[_Entry] = []
        while self._heap and len(found) < count:
            entry = heapq.heappop(self._heap)
            counter, number, _, account = entry
            if self._entries.get(account) is not entry:
                continue
            if account.counter == counter:
                found.append(entry)
            else:
                self._enter(account, number)
        for entry in found:
            heapq.heappush(self._heap, entry)
        return [account for *_, account in found]
