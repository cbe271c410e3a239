"""Requests without a slot, in the order in which they will get one."""

import itertools
from collections.abc import Iterator

from ..request.request import Request
from ..request.spec import SequenceKey
from .lines import ArrivalLine, Lines, Place

_RETURNED, _NEW = 0, 1  # those that lost a slot go before those that never had one


class WaitingQueue:
    """First come, first served; those that lost their slots come before, the last to lose it first.

    So it is within each of the `lines`, and they say whose turn it is among them. Every operation
    costs the same with a hundred thousand requests as with a hundred, but for a logarithm. A
    request that waits for its leader's prompt is held back, out of line, until it is let in; it
    then stands where its arrival puts it.
    """

    def __init__(self, lines: Lines | None = None) -> None:
        self._lines = lines or ArrivalLine()
        self._arrivals = itertools.count()
        self._returns = itertools.count(start=-1, step=-1)
        self._places: dict[Request, Place] = {}  # all that wait, by place in line
        self._held: dict[SequenceKey, list[Request]] = {}  # by leader
        self._out_of_line: set[Request] = set()  # all of those

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request: Request) -> bool:
        return request in self._places

    def __iter__(self) -> Iterator[Request]:
        """All of them, in order of arrival; those that lost a slot first."""
        return iter(sorted(self._places, key=self._places.__getitem__))

    def add(self, request: Request) -> None:
        """Queue a new request behind all others."""
        self._lines.came(request)
        self._line_up(request, (_NEW, next(self._arrivals)))

    def hold(self, request: Request, leader: SequenceKey) -> None:
        """Queue a new request, but out of line until `let_in(leader)`."""
        self._lines.came(request)
        self._places[request] = (_NEW, next(self._arrivals))
        self._held.setdefault(leader, []).append(request)
        self._out_of_line.add(request)

    def put_back(self, request: Request) -> None:
        """Queue a request that lost its slot, before all others."""
        self._lines.returned(request)
        self._line_up(request, (_RETURNED, next(self._returns)))

    def add_first(self, request: Request) -> None:
        """Queue a request that had a slot elsewhere, before all others."""
        self._lines.came(request)
        self._line_up(request, (_RETURNED, next(self._returns)))

    def let_in(self, leader: SequenceKey) -> None:
        """Let those that wait for `leader` stand in line."""
        for request in self._held.pop(leader, ()):
            if request in self._out_of_line:
                self._out_of_line.remove(request)
                self._line_up(request, self._places[request])

    def is_awaited(self, leader: SequenceKey) -> bool:
        """True if some wait for `leader`."""
        return leader in self._held

    def remove(self, request: Request) -> None:
        """Take a request out. Raises KeyError if it is not there."""
        place = self._places.pop(request)
        if request in self._out_of_line:
            self._out_of_line.remove(request)
            self._lines.left(request, None)
        else:
            self._lines.left(request, place)

    def set_priority(self, request: Request, priority: int) -> None:
        """Give a request another priority; if it waits, it stands where that puts it."""
        request.priority = priority
        if request in self._places and request not in self._out_of_line:
            self._lines.move(request, self._places[request])

    def first(self, num_free: int, num_running: int = 0) -> list[Request]:
        """Those of whom an order may choose (`Snapshot.waiting`)."""
        return self._lines.first(num_free, num_running)

    def _line_up(self, request: Request, place: Place) -> None:
        self._places[request] = place
        self._lines.add(request, place)
