"""A background thread that prepares memory while the device computes."""

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

from ..vmem import stop_at_exit
from .slot import Slot

_Job = tuple[Slot, int] | threading.Event


class LookAhead:
    """Runs `prepare(slot, num_tokens)` for each job, in order, on a thread of its own.

    The thread starts with the first job. It holds this object, and this object the owner of
    `prepare`, only weakly: a cache that is dropped without a word is still collected, and the
    thread ends with it.
    """

    def __init__(self, prepare: Callable[[Slot, int], None]) -> None:
        self._prepare = weakref.WeakMethod(prepare)
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._stopped = False
        self._thread: threading.Thread | None = None
        # Its `put` may run in the middle of another one, and so in a finaliser.
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, slot: Slot, num_tokens: int) -> None:
        """Queue a job; none is taken after `stop`. Raises what an earlier job raised."""
        self._raise_failure()
        with self._lock:
            if self._stopped:
                return
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_work,
                    args=(weakref.ref(self), self._jobs),
                    name="vkv-look-ahead",
                    daemon=True,
                )
                self._thread.start()
                stop_at_exit(self)
            self._jobs.put((slot, num_tokens))

    def drain(self) -> None:
        """Wait until every job queued so far is done. Raises what one of them raised."""
        with self._lock:
            done = threading.Event()
            if self._thread is None or not self._thread.is_alive():
                done.set()  # no thread outlives a fork
            else:
                self._jobs.put(done)
        done.wait()
        self._raise_failure()

    def stop(self) -> None:
        """Finish the queue and end the thread, for good. Stopping twice is harmless."""
        with self._lock:
            self._stopped = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join()

    def run(self, slot: Slot, num_tokens: int) -> None:
        """Do one job, on the calling thread; a failure is kept for the next caller."""
        prepare = self._prepare()
        if prepare is not None:
            try:
                prepare(slot, num_tokens)
            except Exception as error:  # noqa: BLE001 - handed on, never dropped
                self._failure = error

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _work(owner: "weakref.ref[LookAhead]", jobs: "SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        if isinstance(job, threading.Event):
            job.set()
        elif (look_ahead := owner()) is not None:
            look_ahead.run(*job)
            del look_ahead  # or it would live until the next job
        del job
