"""A cache's lock, and the time that callers spend behind it."""

import time

from ..vmem import OwnedLock


class TimedLock:
    """`with` it, `lock` is held, and the time until it is let go counts, waiting included.

    Attributes:
        total_s: seconds so far; of nested uses the outermost counts.
    """

    def __init__(self, lock: OwnedLock) -> None:
        self.total_s = 0.0
        self._lock = lock
        self._depth = 0
        self._start_s = 0.0

    def __enter__(self) -> None:
        start_s = time.perf_counter()
        self._lock.__enter__()
        if not self._depth:
            self._start_s = start_s
        self._depth += 1

    def __exit__(self, *exc_info: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.total_s += time.perf_counter() - self._start_s
        self._lock.__exit__(*exc_info)
