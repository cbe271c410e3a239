"""A bounded number of places, for tasks of any event loop."""

import asyncio
import threading
import weakref
from collections import OrderedDict
from functools import partial

from ....vmem import janitor


class _Seat:
    """What a place is for the accounts. It knows nobody, so that nobody lives on through it."""

    def __init__(self) -> None:
        self.is_held = False


class Place:
    """One's place, or one's turn in the line for it. Of one event loop; see `Places.line_up`.

    It is given back when it is dropped, at the latest: a task of a loop that was closed never
    gets to its end.
    """

    def __init__(self, places: "Places") -> None:
        self._loop = asyncio.get_running_loop()
        self._called: asyncio.Future[bool] = self._loop.create_future()
        self.seat = _Seat()
        self._places = places
        self._finalizer = weakref.finalize(
            self, janitor.later, partial(places.give_back, self.seat)
        )
        self._finalizer.atexit = False

    @property
    def is_held(self) -> bool:
        """True from the call to the release."""
        return self.seat.is_held

    async def wait(self) -> bool:
        """Wait until the place is one's own: True; or until one is told to `give_up`: False."""
        return await self._called

    def give_up(self) -> None:
        """Stand in line no longer. From any thread; without effect on a place that is held."""
        self.call(False)

    def release(self) -> None:
        """Give the place to the next. From any thread; harmless when repeated."""
        self._places.give_back(self.seat)
        self._finalizer.detach()

    def call(self, has_place: bool) -> bool:
        """Tell whoever waits; False if there is nobody any more."""
        try:
            self._loop.call_soon_threadsafe(self._call, has_place)
        except RuntimeError:  # its event loop is closed
            return False
        return True

    def _call(self, has_place: bool) -> None:
        if not self._called.done():
            self._called.set_result(has_place)


class Places:
    """`count` places, first come, first served. Event loops may come and go."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()  # nothing foreign runs while it is held
        self.num_free = count
        self._line: OrderedDict[_Seat, Place] = OrderedDict()

    def line_up(self) -> Place:
        """A place if one is free, else the last turn in the line. `wait` for it, then `release`."""
        place = Place(self)
        with self._lock:
            if self.num_free:
                self.num_free -= 1
                place.seat.is_held = True
            else:
                self._line[place.seat] = place
        if place.is_held:
            place.call(True)
        return place

    def give_back(self, seat: _Seat) -> None:
        """Give a place to the next in line, or leave the line."""
        with self._lock:
            if not seat.is_held:
                self._line.pop(seat, None)
                return
            seat.is_held = False
            while self._line:
                following, place = self._line.popitem(last=False)
                if place.call(True):
                    following.is_held = True
                    return
            self.num_free += 1
