"""The one loop around an engine: messages in, a step, outputs out."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from ...vmem.errors import DriverError, InvalidOperation, OutOfLoans, UsageError, VkvError
from ..request.request import Request
from ..request.spec import RequestSpec
from ..request.step_output import Failure, StepOutput
from .engine import Engine
from .memory.memory_map import MemoryMap, draw_memory
from .messages import Abort, Add, Finish, Message, Resume, SetPriority
from .migration.arrivals import Arrivals
from .migration.departures import Departures
from .sleep import Sleep
from .stats import EngineStats

_PAUSE_S = 0.01  # while memory is short, before it is asked for again
_PUBLISH_S = 0.05  # between counts of what an engine holds, while it works

_log = logging.getLogger(__name__)


class EngineLoop:
    """The only driver of an engine, whoever turns it: a caller, a thread, a process, an actor.

    One class, since whoever drives it calls one method at a time. `post` and `stats` may be called
    at any time and from any thread, `post` also by a finaliser.

    Args:
        engine: all of whose memory it gives back at `close`.
        close: gives back what is under the engine.
        shortage_wait_s: if no request could get memory for so long, the one that
            `scheduler.shortage` names fails. Neighbours under a common `MemoryLimit` may return
            some meanwhile.

    Attributes:
        departures, arrivals: sequences that leave the engine, and that come to it; for the driver
            alone. They need turns, or `carry_out`, to notice that their time is over.
    """

    def __init__(
        self, engine: Engine, close: Callable[[], None], *, shortage_wait_s: float
    ) -> None:
        self.engine = engine
        self._close = close
        self._shortage_wait_s = shortage_wait_s
        self._short_since: tuple[Request, float] | None = None
        self._sleep = Sleep(engine)
        self.departures = Departures(engine)
        self.arrivals = Arrivals(engine, self._sleep.check_awake)
        self._inbox: deque[Message] = deque()
        self._refused: list[StepOutput] = []  # that no one has taken yet
        self._publish()
        self.is_closed = False
        self._is_given_back = False

    @property
    def has_work(self) -> bool:
        """True while there is something to turn for."""
        return bool(self._inbox) or self.engine.has_work

    @property
    def has_mail(self) -> bool:
        """True while something was posted that is not carried out."""
        return bool(self._inbox)

    @property
    def is_asleep(self) -> bool:
        """True between `sleep` and `wake`."""
        return self._sleep.is_asleep

    def post(self, message: Message) -> None:
        """Leave a message for the next turn."""
        self._inbox.append(message)

    def turn(self, inbox: Iterable[Message] = ()) -> list[StepOutput]:
        """Carry out what was posted, and `inbox`; then run one step. Returns what came of it.

        If it raises, what came until then is not lost: the next call returns it.
        """
        self._open_inbox(inbox)
        self.engine.step()
        self._keep_limit()
        self.departures.settle()
        self._meet_shortage()
        if time.monotonic() - self._published_s > _PUBLISH_S or not self.engine.has_work:
            self._publish()
        return self.take_outputs()

    def carry_out(self, inbox: Iterable[Message] = ()) -> list[StepOutput]:
        """Carry out what was posted, and `inbox`, without a step."""
        self._open_inbox(inbox)
        self._publish()
        return self.take_outputs()

    @property
    def is_settled(self) -> bool:
        """False while slots of finished requests are copied or written (`settle`)."""
        return self.engine.scheduler.tiers.is_settled

    def settle(self) -> None:
        """Take note of what was copied and written, as each step does: for while there is none.

        Slots stay pinned until then, and could not be reclaimed.
        """
        self.engine.scheduler.tiers.settle()
        self._keep_limit()
        if self.is_settled:
            self._publish()

    def take_outputs(self) -> list[StepOutput]:
        """What came since the last call."""
        refused, self._refused = self._refused, []
        return refused + self.engine.take_outputs()

    def _open_inbox(self, inbox: Iterable[Message]) -> None:
        self._inbox.extend(inbox)
        while self._inbox:
            message = self._inbox.popleft()
            try:
                self._carry_out(message)
            except (UsageError, InvalidOperation) as error:
                self._refused += _refusal_of(message, error)
        self.departures.settle()
        self.arrivals.settle()

    def _carry_out(self, message: Message) -> None:
        if isinstance(message, Add):
            self._sleep.check_awake()
            self.engine.add(message.spec)
        elif isinstance(message, Resume):
            self._sleep.check_awake()
            self.engine.resume(message.continuation)
        elif isinstance(message, Finish):
            self.engine.finish(message.request_id, message.index)
            self.departures.tell(message)
        elif isinstance(message, SetPriority):
            self.engine.set_priority(message.request_id, message.priority)
            self.departures.tell(message)
        else:
            assert isinstance(message, Abort), message
            self.engine.abort(message.request_id)
            self.departures.tell(message)

    def _publish(self) -> None:
        self._stats = self.engine.stats()
        self._published_s = time.monotonic()

    def _meet_shortage(self) -> None:
        """Where memory is short for all, wait a little; in the end the one that lacks it fails."""
        short, now = self._short_for_good(), time.monotonic()
        if short is None:
            self._short_since = None
        elif self._short_since is None or self._short_since[0] is not short[0]:
            self._short_since = short[0], now
        elif now - self._short_since[1] >= self._shortage_wait_s:
            request, error = short
            _log.warning("no memory for %r in %g s: %s", request, self._shortage_wait_s, error)
            self.engine.catch_up()
            self.engine.fail(request, error)
            self._short_since = None
            return
        if self.engine.has_work and self.engine.scheduler.shortage is not None:
            time.sleep(_PAUSE_S)

    def _short_for_good(self) -> tuple[Request, Exception] | None:
        """Who does not get memory by waiting for its turn, as one does that others are to lend to;
        and what it lacks. None for nobody."""
        scheduler, is_placed = self.engine.scheduler, self.engine.loans_are_placed
        short = scheduler.shortage or (scheduler.lacking if is_placed else None)
        if not self.engine.has_work:
            return None
        if short is None or not is_placed:
            return short
        request, error = short
        most = self.engine.admission.longest
        if request.num_tokens > most:
            return request, OutOfLoans(
                f"the request has {request.num_tokens} tokens by now, and all that lend to this "
                f"engine hold {most} with it: others have left"
            )
        return None if isinstance(error, OutOfLoans) else short

    # -- the machine under it ----------------------------------------------------------------

    def stats(self, *, fresh: bool = False) -> EngineStats:
        """What the engine held and had done a moment ago: at most a step and `_PUBLISH_S`.

        `fresh` counts now instead; it is for the driver alone.
        """
        if fresh:
            self._publish()
        return self._stats

    def memory_map(self) -> MemoryMap:
        """What each slot holds now; for the driver alone."""
        return draw_memory(self.engine, {**self.arrivals.slots(), **self.departures.slots()})

    def trim(self) -> int:
        """Give the memory of finished requests back to the system; returns the bytes."""
        self.engine.scheduler.exits.retry()
        num_bytes = self.engine.trim()
        self._publish()
        return num_bytes

    def limit_memory(self, num_bytes: int | None = None) -> None:
        """Keep keys and values within less than `kv_memory` from now on; None for that again.

        What finished requests hold beyond it goes back now, and live ones give way as they grow.
        What is let in goes by `kv_memory` still: a request that the limit could not hold alone
        fails after `shortage_wait_s`. Raises as `MemoryLimit.resize`, and InvalidOperation for the
        paged baseline, which has all of its memory.
        """
        limit = self.engine.cache.pool.shared_limit
        if limit is None:
            raise InvalidOperation(
                "kv='paged' takes its memory in advance and keeps it; use kv='virtual'"
            )
        limit.resize(num_bytes)
        self._publish()

    def _keep_limit(self) -> None:
        """What has ended since the limit went down goes back, if it is beyond that."""
        limit = self.engine.cache.pool.shared_limit
        if limit is not None:
            try:
                limit.enforce()
            except DriverError as error:  # of this engine's driver, or a neighbour's: later, then
                _log.warning("memory beyond the limit does not go back yet: %s", error)

    def load_adapter(self, name: str, path: str) -> None:
        """As `Adapters.load`. Raises InvalidOperation while asleep."""
        self._sleep.check_awake()
        self.engine.extras.adapters.load(name, path)
        self._publish()

    def unload_adapter(self, name: str) -> None:
        """As `Adapters.unload`."""
        self.engine.extras.adapters.unload(name)
        self._publish()

    def weights_changed(self) -> None:
        """As `Engine.weights_changed`. Raises InvalidOperation while asleep."""
        self._sleep.check_awake()
        self.engine.scheduler.exits.retry()
        self.engine.weights_changed()
        self._publish()

    def sleep(self, *, weights: bool = False) -> int:
        """Give all memory of keys and values back; returns the bytes (`Sleep.begin`)."""
        self.engine.scheduler.exits.retry()
        _refuse_if_moving(self.departures.num_under_way + self.arrivals.num_under_way)
        num_bytes = self._sleep.begin(weights=weights)
        self._publish()
        return num_bytes

    def wake(self) -> None:
        """End a `sleep`; harmless when awake."""
        self._sleep.end()

    def check_awake(self) -> None:
        """Raises InvalidOperation while asleep."""
        self._sleep.check_awake()

    def close(self) -> None:
        """Abort what is unfinished and give everything back. Closing twice is harmless.

        The last outputs are there to be taken, also if it raises. If the system refuses to take
        something back (DriverError), it may be closed again.
        """
        if not self.is_closed:
            self.is_closed = True  # first: whoever posts after this must see it
            self._open_inbox(())
            for request in self.engine.requests:
                self.engine.abort(request.key[0])
            self.departures.close()
            self.arrivals.close()
        if not self._is_given_back:
            self._close()
            self._is_given_back = True


def _refuse_if_moving(count: int) -> None:
    """Raises InvalidOperation if so many sequences are on their way, and not none."""
    if count:
        raise InvalidOperation(
            f"{count} sequences are on their way between this engine and others, and would lose "
            "their keys and values; wait for them, or abort them, before sleep()"
        )


def _refusal_of(message: Message, error: VkvError) -> list[StepOutput]:
    if isinstance(message, Resume):
        sequence = message.continuation
        return refusal(sequence.spec, error, (sequence.index,), epoch=sequence.epoch)
    assert isinstance(message, Add), message
    return refusal(message.spec, error)


def refusal(
    spec: RequestSpec,
    error: VkvError,
    indices: Iterable[int] | None = None,
    *,
    epoch: int = 0,
) -> list[StepOutput]:
    """The end of the sequences of a request that were never queued; of all, without `indices`."""
    return [
        StepOutput(
            request_id=spec.request_id,
            index=index,
            epoch=epoch,
            finish_reason="error",
            failure=Failure.of(error),
        )
        for index in (range(spec.params.n) if indices is None else indices)
    ]
