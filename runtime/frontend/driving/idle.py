"""Memory of finished requests goes back to the system once nobody has asked for a while."""

import logging
import threading
import time
from collections.abc import Callable

from ....vmem.errors import VkvError

_log = logging.getLogger(__name__)


class IdleTrim:
    """Calls `trim` some time after the last request, on a thread of its own.

    Args:
        trim: gives memory back, under the lock of whoever drives the engine; called from the
            thread, and not while this object's own lock is held.
        after_s: seconds without a request.
    """

    def __init__(self, trim: Callable[[], object], after_s: float) -> None:
        self._trim = trim
        self._after_s = after_s
        self._changed = threading.Condition()
        self._due_s: float | None = None  # on the monotonic clock; None while there is work
        self._is_stopped = False
        self.thread = threading.Thread(target=self._run, name="vkv-idle-trim", daemon=True)
        self.thread.start()

    def idle(self) -> None:
        """The engine has nothing to do: count from now."""
        with self._changed:
            self._due_s = time.monotonic() + self._after_s
            self._changed.notify()

    def busy(self) -> None:
        """The engine has something to do: trim nothing."""
        with self._changed:
            self._due_s = None

    def stop(self) -> None:
        """Trim nothing any more, and let the thread end."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def _run(self) -> None:
        while self._wait_until_due():
            try:
                self._trim()
            except VkvError:  # as of a driver that is in trouble; there is a next time
                _log.exception("memory of finished requests could not be given back")

    def _wait_until_due(self) -> bool:
        """False once stopped."""
        with self._changed:
            while not self._is_stopped:
                left = None if self._due_s is None else self._due_s - time.monotonic()
                if left is not None and left <= 0:
                    self._due_s = None
                    return True
                self._changed.wait(left)
            return False
