"""Threads that work for a while."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def at_work(
    threads: Sequence[threading.Thread],
    is_over: threading.Event,
    ends_s: float,
    tell_late: Callable[[threading.Thread], None],
) -> Iterator[None]:
    """While it lasts they work; then `is_over` is set, and they have so long to end.

    `tell_late` is called with each that has not ended by then.
    """
    is_over.clear()
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        deadline = time.monotonic() + ends_s
        try:
            _join(threads, deadline)
        except KeyboardInterrupt:  # they are at work with what is closed next
            _join(threads, deadline)
            raise
        for thread in threads:
            if thread.is_alive():
                tell_late(thread)


def _join(threads: Sequence[threading.Thread], deadline: float) -> None:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
