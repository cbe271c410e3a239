"""An event loop on a thread of its own, and the ways there from other threads."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from ...vmem.errors import InvalidOperation
from ...vmem.process import ProcessOwner

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class LoopThread:
    """A thread that turns an event loop until it is stopped. For any other thread.

    Args:
        name: of the thread.
        owner: whose process it is.
    """

    def __init__(self, name: str, owner: ProcessOwner) -> None:
        self._owner = owner
        self._ending = threading.Lock()  # between what is begun and the end
        self._has_ended = False
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
        """Wait for what comes of something that takes a while there. Raises as it does.

        Raises InvalidOperation if the thread is stopped, before or meanwhile; ForkedProcess in a
        child of a fork, which has no such thread.
        """
        try:
            future = self._begin(work)
        except BaseException:
            work.close()  # or it would be said that nobody waited for it
            raise
        try:
            return future.result()
        except CancelledError as error:
            raise InvalidOperation("this cluster was closed meanwhile") from error

    def _begin(self, work: Coroutine[Any, Any, _T]) -> "Future[_T]":
        self._owner.check()
        with self._ending:
            if self._has_ended:
                raise InvalidOperation("this cluster has been closed; create another")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def read(self, function: Callable[[], _T]) -> _T:
        """Wait for what a function finds there, between two things that happen."""

        async def found() -> _T:
            return function()

        return self.run(found())

    def stop(self) -> None:
        """End the thread, and what others still wait for there. Only once."""
        with self._ending:
            self._has_ended = True
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


async def _cancel_others() -> None:
    """Cancel all tasks of this loop but the one that asks, and wait until they have ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
