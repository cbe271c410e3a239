"""One background thread a process that does what a finaliser must leave to others.

A finaliser (a weakref callback, `__del__`) runs wherever the collector happens to start: in the
middle of another object's critical section, on any thread, with any locks held. It may not touch
what others share, and may wait for nothing. So it leaves a note, and the janitor carries it out:

    weakref.finalize(cache, janitor.later, give_back)

Whoever may leave notes calls `start` when it is made, since a finaliser cannot start a thread.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from .at_exit import stop_at_exit

_log = logging.getLogger(__name__)

Job = Callable[[], object]


class Janitor:
    """A queue of jobs, and the thread that does them one by one.

    After a fork the child has neither the thread nor the notes, which its parent carries out.
    """

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()  # of the thread's start and end; no finaliser takes it
        self._jobs: SimpleQueue[Job | threading.Event | None] = SimpleQueue()
        self._num_done = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """See to it that the thread runs. Cheap when it does."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="vkv-janitor", daemon=True)
                self._thread.start()
                stop_at_exit(self)

    def later(self, job: Job) -> None:
        """Have `job()` done on the janitor's thread. For finalisers: it locks nothing."""
        self._jobs.put(job)  # which may interrupt another `put`

    def drain(self, timeout_s: float = 60.0) -> bool:
        """Wait until every job noted so far is done; False if `timeout_s` have passed before.

        So are the jobs that those have noted. The caller may hold no lock that a job could want,
        and may not be a job itself.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            num_done, done = self._num_done, threading.Event()
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    return self._jobs.empty()
                assert self._thread is not threading.current_thread(), "a job waits for itself"
                self._jobs.put(done)
            if not done.wait(deadline - time.monotonic()):
                return False
            if num_done == self._num_done:
                return True

    def stop(self) -> None:
        """Do what is noted and end the thread. `start` begins anew."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._jobs.put(None)
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
                continue
            try:
                job()
            except Exception:  # noqa: BLE001 - logged; the next job is none of its business
                _log.exception("a clean-up failed: %r", job)
            del job  # what it holds must not live until the next one, and may leave a note
            self._num_done += 1


_janitor = Janitor()
start = _janitor.start
later = _janitor.later
drain = _janitor.drain
