"""What a channel is, and one stage of a transfer on its way through it."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch

from ....vmem import Fence
from ....vmem.errors import DriverError, InvalidOperation
from ..transfers import Incoming, Outgoing

_log = logging.getLogger(__name__)


class ChannelJob:
    """One stage, on one side. `run` it here, or submit it to a `Copier`.

    Args:
        work: moves the tokens, or raises.
        after: what must be over on the device before.
        interrupt: makes `work`, on another thread, raise.
        give_back: what `work` needed and nobody needs after it; called once, never before it.

    Attributes:
        num_bytes: that are, or were, copied. A receiver of pages knows it once they came.
        num_pages: that change hands.
        time_s: what it took.
        error: why it failed; None if it did not. One that was cancelled has an error, too.
    """

    def __init__(
        self,
        work: "Callable[[ChannelJob], None]",
        *,
        after: Fence,
        interrupt: Callable[[], None],
        give_back: Callable[[], None] | None = None,
    ) -> None:
        self.num_bytes = self.num_pages = 0
        self.time_s = 0.0
        self.error: Exception | None = None
        self._work = work
        self._after = after
        self._interrupt = interrupt
        self._give_back = give_back or _nothing
        self._done = threading.Event()
        self._begin = threading.Lock()
        self._has_begun = False

    @property
    def is_done(self) -> bool:
        """True once it has succeeded or failed: nothing is touched any more."""
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is done; False if `timeout_s` have passed before."""
        return self._done.wait(timeout_s)

    def cancel(self) -> None:
        """Give up, and with it the channel if it is under way. Waits until nothing is touched."""
        if self._starts():
            with suppress(DriverError):
                self._after.wait()  # a fence that nobody waits for is never given back
            self._end(InvalidOperation("the stage was cancelled"))
        elif not self.is_done:
            self._interrupt()
            self.wait()

    def run(self, stream: "torch.cuda.Stream | None" = None) -> None:
        """Do it, on the calling thread. Never raises: `error` says what went wrong."""
        if not self._starts():
            return
        error: Exception | None = InvalidOperation("the stage was interrupted")
        try:
            self._after.wait()
            start_s = time.perf_counter()
            self._work(self)
            self.time_s = time.perf_counter() - start_s
            error = None
        except Exception as failure:  # noqa: BLE001 - told to whoever asks for the result
            error = failure
            _log.warning("KV did not move: %s", failure)
        finally:
            self._end(error)

    def _starts(self) -> bool:
        with self._begin:
            before, self._has_begun = self._has_begun, True
            return not before

    def _end(self, error: Exception | None) -> None:
        self.error = error
        self._give_back()
        self._work, self._give_back = _nothing, _nothing  # they may hold caches
        self._done.set()


def _nothing(*_: object) -> None:
    pass


class Channel(Protocol):
    """Moves tokens of transfers, stage by stage. Both sides name the same stage.

    What arrives is written into memory that the receiver has set aside; to commit or abort is for
    the two that agreed upon the transfer. A sender whose job failed cannot tell whether all
    arrived: it must ask. A channel whose stage failed may be closed for good (`is_open`).
    """

    moves_pages: bool

    @property
    def is_open(self) -> bool: ...

    def send(
        self, outgoing: Outgoing, start: int, stop: int, *, after: Fence | None = None
    ) -> ChannelJob: ...

    def receive(
        self, incoming: Incoming, start: int, stop: int, *, after: Fence | None = None
    ) -> ChannelJob: ...

    def close(self) -> None: ...
