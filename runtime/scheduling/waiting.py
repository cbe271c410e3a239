"""Requests without a slot, in the order in which they will get one."""

import bisect
import heapq
import itertools
from collections.abc import Iterator

from ..request.request import Request
from ..request.spec import SequenceKey

_RETURNED, _NEW = 0, 1  # those that lost a slot go before those that never had one
_MOST_GONE = 64  # entries of requests that have left; more, beside as many again, are swept out


class WaitingQueue:
    """First come, first served; those that lost their slots come before, the last to lose it first.

    Every operation costs the same with a hundred thousand requests as with a hundred, but for a
    logarithm. A request that waits for its leader's prompt is held back, out of line, until it is
    let in; it then stands where its arrival puts it.
    """

    def __init__(self) -> None:
        self._arrivals = itertools.count()
        self._returns = itertools.count(start=-1, step=-1)
        self._places: dict[Request, tuple[int, int]] = {}  # all that wait, by place in line
        # The first in line, sorted, then a heap of the others. One that has left stays in either,
        # with a place that is not its own any more.
        self._head: list[tuple[tuple[int, int], Request]] = []
        self._others: list[tuple[tuple[int, int], Request]] = []
        self._held: dict[SequenceKey, list[Request]] = {}  # by leader

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request: Request) -> bool:
        return request in self._places

    def __iter__(self) -> Iterator[Request]:
        """All of them, in order; those held back stand where they will."""
        return iter(sorted(self._places, key=self._places.__getitem__))

    def add(self, request: Request) -> None:
        """Queue a new request behind all others."""
        self._line_up(request, (_NEW, next(self._arrivals)))

    def hold(self, request: Request, leader: SequenceKey) -> None:
        """Queue a new request, but out of line until `let_in(leader)`."""
        self._places[request] = (_NEW, next(self._arrivals))
        self._held.setdefault(leader, []).append(request)

    def put_back(self, request: Request) -> None:
        """Queue a request that lost its slot, before all others."""
        self._line_up(request, (_RETURNED, next(self._returns)))

    def let_in(self, leader: SequenceKey) -> None:
        """Let those that wait for `leader` stand in line."""
        for request in self._held.pop(leader, ()):
            if request in self._places:
                self._line_up(request, self._places[request])

    def is_awaited(self, leader: SequenceKey) -> bool:
        """True if some wait for `leader`."""
        return leader in self._held

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

    def _line_up(self, request: Request, place: tuple[int, int]) -> None:
        self._places[request] = place
        if self._head and place < self._head[-1][0]:
            bisect.insort(self._head, (place, request), key=lambda entry: entry[0])
        else:
            heapq.heappush(self._others, (place, request))

    def _is_current(self, place: tuple[int, int], request: Request) -> bool:
        return self._places.get(request) == place
