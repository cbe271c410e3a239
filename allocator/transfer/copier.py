"""Copies of KV, one after the other, on a thread of their own or at once."""

import ctypes
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Protocol, TypeVar

import torch

from ...vmem import Fence, stop_at_exit
from ...vmem.errors import InvalidOperation
from .transfers import Spans

_log = logging.getLogger(__name__)


class CopyJob:
    """One set of spans that becomes equal to another.

    Args:
        source, target: the same number of bytes in each stream, however cut.
        after: what must be over on the device before the source is read and the target written.
        owners: what has the memory; kept alive until the job is done.

    Attributes:
        num_bytes, num_copies: what there is to copy, and in how many calls.
        time_s: what the copying itself took.
        error: why it failed; None if it did not. One that was cancelled has an error, too.
    """

    def __init__(
        self, source: Spans, target: Spans, *, after: Fence, owners: tuple[object, ...] = ()
    ) -> None:
        self._pairs = list(_pairs(source, target))
        self._after = after
        self._owners = owners
        self._done = threading.Event()
        self._is_cancelled = False
        self.num_bytes = sum(piece.numel() for piece, _ in self._pairs)
        self.num_copies = len(self._pairs)
        self.time_s = 0.0
        self.error: Exception | None = None

    @property
    def is_done(self) -> bool:
        """True once it has succeeded or failed: nothing is touched any more."""
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is done; False if `timeout_s` have passed before."""
        return self._done.wait(timeout_s)

    def cancel(self) -> None:
        """Leave out what is not copied yet, and wait until nothing is touched any more."""
        self._is_cancelled = True
        self.wait()

    def run(self, stream: "torch.cuda.Stream | None" = None) -> None:
        """Copy, on the calling thread. Never raises: `error` says what went wrong."""
        try:
            self._after.wait()
            start_s = time.perf_counter()
            try:
                for source, target in self._pairs:
                    if self._is_cancelled:
                        raise InvalidOperation("the copy was cancelled")
                    _copy(source, target, stream)
            finally:  # what was launched before an error is under way, and touches memory
                if stream is not None:
                    stream.synchronize()
            self.time_s = time.perf_counter() - start_s
        except Exception as error:  # noqa: BLE001 - told to whoever asks for the result
            self.error = error
            if not self._is_cancelled:
                _log.warning("%d bytes of KV could not be copied: %s", self.num_bytes, error)
        finally:
            self._pairs.clear()
            self._owners = ()
            self._done.set()


class Job(Protocol):
    """What a copier does."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def is_done(self) -> bool: ...
    def run(self, stream: "torch.cuda.Stream | None" = None) -> None: ...


AnyJob = TypeVar("AnyJob", bound=Job)


class Copier:
    """Does copies in the order in which they come, on one thread that starts with the first.

    The thread knows this object only weakly, and ends with it.

    Args:
        device: one of whose ends every copy may be; copies with a GPU go over a stream of their
            own, beside the computation.
        synchronous: copy on the caller's thread, at once.
        max_bytes: that may be under way; whoever can do without asks `has_room` first.
    """

    def __init__(
        self, device: torch.device, *, synchronous: bool = False, max_bytes: int = 1 << 30
    ) -> None:
        self._device = device
        self._synchronous = synchronous
        self._max_bytes = max_bytes
        self._stream: torch.cuda.Stream | None = None
        self._thread: threading.Thread | None = None
        self._under_way: list[Job] = []
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._is_stopped = False
        # At exit the thread ends by `stop` alone: who is stopped before may have jobs for it.
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def has_room(self, num_bytes: int) -> bool:
        """True if a copy of `num_bytes` would not wait behind too many others."""
        self._under_way = [job for job in self._under_way if not job.is_done]
        waiting = sum(job.num_bytes for job in self._under_way)
        return not waiting or waiting + num_bytes <= self._max_bytes

    def submit(self, job: AnyJob) -> AnyJob:
        """Begin a copy, or do it. Raises InvalidOperation after `stop`."""
        if self._is_stopped:
            raise InvalidOperation("the copier has been stopped; create another")
        if self._device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        if self._synchronous:
            job.run(self._stream)
            return job
        self._under_way = [other for other in self._under_way if not other.is_done]
        self._under_way.append(job)
        if self._thread is None:
            args = self._jobs, self._stream
            thread = threading.Thread(target=_work, args=args, name="vkv-swap", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads
                _log.warning("%d bytes of KV are copied at once: %s", job.num_bytes, error)
                job.run(self._stream)
                return job
            self._thread = thread
            stop_at_exit(self)
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        """Finish what was begun and end the thread, for good. Stopping twice is harmless."""
        self._is_stopped = True
        thread, self._thread = self._thread, None
        if thread is not None and thread.is_alive():
            self._jobs.put(None)
            thread.join()


def _work(jobs: "SimpleQueue[Job | None]", stream: "torch.cuda.Stream | None") -> None:
    while (job := jobs.get()) is not None:
        job.run(stream)
        del job  # or what it holds would live until the next one


def _copy(source: torch.Tensor, target: torch.Tensor, stream: "torch.cuda.Stream | None") -> None:
    if source.is_cpu and target.is_cpu:  # by one thread, and without the interpreter's lock
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())
        return
    with torch.cuda.stream(stream):  # None: the current one, and the call waits
        target.copy_(source, non_blocking=stream is not None)


def _pairs(source: Spans, target: Spans) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces of equal size that lie at the same place of the same stream."""
    for ours, theirs in zip(source, target, strict=True):
        total, expected = (sum(piece.numel() for piece in side) for side in (ours, theirs))
        if total != expected:
            raise InvalidOperation(f"{total} bytes cannot be copied to {expected}")
        left, right = iter(ours), iter(theirs)
        a, b = next(left, None), next(right, None)
        while a is not None and b is not None:
            size = min(a.numel(), b.numel())
            if size:
                yield a[:size], b[:size]
            a = a[size:] if a.numel() > size else next(left, None)
            b = b[size:] if b.numel() > size else next(right, None)
