"""An event loop on a thread of its own, and the ways there from other threads."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class LoopThread:
    """A thread that turns an event loop until it is stopped. For any other thread.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Have it called there, soon; nobody waits for it. Without effect after `stop`."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # closed in this moment
            _log.debug("%s came after the end", function.__name__)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Wait for what comes of something that takes a while there. Raises as it does."""
        future: Future[_T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result()

    def read(self, function: Callable[[], _T]) -> _T:
        """Wait for what a function finds there, between two things that happen."""

        async def found() -> _T:
            return function()

        return self.run(found())

    def stop(self) -> None:
        """End the thread. Only once."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
