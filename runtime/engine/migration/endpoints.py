"""The two ends of a migration: each carries out commands of an arbiter, and answers them.

What was posted to the loop before a command came must be carried out before it is handled, and what
the engine said until then must be sent before the answers.
"""

import logging
import threading
from dataclasses import dataclass

from ....allocator.transfer import Incoming
from ....vmem.errors import DriverError, InvalidOperation, Shortage, UsageError
from ...execution.grammars import Grammars
from ...request.continuation import Continuation
from ...request.spec import SequenceKey
from ...request.structured_outputs import StructuredOutputsParams
from ..loop import EngineLoop
from .arrivals import Arrival
from .carriers import Carriage, Carrier
from .departures import Departure
from .messages import (
    Begin,
    Begun,
    Cancel,
    Cancelled,
    Carried,
    Carry,
    Commit,
    Committed,
    Ended,
    FromSource,
    FromTarget,
    GoOn,
    Pause,
    Paused,
    Prepare,
    Ready,
    Refused,
    Release,
    Released,
    ToSource,
    ToTarget,
    WentOn,
)
from .model_state import pack_state, unpack_state

_log = logging.getLogger(__name__)

_Move = tuple[SequenceKey, int]


def token_format_of(loop: EngineLoop) -> str:
    """What two engines must agree on to exchange keys and values."""
    token_format = loop.engine.cache.geometry.token_format
    return f"{token_format.dtype} {token_format.widths}"


def page_format_of(loop: EngineLoop, carrier: Carrier) -> str:
    """What two engines must agree on to hand pages over; empty where pages stay."""
    cache = loop.engine.cache
    if not (carrier.moves_pages and cache.loans.are_possible):
        return ""
    pages = f"{cache.loans.memory_name} {cache.pool.driver.page_bytes}"
    return f"{carrier.node} {pages} {cache.geometry.token_format}"


def model_of(loop: EngineLoop) -> str:
    """What two engines must agree on, that their keys and values mean the same; empty where nobody
    has asked for the model's fingerprint yet, which takes time."""
    fingerprint = loop.engine.fingerprint
    return "" if fingerprint is None else fingerprint.known


@dataclass
class _Stage:
    """What the source was last told to carry.

    Attributes:
        is_last: the sequence is away, and `Paused` follows.
        is_told: that it is over.
    """

    number: int
    carriage: Carriage | None
    is_last: bool
    is_told: bool = False


class MigrationSource:
    """The end that a sequence leaves. For the driver of its loop, between turns.

    Once it has said `Paused`, only `GoOn` and `Release` end the attempt; until then it may end it
    by itself, and says so (`Ended`).

    Args:
        loop: of the engine.
        carrier: carries keys and values.
    """

    def __init__(self, loop: EngineLoop, carrier: Carrier) -> None:
        self._loop = loop
        self._departures = loop.departures
        self._carrier = carrier
        self._token_format = token_format_of(loop)
        self._page_format = page_format_of(loop, carrier)
        self._stages: dict[_Move, _Stage] = {}
        self._paused: dict[_Move, Paused] = {}

    def handle(self, command: ToSource) -> list[FromSource]:
        """Carry out a command; what takes time is answered by `poll`."""
        move = command.key, command.epoch
        try:
            if isinstance(command, Begin):
                return [self._begin(command)]
            if isinstance(command, GoOn):
                return [self._go_on(command)]
            if isinstance(command, Release):
                self._forget(move)
                self._departures.release(*move)
                return [Released(*move)]
            departure = self._departures.extend(*move)
            if move in self._paused:
                return [self._paused[move]]
            self._carry(command, departure)
            self._stages[move].is_told = False
            return self._answers(move)
        except InvalidOperation as error:
            if isinstance(command, Release):
                _log.debug("nothing to release: %s", error)
                return [Released(*move)]
            if isinstance(command, Carry | Pause):
                self._give_up(move)
            return [Ended(*move, str(error))]

    def poll(self) -> list[FromSource]:
        """What is to be said of what was carried since the last call, and what ended by itself."""
        return [answer for move in list(self._stages) for answer in self._answers(move)]

    def _begin(self, command: Begin) -> Begun:
        departure = self._departures.begin(command.key, command.epoch, lease_s=command.lease_s)
        if departure.continuation is not None:
            continuation = departure.continuation
        else:
            assert departure.request is not None
            continuation = Continuation.of(departure.request, epoch=command.epoch)
        return Begun(
            command.key,
            command.epoch,
            continuation,
            departure.num_ready,
            self._token_format,
            self._page_format,
            model_of(self._loop),
        )

    def _go_on(self, command: GoOn) -> WentOn:
        is_here = self._departures.go_on(
            command.key,
            command.epoch,
            owner_epoch=command.owner_epoch,
            output_token_ids=command.output_token_ids,
        )
        self._forget((command.key, command.epoch))
        return WentOn(command.key, command.epoch, is_here)

    def _carry(self, command: Carry | Pause, departure: Departure) -> None:
        """Begin a stage, unless it or a later one has begun. Raises InvalidOperation."""
        move = command.key, command.epoch
        stage = self._stages.get(move)
        if stage is not None and stage.number >= command.stage:
            return
        stop = command.stop if isinstance(command, Carry) else departure.num_ready
        is_last = isinstance(command, Pause) and stop <= command.num_room
        if is_last:
            departure = self._departures.depart(*move)
        elif isinstance(command, Pause):  # there is no room for it yet
            stop = command.start
        carriage = None
        if stop > command.start:
            if departure.outgoing is None:
                raise InvalidOperation(f"{command.key} has lost its keys and values")
            carriage = self._carrier.carry(departure.outgoing, command.address, command.start, stop)
            departure.reading = carriage
        self._stages[move] = _Stage(command.stage, carriage, is_last)

    def _answers(self, move: _Move) -> list[FromSource]:
        """What is to be said of the stage under way now: nothing while it is carried."""
        stage = self._stages[move]
        carriage = stage.carriage
        try:
            departure = self._departures.check(*move)
            if stage.is_told or (carriage is not None and not carriage.is_done):
                return []
            if carriage is not None and carriage.error is not None:
                raise InvalidOperation(f"{move[0]} was not carried: {carriage.error}")
        except InvalidOperation as error:
            self._give_up(move)
            return [Ended(*move, str(error))]
        departure.reading = None
        if stage.is_last:
            return [self._pause(move, departure)]
        stage.is_told = True
        return [Carried(*move, stage.number, departure.num_ready)]

    def _pause(self, move: _Move, departure: Departure) -> Paused:
        """What is over there; from now on this engine does not decide any more."""
        assert departure.continuation is not None
        paused = Paused(
            *move,
            departure.continuation,
            departure.num_ready,
            pack_state(departure.model_state) if departure.num_ready else None,
        )
        self._paused[move] = paused
        self._stages.pop(move, None)
        return paused

    def _give_up(self, move: _Move) -> None:
        """End an attempt by itself."""
        self._forget(move)
        try:
            self._departures.go_on(*move)
        except InvalidOperation as error:
            _log.debug("%s: %s", move, error)

    def _forget(self, move: _Move) -> None:
        self._stages.pop(move, None)
        self._paused.pop(move, None)


class MigrationTarget:
    """The end that a sequence comes to. For the driver of its loop, between turns.

    A grammar that it does not know is compiled on a thread before it says that it is ready.

    Args:
        loop: of the engine.
        carrier: carries keys and values.
    """

    def __init__(self, loop: EngineLoop, carrier: Carrier) -> None:
        self._loop = loop
        self._grammars = loop.engine.grammars
        self._arrivals = loop.arrivals
        self._carrier = carrier
        self._token_format = token_format_of(loop)
        self._page_format = page_format_of(loop, carrier)
        self._compiling: dict[_Move, tuple[Prepare, threading.Thread]] = {}

    def handle(self, command: ToTarget) -> list[FromTarget]:
        """Carry out a command; a `Prepare` that takes time is answered by `poll`."""
        move = command.key, command.epoch
        if isinstance(command, Prepare):
            return self._prepare(command)
        if isinstance(command, Commit):
            return [self._commit(command)]
        if isinstance(command, Cancel):
            self._compiling.pop(move, None)
            self._arrivals.abort(*move)
            return [Cancelled(*move)]
        try:
            arrival = self._arrivals.extend(*move, command.num_room)
        except (Shortage, DriverError, InvalidOperation) as error:
            return [Refused(*move, "extend", str(error))]
        return [self._ready(move, arrival)]

    def _ready(self, move: _Move, arrival: Arrival) -> Ready:
        incoming = arrival.incoming
        if incoming is None:
            return Ready(*move, b"", 0, arrival.num_room)
        address = self._carrier.offer(incoming)
        return Ready(*move, address, arrival.num_held, arrival.num_room, incoming.by_pages)

    def poll(self) -> list[FromTarget]:
        """What can be said of what was to be prepared, once its grammar is known."""
        done = [prepare for prepare, thread in self._compiling.values() if not thread.is_alive()]
        for prepare in done:
            del self._compiling[prepare.key, prepare.epoch]
        return [answer for prepare in done for answer in self._make_ready(prepare)]

    def _prepare(self, command: Prepare) -> list[FromTarget]:
        move = command.key, command.epoch
        outputs, grammars = command.continuation.spec.params.structured_outputs, self._grammars
        if outputs is None or grammars is None or grammars.knows(outputs):
            return self._make_ready(command)
        if move not in self._compiling:
            thread = threading.Thread(
                target=_compile, args=(grammars, outputs), name="vkv-prepare", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # there can be no more threads
                return [Refused(*move, "prepare", str(error))]
            self._compiling[move] = command, thread
        return []

    def _make_ready(self, command: Prepare) -> list[FromTarget]:
        move = command.key, command.epoch
        try:
            self._check(command)
            arrival = self._arrivals.begin(
                command.continuation,
                command.num_tokens,
                num_room=command.num_room,
                lease_s=command.lease_s,
                by_pages=bool(self._page_format) and command.page_format == self._page_format,
            )
        except (UsageError, InvalidOperation, Shortage, DriverError) as error:
            return [Refused(*move, "prepare", str(error))]
        if arrival.incoming is not None:
            arrival.writing = _Offered(self._carrier, arrival.incoming)
        return [self._ready(move, arrival)]

    def _check(self, command: Prepare) -> None:
        """Keys and values must mean here what they mean there. Raises InvalidOperation."""
        if command.num_tokens and command.token_format != self._token_format:
            raise InvalidOperation(
                f"tokens of {command.token_format} cannot become {self._token_format}; use one "
                "model and dtype"
            )
        model = model_of(self._loop)
        if command.model and model and command.model != model:
            raise InvalidOperation(
                f"the source's model is {command.model} and this one's {model}, so their tokens "
                "differ; put the same files, dtype and options on each node"
            )

    def _commit(self, command: Commit) -> FromTarget:
        move = command.key, command.epoch
        try:
            self._arrivals.commit(
                command.continuation, command.num_tokens, unpack_state(command.model_state)
            )
        except (UsageError, InvalidOperation) as error:
            return Refused(*move, "commit", str(error))
        return Committed(*move)


class _Offered:
    """Memory that a carrier may write to."""

    def __init__(self, carrier: Carrier, incoming: Incoming) -> None:
        self._carrier = carrier
        self._incoming = incoming

    def cancel(self) -> None:
        self._carrier.withdraw(self._incoming)


def _compile(grammars: Grammars, outputs: StructuredOutputsParams) -> None:
    """Have a grammar at hand; a refusal is said again to whoever wants it."""
    try:
        grammars.prepare(outputs)
    except UsageError as error:
        _log.debug("%s", error)
