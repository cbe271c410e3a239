"""A background thread that prepares memory while the device computes."""

import queue
import threading
import weakref
from collections.abc import Callable

from .slot import Slot

_Job = tuple[Slot, int]


class LookAhead:
    """Runs `prepare(slot, num_tokens)` for each job, in order, on a thread of its own.

    The thread starts with the first job. It holds the owner of `prepare` only weakly, so a
    cache that is dropped without a word is still collected, and the thread ends with it.
    """

    def __init__(self, prepare: Callable[[Slot, int], None]) -> None:
        self._prepare = weakref.WeakMethod(prepare)
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._failure: list[Exception] = []
        self._finalizer = weakref.finalize(self, self._jobs.put, None)

    def submit(self, slot: Slot, num_tokens: int) -> None:
        """Queue a job. Raises what an earlier job raised, if one failed."""
        if self._failure:
            raise self._failure.pop()
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work,
                args=(self._prepare, self._jobs, self._failure),
                name="vkv-look-ahead",
                daemon=True,
            )
            self._thread.start()
        self._jobs.put((slot, num_tokens))

    def drain(self) -> None:
        """Wait until every job queued so far is done."""
        self._jobs.join()

    def stop(self) -> None:
        """Finish the queue and end the thread. Stopping twice is harmless."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


def _work(
    prepare: "weakref.WeakMethod[Callable[[Slot, int], None]]",
    jobs: "queue.Queue[_Job | None]",
    failure: list[Exception],
) -> None:
    while (job := jobs.get()) is not None:
        try:
            method = prepare()
            if method is not None:
                method(*job)
        except Exception as error:  # noqa: BLE001 - handed to the next caller, never dropped
            failure.append(error)
        finally:
            method = None
            jobs.task_done()
    jobs.task_done()
