"""A bounded number of places, for tasks of any event loop."""

import asyncio
import threading
from collections import deque


class Place:
    """One's place, or one's turn in the line for it. Of one event loop; see `Places.line_up`."""

    def __init__(self, places: "Places") -> None:
        self._places = places
        self._loop = asyncio.get_running_loop()
        self._called: asyncio.Future[bool] = self._loop.create_future()
        self.is_held = False

    async def wait(self) -> bool:
        """Wait until the place is one's own: True; or until one is told to `give_up`: False."""
        return await self._called

    def give_up(self) -> None:
        """Stand in line no longer. From any thread; without effect on a place that is held."""
        self.call(False)

    def release(self) -> None:
        """Give the place to the next. From any thread; harmless when repeated."""
        self._places.release(self)

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
        self._num_free = count
        self._line: deque[Place] = deque()

    def line_up(self) -> Place:
        """A place if one is free, else the last turn in the line. `wait` for it, then `release`."""
        place = Place(self)
        with self._lock:
            if self._num_free:
                self._num_free -= 1
                place.is_held = True
            else:
                self._line.append(place)
        if place.is_held:
            place.call(True)
        return place

    def release(self, place: Place) -> None:
        """As `Place.release`."""
        with self._lock:
            if not place.is_held:
                if place in self._line:
                    self._line.remove(place)
                return
            place.is_held = False
            while self._line:
                following = self._line.popleft()
                if following.call(True):
                    following.is_held = True
                    return
            self._num_free += 1
