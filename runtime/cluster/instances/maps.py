"""The newest map of each instance's memory, however long one of them takes."""

import asyncio
import time
from collections.abc import Iterable
from typing import NamedTuple

from ....vmem.errors import EngineDied
from ...engine.memory.memory_map import MemoryMap
from .instance_link import InstanceLink

_PATIENCE_S = 0.25  # with one that is in a step; then the others are shown, and it as it was
_SILENT_S = 2.0


class Seen(NamedTuple):
    """A map, and whether its instance has been silent since."""

    map: MemoryMap
    is_silent: bool


class Maps:
    """Asks instances for their maps, and remembers them. Of one event loop."""

    def __init__(self) -> None:
        self._asked: dict[int, asyncio.Future[int | MemoryMap | None]] = {}
        self._newest: dict[int, tuple[MemoryMap, float]] = {}

    async def look(self, links: Iterable[InstanceLink]) -> dict[int, Seen]:
        """The newest map of each that has ever answered."""
        there = {link.instance: link for link in links}
        self._newest = {n: newest for n, newest in self._newest.items() if n in there}
        for number in self._asked.keys() - there.keys():
            if (asked := self._asked.pop(number)).done():
                _answer(asked)  # or it would be said that nobody heard why there is none
        for number, link in there.items():
            if number not in self._asked:
                self._asked[number] = link.ask("memory_map")
        if self._asked:
            await asyncio.wait(self._asked.values(), timeout=_PATIENCE_S)
        now_s = time.monotonic()
        for number, asked in list(self._asked.items()):
            if asked.done():
                del self._asked[number]
                if isinstance(found := _answer(asked), MemoryMap):
                    self._newest[number] = found, now_s
        return {
            number: Seen(found, now_s - seen_s > _SILENT_S)
            for number, (found, seen_s) in self._newest.items()
        }


def _answer(asked: "asyncio.Future[int | MemoryMap | None]") -> int | MemoryMap | None:
    try:
        return asked.result()
    except EngineDied:  # others are there
        return None
