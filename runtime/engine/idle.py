"""Memory of finished requests goes back to the system once nobody has asked for a while."""

import threading
import time
from types import TracebackType
from typing import Self

from .engine import Engine


class IdleTrim:
    """Trims an engine's cache `after_s` seconds after its last request, on a thread of its own.

    Whoever drives the engine says when it rests and when it works. All of this, and the trimming
    too, happens under the driver's own lock, so nothing is trimmed under a running step, and
    nothing at all after `stop`. It holds the engine, never the driver, which can be dropped.

    Args:
        engine: the engine.
        lock: what its driver holds while it uses the engine; reentrant.
        after_s: seconds of rest.
    """

    def __init__(self, engine: Engine, lock: threading.RLock, after_s: float) -> None:
        self._engine = engine
        self._after_s = after_s
        self._changed = threading.Condition(lock)
        self._due_s: float | None = None  # on the monotonic clock; None while there is work
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="vkv-idle-trim", daemon=True)
        self._thread.start()

    def rest(self) -> None:
        """The engine has nothing to do: count from now. Without effect if it has."""
        with self._changed:
            if not self._engine.has_work:
                self._due_s = time.monotonic() + self._after_s
                self._changed.notify()

    def work(self) -> None:
        """The engine has something to do: trim nothing."""
        with self._changed:
            self._due_s = None

    def stop(self) -> None:
        """Trim nothing any more, and let the thread end."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _work(self) -> None:
        with self._changed:
            while not self._stopped:
                left = None if self._due_s is None else self._due_s - time.monotonic()
                if left is None or left > 0:
                    self._changed.wait(left)
                else:
                    self._due_s = None
                    self._engine.cache.trim()
