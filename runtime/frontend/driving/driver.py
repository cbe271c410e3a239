"""Turns an engine's loop, and hands each request what came for it."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from ....vmem import janitor
from ....vmem.at_exit import stop_at_exit
from ....vmem.errors import InvalidOperation
from ....vmem.process import ProcessOwner
from ...engine.interrupts import Shield
from ...engine.loop import EngineLoop
from ...engine.memory.memory_map import MemoryMap
from ...engine.messages import Abort, Add, Message
from ...engine.stats import EngineStats
from .idle import IdleTrim
from .sinks import Sink, Sinks
from .threads_end import ThreadsEnd

_ASK_AGAIN_S = 0.1  # while another thread has the loop: how long a signal's handler may wait
_TIDYING_S = 0.002  # more than carrying out a message takes, and less than a step

_T = TypeVar("_T")


class LoopDriver:
    """Lets any number of threads drive one loop, one at a time.

    Whoever waits for a request turns the loop, for all requests. No step is torn: one lock is held
    and signals wait meanwhile (`Shield`). A child of a fork is refused before the lock.

    One class, since all of it is what may be done to a loop under that one lock.

    Args:
        loop: driven by nobody else.
        idle_trim_s: seconds without a request after which memory of finished ones goes back; None
            for never.
        on_post: called when something was posted, from any thread and by finalisers too.
    """

    def __init__(
        self,
        loop: EngineLoop,
        *,
        idle_trim_s: float | None = None,
        on_post: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._owner = ProcessOwner("this LLM")
        self._sinks = Sinks(loop)
        self._end = ThreadsEnd()
        self._maps_wanted: deque[Future[MemoryMap]] = deque()
        self._on_post = on_post
        self._idle: IdleTrim | None = None
        if idle_trim_s is not None:
            # Weakly: its thread must not keep a driver that was dropped.
            self._idle = IdleTrim(_weakly(self._trim_if_idle), idle_trim_s)
        janitor.start()
        stop_at_exit(self)

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
        """Queue requests. Raises InvalidOperation if this is closed or asleep.

        A signal's handler may raise in between: the sinks are gone then, and their requests with
        them.
        """
        self.check_ready()
        if self._idle is not None and sinks:
            self._idle.busy()
        for sink in sinks:
            self._sinks.add(sink)
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

    def turn(self, unless: Callable[[], bool] | None = None) -> None:
        """Run one step, for all requests; none if `unless`, asked under the lock, says so."""
        with self._exclusive():
            if unless is not None and unless():
                return
            if self._end.is_open_to_me():
                self.check_open()
                self._turn()
                return
        self._end.wait_for_it()

    def wait_for(self, take: Callable[[], _T | None]) -> _T:
        """Turn until `take` returns something. It is called under the lock."""
        while True:
            with self._exclusive():
                found = take()
                if found is not None:
                    return found
                may_step = self._end.is_open_to_me()
                if may_step:
                    self.check_open()
                    self._turn()
            if not may_step:
                self._end.wait_for_it()

    def tidy(self) -> None:
        """Carry out what was posted, without a step."""
        with self._exclusive():
            if not self._loop.is_closed:
                self._carry_out()

    def settle(self) -> None:
        """As `EngineLoop.settle`; nothing while there is work, whose steps do it."""
        with self._exclusive():
            if not (self._loop.is_closed or self._loop.has_work):
                self._loop.settle()

    # -- the machine under it ----------------------------------------------------------------

    def stats(self) -> EngineStats:
        """What the engine holds; while it works, what it held a moment ago. Waits for no step."""
        self.check_open()
        with Shield():
            if not self._lock.acquire(timeout=_TIDYING_S):
                return self._loop.stats()
            try:
                self.check_open()
                self._carry_out()
                return self._loop.stats(fresh=True)
            finally:
                self._lock.release()

    def memory_map(self) -> MemoryMap:
        """What each slot holds, as of the end of the step under way. From any thread.

        Raises InvalidOperation if this is closed meanwhile.
        """
        wanted: Future[MemoryMap] = Future()
        self._maps_wanted.append(wanted)
        while not wanted.done():
            self.check_open()
            with Shield():
                # Who turns the loop may have the lock again at once: then it answers in between.
                if self._lock.acquire(timeout=_TIDYING_S):
                    try:
                        self.check_open()
                        self._carry_out()
                        self._draw_maps()
                    finally:
                        self._lock.release()
        return wanted.result()

    def trim(self) -> int:
        """Give the memory of finished requests back to the system; returns the bytes."""
        with self._exclusive():
            self.check_open()
            self._carry_out()
            self._sinks.drop_orphans()
            self._carry_out()
            return self._loop.trim()

    def weights_changed(self) -> None:
        """As `EngineLoop.weights_changed`."""
        with self._exclusive():
            self.check_open()
            self._carry_out()
            try:
                self._loop.weights_changed()
            finally:  # the step under way ended, and maybe the last request with it
                self._sinks.route(self._loop.take_outputs())
                self._note_rest()

    def load_adapter(self, name: str, path: str) -> None:
        """As `EngineLoop.load_adapter`. The folder is read here, while others turn the loop."""
        self._loop.engine.extras.adapters.prepare(path)
        with self._exclusive():
            self.check_open()
            self._loop.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        """As `EngineLoop.unload_adapter`; what was posted before has it still."""
        with self._exclusive():
            self.check_open()
            self._carry_out()
            self._loop.unload_adapter(name)

    def sleep(self, *, weights: bool = False) -> int:
        """As `EngineLoop.sleep`."""
        with self._exclusive():
            self.check_open()
            self._carry_out()
            self._sinks.drop_orphans()
            self._carry_out()
            return self._loop.sleep(weights=weights)

    def wake(self) -> None:
        """As `EngineLoop.wake`."""
        with self._exclusive():
            self.check_open()
            self._loop.wake()

    def close(self) -> None:
        """Abort what is unfinished and give everything back. Closing twice is harmless.

        As `EngineLoop.close`, it may be called again if it raises; all requests have ended then.
        """
        if not self.is_mine:
            return
        if self._idle is not None:
            self._idle.stop()
        with self._exclusive():
            try:
                self._loop.close()
            finally:
                self._sinks.route(self._loop.take_outputs())
                self._sinks.abort_all()

    def stop(self) -> None:
        """The interpreter exits: wait for the step under way, and let no thread begin another."""
        if not self.is_mine:
            return
        if self._idle is not None:
            self._idle.stop()
            self._idle.thread.join()
        with self._exclusive():
            self._end.begin()
        self._end.gather()

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
        self._sinks.route(self._loop.turn())
        if self._loop.has_mail:  # sequences whose text ended: their slots are parked at once
            self._sinks.route(self._loop.carry_out())
        self._note_rest()
        self._draw_maps()

    def _draw_maps(self) -> None:
        """Answer those that wait for a map."""
        if self._maps_wanted:
            drawn = self._loop.memory_map()
            while self._maps_wanted:
                self._maps_wanted.popleft().set_result(drawn)

    def _carry_out(self) -> None:
        had_work = self._loop.has_work
        self._sinks.route(self._loop.carry_out())
        if had_work:
            self._note_rest()

    def _note_rest(self) -> None:
        """If there is nothing left to do, memory may go back after a while."""
        if self._idle is not None and not self._loop.has_work:
            self._idle.idle()

    def _trim_if_idle(self) -> None:
        with self._exclusive():
            if not self._loop.is_closed and not self._loop.has_work:
                self._loop.trim()

    def _was_posted(self) -> None:
        if self._on_post is not None:
            self._on_post()

    def check_process(self) -> None:
        """Raises ForkedProcess in a child of a fork."""
        self._owner.check()

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
