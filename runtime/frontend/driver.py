"""Turns an engine's loop, and hands each request what came for it."""

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from ...vmem import janitor
from ...vmem.errors import InvalidOperation, StepFailed, VkvError
from ...vmem.process import ProcessOwner
from ..engine.interrupts import Shield
from ..engine.loop import EngineLoop
from ..engine.messages import Abort, Add, Message
from ..engine.stats import EngineStats
from ..request.spec import RequestSpec
from ..request.step_output import StepOutput
from .idle import IdleTrim

_ASK_AGAIN_S = 0.1  # while another thread has the loop: how long a signal's handler may wait
_TIDYING_S = 0.002  # more than carrying out a message takes, and less than a step

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where a request's outputs go. Called by whoever turns the loop, one call at a time."""

    spec: RequestSpec

    @property
    def is_finished(self) -> bool:
        """True once no more outputs will come."""
        ...

    def accept(self, output: StepOutput) -> Sequence[Message]:
        """Take an output; returns what the engine is to be told."""
        ...

    def fail(self, error: VkvError) -> None:
        """End all that is unfinished by an error."""
        ...


class LoopDriver:
    """Lets any number of threads drive one loop, one at a time.

    Whoever waits for a request turns the loop, for all requests. No step is torn: one lock is held
    and signals wait meanwhile (`Shield`). A child of a fork is refused before the lock.

    One class, since all of it is what may be done to a loop under that one lock.

    Args:
        loop: driven by nobody else.
        idle_trim_s: seconds without a request after which memory of finished ones goes back; None
            for never.
        wake: called when something was posted, from any thread and by finalisers too.
    """

    def __init__(
        self,
        loop: EngineLoop,
        *,
        idle_trim_s: float | None = None,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._owner = ProcessOwner("this LLM")
        self._sinks: dict[str, Sink] = {}
        self._wake = wake
        self._idle: IdleTrim | None = None
        if idle_trim_s is not None:
            # Weakly: its thread must not keep a driver that was dropped.
            self._idle = IdleTrim(_weakly(self._trim_if_idle), idle_trim_s)
        janitor.start()

    @property
    def is_mine(self) -> bool:
        """False in a child of a fork, whose memory is its parent's."""
        return self._owner.is_mine

    @property
    def is_closed(self) -> bool:
        return self._loop.is_closed

    @property
    def is_asleep(self) -> bool:
        return self._loop.is_asleep

    @property
    def has_work(self) -> bool:
        """True while there is something to turn for."""
        return self._loop.has_work

    @property
    def has_mail(self) -> bool:
        """True while something was posted that is not carried out."""
        return self._loop.has_mail

    # -- requests ----------------------------------------------------------------------------

    def submit(self, sinks: Sequence[Sink]) -> None:
        """Queue requests. Raises InvalidOperation if this is closed or asleep."""
        self.check_ready()
        if self._idle is not None and sinks:
            self._idle.busy()
        for sink in sinks:
            self._sinks[sink.spec.request_id] = sink
            self._loop.post(Add(sink.spec))
        self._was_posted()
        self.check_open()  # once more: what is posted after that is read by nobody

    def abandon(self, sinks: Sequence[Sink]) -> None:
        """Drop requests that nobody waits for any more; a finaliser may call it.

        Their pages go back with the next turn, or by the janitor if there is none.
        """
        unfinished = [sink.spec.request_id for sink in sinks if not sink.is_finished]
        if not unfinished or not self.is_mine:
            return
        for request_id in unfinished:
            self._loop.post(Abort(request_id))
        self._was_posted()
        janitor.later(_weakly(self.tidy))

    def post(self, message: Message) -> None:
        """Tell the engine something, at the next turn. From any thread, and by finalisers."""
        self._loop.post(message)
        self._was_posted()

    def turn(self) -> None:
        """Run one step, for all requests."""
        with self._exclusive():
            self.check_open()
            self._turn()

    def wait_for(self, take: Callable[[], _T | None]) -> _T:
        """Turn until `take`, which nobody disturbs, returns something."""
        while True:
            with self._exclusive():
                found = take()
                if found is not None:
                    return found
                self.check_open()
                self._turn()

    def tidy(self) -> None:
        """Carry out what was posted, without a step."""
        with self._exclusive():
            if not self._loop.is_closed:
                self._route(self._loop.carry_out())

    # -- the machine under it ----------------------------------------------------------------

    def stats(self) -> EngineStats:
        """What the engine holds; while a step runs, what it held before. Waits for no step."""
        self.check_open()
        if not self._lock.acquire(timeout=_TIDYING_S):
            return self._loop.stats()
        try:
            with Shield():
                self._route(self._loop.carry_out())
                return self._loop.stats(fresh=True)
        finally:
            self._lock.release()

    def trim(self) -> int:
        """Give the memory of finished requests back to the system; returns the bytes."""
        with self._exclusive():
            self.check_open()
            self._route(self._loop.carry_out())
            return self._loop.trim()

    def sleep(self, *, weights: bool = False) -> int:
        """As `EngineLoop.sleep`."""
        with self._exclusive():
            self.check_open()
            self._route(self._loop.carry_out())
            return self._loop.sleep(weights=weights)

    def wake(self) -> None:
        """As `EngineLoop.wake`."""
        with self._exclusive():
            self.check_open()
            self._loop.wake()

    def close(self) -> None:
        """Abort what is unfinished and give everything back. Closing twice is harmless."""
        if not self.is_mine:
            return
        if self._idle is not None:
            self._idle.stop()
        with self._exclusive():
            self._route(self._loop.close())

    # -- one at a time -------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Nobody else has the loop, and no signal's handler runs, but while this waits for it."""
        self._owner.check()
        with Shield() as shield:
            while not self._lock.acquire(timeout=_ASK_AGAIN_S):
                shield.deliver()
            try:
                yield
            finally:
                self._lock.release()

    def _turn(self) -> None:
        self._route(self._loop.turn())
        if self._loop.has_mail:  # sequences whose text ended: their slots are parked at once
            self._route(self._loop.carry_out())
        if self._idle is not None and not self._loop.has_work:
            self._idle.idle()

    def _route(self, outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:
                continue
            try:
                for message in sink.accept(output):
                    self._loop.post(message)
            except Exception as error:  # noqa: BLE001 - told to the one whose text it is, and logged
                _log.exception("the text of request %s failed", output.request_id)
                self._loop.post(Abort(output.request_id))
                sink.fail(StepFailed(f"its text could not be made: {error!r}"))
            if sink.is_finished:
                self._sinks.pop(output.request_id, None)

    def _trim_if_idle(self) -> None:
        with self._exclusive():
            if not self._loop.is_closed and not self._loop.has_work:
                self._loop.trim()

    def _was_posted(self) -> None:
        if self._wake is not None:
            self._wake()

    def check_ready(self) -> None:
        """As `check_open`, and raises InvalidOperation while asleep."""
        self.check_open()
        self._loop.check_awake()

    def check_open(self) -> None:
        """Raises InvalidOperation once closed, ForkedProcess in a child of a fork."""
        self._owner.check()
        if self._loop.is_closed:
            raise InvalidOperation("this LLM has been closed; create another")


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Calls a method if its object is still there."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call
