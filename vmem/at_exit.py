"""Background threads end before the interpreter does."""

import atexit
import itertools
import logging
import os
import weakref
from typing import Protocol

_log = logging.getLogger(__name__)


class Stoppable(Protocol):
    """Something with a thread, or with another end that must not be left to chance."""

    def stop(self) -> None:
        """End it; harmless when repeated."""
        ...


class _Ending:
    """What has to stop when the process exits, each held weakly, with the process it is of.

    Any thread may add, at any moment: entries come and go by single steps, with nothing locked.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._things: dict[int, tuple[int, weakref.ref[Stoppable]]] = {}

    def add(self, thing: Stoppable) -> None:
        number = next(self._numbers)
        reference = weakref.ref(thing, lambda _: self._things.pop(number, None))
        self._things[number] = os.getpid(), reference

    def stop_all(self) -> None:
        """Stop the most recent first, since it may lean on earlier ones; a failure is logged."""
        while self._things:
            try:
                _, (pid, reference) = self._things.popitem()
            except KeyError:  # the last has just gone
                return
            thing = reference()
            if thing is None or pid != os.getpid():  # a forked child has none of the threads
                continue
            try:
                thing.stop()
            except Exception:  # noqa: BLE001 - logged; the others must end all the same
                _log.exception("%r could not be stopped at exit", thing)


_ending = _Ending()
atexit.register(_ending.stop_all)


def stop_at_exit(thing: Stoppable) -> None:
    """Call `thing.stop()` when the interpreter exits, if `thing` still lives then.

    It is held weakly. Whatever was handed over last is stopped first. A forked child stops
    nothing that its parent handed over.
    """
    _ending.add(thing)
