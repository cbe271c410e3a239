"""A background thread that prepares memory while the device computes."""

import logging
import threading
import traceback
import weakref
from collections.abc import Callable
from queue import SimpleQueue

from ..vmem import stop_at_exit
from .slot import Slot

_log = logging.getLogger(__name__)

_Job = tuple[Slot, int] | threading.Event


class LookAhead:
    """Runs `prepare(slot, num_tokens)` for each job, in order, on a thread of its own.

    The thread starts with the first job. It holds this object, and this object the owner of
    `prepare`, only weakly: a cache that is dropped without a word is still collected, and the
    thread ends with it.

    A job that fails is logged, once for each kind of error, and counted. Nobody is told: what was
    not prepared is made when it is needed, and whoever needs it is told if that fails too.

    Attributes:
        num_failures: jobs that failed, so far.
    """

    def __init__(self, prepare: Callable[[Slot, int], None]) -> None:
        self._prepare = weakref.WeakMethod(prepare)
        self.num_failures = 0
        self._logged: set[type[Exception]] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self._thread: threading.Thread | None = None
        # Its `put` may run in the middle of another one, and so in a finaliser.
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        # At exit the thread ends by `stop` alone: who is stopped before may have jobs for it.
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def submit(self, slot: Slot, num_tokens: int) -> None:
        """Queue a job; none is taken after `stop`."""
        with self._lock:
            if self._stopped:
                return
            if self._thread is None:
                args = weakref.ref(self), self._jobs
                thread = threading.Thread(
                    target=_work, args=args, name="vkv-look-ahead", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:  # the system has no more threads
                    self._note(error)
                    return
                self._thread = thread
                stop_at_exit(self)
            self._jobs.put((slot, num_tokens))

    def drain(self) -> None:
        """Wait until every job queued so far is done."""
        with self._lock:
            done = threading.Event()
            if self._thread is None or not self._thread.is_alive():
                done.set()  # no thread outlives a fork
            else:
                self._jobs.put(done)
        done.wait()

    def stop(self) -> None:
        """Finish the queue and end the thread, for good. Stopping twice is harmless."""
        with self._lock:
            self._stopped = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join()

    def run(self, slot: Slot, num_tokens: int) -> None:
        """Do one job, on the calling thread."""
        prepare = self._prepare()
        if prepare is not None:
            try:
                prepare(slot, num_tokens)
            except Exception as error:  # noqa: BLE001 - logged and counted; the thread lives on
                self._note(error)

    def _note(self, error: Exception) -> None:
        """A job failed, by the error that is being handled."""
        self.num_failures += 1
        if type(error) not in self._logged:
            self._logged.add(type(error))
            # As text: a record of the exception itself would keep the cache alive.
            _log.warning("no memory was mapped ahead: %s", traceback.format_exc())


def _work(owner: "weakref.ref[LookAhead]", jobs: "SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        if isinstance(job, threading.Event):
            job.set()
        elif (look_ahead := owner()) is not None:
            look_ahead.run(*job)
            del look_ahead  # or it would live until the next job
        del job
