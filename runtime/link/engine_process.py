"""The process that has the engine: messages in, steps, outputs out.

It is told by its standard input what to load (`EngineOrder`). That pipe is its lifeline, too: when
it ends, the parent is gone, and so is this process, whatever it is doing.
"""

import functools
import gc
import logging
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ...vmem.errors import InvalidOperation, UsageError, VkvError
from ..engine.build import build_loop, load
from ..engine.config import EngineConfig
from ..engine.loop import EngineLoop, refusal
from ..engine.memory.lending import LendingReport
from ..engine.messages import Abort, Add, Finish, Resume, SetPriority
from ..engine.migration.messages import Answer as MoveAnswer
from ..engine.migration.messages import Cancel, Command, Commit, GoOn, Release, WentOn
from ..request.spec import SequenceKey
from ..request.step_output import Failure, StepOutput
from .addresses import Listener
from .carrier import SocketCarrier
from .face import Face
from .messages import (
    Answer,
    Ask,
    FromEngine,
    Outputs,
    Pulse,
    ToEngine,
    Welcome,
    decode_to_engine,
    encode,
)
from .moving import MoveEnds
from .preparing import Preparing
from .wire import Frames

REFUSED = 2  # exit status: what was asked for cannot be, and standard error says why

_PULSE_S = 0.2  # between pulses while the engine works
_SETTLE_POLL_S = 0.02  # between two looks whether what was copied and written is there
_MOVE_POLL_S = 0.002  # between two looks at what is on its way, while nothing else is done
_NO_ROOM_S = 0.01  # before who calls is looked at again, where the system has no room for it
_MOST_KEPT_BYTES = 256 << 20  # of outputs that a front does not read, before it is hung up on

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineOrder:
    """What an engine's process is to load.

    Attributes:
        model, device, dtype: as of `LLM`.
        options: of `EngineConfig`.
        listener: the descriptor of the socket on which front processes call.
    """

    model: str | None
    device: str
    dtype: str
    options: dict[str, Any]
    listener: int


class Lending(Protocol):
    """What an engine has with others."""

    def obey(self, order: str) -> None:
        """Have no more with them than a `LendingOrder` says, which is JSON."""
        ...

    def report(self) -> LendingReport | None:
        """What it has with them now."""
        ...


@dataclass(eq=False)
class _Front:
    """A front process that has called.

    Attributes:
        unfinished: its requests, each with those of its outputs that have not ended.
        heard_s: when it last said anything.
    """

    frames: Frames
    heard_s: float
    unfinished: dict[str, set[int]] = field(default_factory=dict)


class EngineServer:
    """Turns a loop for the front processes that call, in one thread.

    A front that hangs up has its requests dropped before the next step. One class, since one thread
    turns the loop, hears the fronts and answers them, between two steps.

    Args:
        listener: where fronts call; those that it accepts are believed.
        carrier: carries keys and values of sequences that move; None where none ever does.
        lending: what this engine has with others; None for nothing.
        silence_s: a front that says nothing for so long, not even "ping", counts as gone; None
            where the system tells of every end, as within a machine.
        on_deserted: called when the last front has gone; None to wait for the next.
    """

    def __init__(
        self,
        loop: EngineLoop,
        face: Face,
        listener: Listener,
        *,
        idle_trim_s: float | None,
        carrier: SocketCarrier | None = None,
        lending: Lending | None = None,
        silence_s: float | None = None,
        on_deserted: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._welcome = encode(Welcome(face.pack()))
        self._listener = listener
        self._idle_trim_s = idle_trim_s
        self._silence_s = silence_s
        self._on_deserted = on_deserted
        self._fronts: dict[str, _Front] = {}  # by request
        self._all_fronts: list[_Front] = []
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._carrier = carrier
        self._lending = lending
        self._is_leaving = False
        self._moves = None if carrier is None else MoveEnds(loop, carrier)
        self._movers: dict[SequenceKey, _Front] = {}  # who commands a sequence's move
        self._preparing = Preparing(loop.engine.grammars)
        self._selector.register(self._preparing, selectors.EVENT_READ, self._preparing)
        self._pulse_s = 0.0
        self._trim_at_s: float | None = None  # on the monotonic clock

    @property
    def path(self) -> str:
        """Where it listens."""
        return self._listener.getsockname()

    def run(self) -> None:
        """Serve until the process ends."""
        while True:
            self.turn()

    def close(self) -> None:
        """Hang up on all fronts."""
        for front in list(self._all_fronts):
            self._drop(front)
        self._selector.close()
        self._preparing.close()

    def turn(self) -> None:
        """Take what has come, wait if there is nothing to do, and run one step."""
        self._receive(0 if self._loop.has_work else self._idle_wait_s())
        self._drop_silent_fronts()
        if not self._loop.has_work:
            self._rest()
            self._go_on_moving()
            return
        self._trim_at_s = None
        self._deliver(self._loop.turn())
        if self._loop.has_mail:
            self._deliver(self._loop.carry_out())
        self._go_on_moving()
        if not self._loop.has_work and self._idle_trim_s is not None:
            self._trim_at_s = time.monotonic() + self._idle_trim_s
        if time.monotonic() - self._pulse_s > _PULSE_S or not self._loop.has_work:
            self._pulse()

    # -- at rest -------------------------------------------------------------------------------

    def _idle_wait_s(self) -> float | None:
        """For how long nothing needs doing, if nobody calls; None for ever."""
        if self._moves is not None and self._moves.is_busy:
            return _MOVE_POLL_S
        if not self._loop.is_settled:
            return _SETTLE_POLL_S
        now_s = time.monotonic()
        until = [] if self._trim_at_s is None else [self._trim_at_s]
        if self._silence_s is not None:
            until += [front.heard_s + self._silence_s for front in self._all_fronts]
        return max(0.0, min(until) - now_s) if until else None

    def _rest(self) -> None:
        if not self._loop.is_settled:
            self._loop.settle()
            if self._loop.is_settled:
                self._pulse()
        if self._trim_at_s is not None and time.monotonic() >= self._trim_at_s:
            self._trim_at_s = None
            self._loop.trim()
            self._pulse()
        if self._moves is not None and self._moves.is_busy:
            self._deliver(self._loop.carry_out())

    # -- sequences that move -------------------------------------------------------------------

    def _move(self, front: _Front, command: Command) -> None:
        """Carry out a command of whoever decides where sequences are."""
        if self._moves is None:
            _log.error("%s is not for this engine, whose sequences stay", command)
            return
        if self._loop.has_mail:  # what came before a command is done before it
            self._deliver(self._loop.carry_out())
        self._movers[command.key] = front
        if isinstance(command, Commit | GoOn):  # its outputs are for who commands it
            self._expect(front, command.key)
        answers = self._moves.handle(command)
        self._answer_moves([self._with_prepared(answer) for answer in answers])
        may_end = isinstance(command, Commit | GoOn | Cancel | Release)
        if may_end and not self._has(command.key):  # or it has ended long ago
            self._note_end(*command.key)

    def _has(self, key: SequenceKey) -> bool:
        return self._preparing.has(key[0]) or self._loop.engine.find(key) is not None

    def _with_prepared(self, answer: MoveAnswer) -> MoveAnswer:
        """A sequence whose grammar is compiled is here, though the engine does not know it yet."""
        if isinstance(answer, WentOn) and self._preparing.has(answer.key[0]):
            return WentOn(answer.key, answer.epoch, is_here=True)
        return answer

    def _go_on_moving(self) -> None:
        if self._moves is not None and self._movers:
            self._answer_moves(self._moves.poll())
            if not self._moves.is_busy:
                self._movers.clear()
                self._pulse()  # what has left by now is counted before this process is ended

    def _answer_moves(self, answers: list[MoveAnswer]) -> None:
        """Send answers, after the outputs of before."""
        if answers:
            self._deliver(self._loop.take_outputs())
        for answer in answers:
            front = self._movers.get(answer.key)
            if front is not None:
                self._send(front, encode(answer))

    def _expect(self, front: _Front, key: SequenceKey) -> None:
        """Outputs of a sequence are for a front."""
        request_id, index = key
        front.unfinished.setdefault(request_id, set()).add(index)
        self._fronts[request_id] = front

    # -- the fronts ----------------------------------------------------------------------------

    def _receive(self, timeout_s: float | None) -> None:
        for key, events in self._selector.select(timeout_s):
            if key.data is None:
                self._greet()
            elif key.data is self._preparing:
                self._take_prepared()
            elif events & selectors.EVENT_WRITE:
                self._send(key.data, None)
            if isinstance(key.data, _Front) and events & selectors.EVENT_READ:
                self._read(key.data)

    def _greet(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # it has hung up
            return
        except OSError as error:  # no descriptor is left, say: it calls on, and is heard later
            _log.warning("a front could not be let in: %s", error)
            time.sleep(_NO_ROOM_S)
            return
        front = _Front(Frames(connection), heard_s=time.monotonic())
        self._all_fronts.append(front)
        self._selector.register(connection, selectors.EVENT_READ, front)
        self._send(front, self._welcome)
        self._send(front, encode(self._stats()))

    def _read(self, front: _Front) -> None:
        if front not in self._all_fronts:
            return
        try:
            messages = [decode_to_engine(message) for message in front.frames.read()]
        except EOFError:
            self._drop(front)
            return
        except msgspec.MsgspecError as error:  # it is of another version; others are not
            _log.error("a front process says what nobody says here, and is given up: %s", error)
            self._drop(front)
            return
        front.heard_s = time.monotonic()
        for message in messages:
            self._take(front, message)

    def _take(self, front: _Front, message: ToEngine) -> None:
        if isinstance(message, Ask):
            if message.question == "load_adapter":  # its folder is read first, beside the loop
                act = functools.partial(self._do, front, message)
                self._preparing.do(lambda: self._read_adapter(*message.about), act)
            else:
                self._do(front, message)
            return
        if isinstance(message, Add):
            for index in range(message.spec.params.n):
                self._expect(front, (message.spec.request_id, index))
            if self._preparing.begin(message):
                return
        elif isinstance(message, Resume):
            self._expect(front, message.continuation.key)
        elif isinstance(message, Finish):  # no output comes back
            self._note_end(message.request_id, message.index)
        elif isinstance(message, SetPriority):
            self._preparing.set_priority(message.request_id, message.priority)
        elif not isinstance(message, Abort):
            self._move(front, message)
            return
        elif add := self._preparing.drop(message.request_id):
            self._deliver(_aborted(add))
            return
        self._loop.post(message)

    def _read_adapter(self, name: str, path: str) -> None:
        self._loop.engine.extras.adapters.prepare(path)

    def _do(self, front: _Front, ask: Ask) -> None:
        if front not in self._all_fronts:  # it has gone meanwhile
            return
        answer = encode(self._answer(ask))
        if ask.question not in ("memory_map", "ping"):  # which change nothing
            self._pulse()  # first: who has the answer sees what came of it
        self._send(front, answer)

    def _take_prepared(self) -> None:
        """Hand requests to the engine whose grammar is compiled, and refuse the others; do what
        else is prepared."""
        if self._is_leaving:
            self._pulse()
        for add, error in self._preparing.take():
            if error is None:
                self._loop.post(add)
            else:
                self._deliver(refusal(add.spec, error))
        for act in self._preparing.take_finished():
            act()

    def _answer(self, ask: Ask) -> Answer:
        if ask.question == "ping":
            return Answer(ask.number)
        calls: dict[str, Any] = {
            "sleep": self._loop.sleep,
            "sleep_weights": lambda: self._loop.sleep(weights=True),
            "wake": self._loop.wake,
            "trim": self._loop.trim,
            "limit_memory": lambda: self._loop.limit_memory(*map(int, ask.about)),
            "weights_changed": self._loop.weights_changed,
            "memory_map": self._loop.memory_map,
            "load_adapter": lambda: self._loop.load_adapter(*ask.about),
            "unload_adapter": lambda: self._loop.unload_adapter(*ask.about),
            "lending": lambda: self._obey(*ask.about),
        }
        try:
            self._deliver(self._loop.carry_out())
            return Answer(ask.number, calls[ask.question]())
        except VkvError as error:
            return Answer(ask.number, failure=Failure.of(error))

    def _obey(self, order: str) -> None:
        if self._lending is None:
            raise InvalidOperation("nothing is lent here, and nothing borrowed")
        self._lending.obey(order)

    def _drop(self, front: _Front) -> None:
        """A front has gone: nobody waits for its requests."""
        self._all_fronts.remove(front)
        self._movers = {key: other for key, other in self._movers.items() if other is not front}
        self._selector.unregister(front.frames)
        front.frames.close()
        for request_id in front.unfinished:
            self._fronts.pop(request_id, None)
            self._preparing.drop(request_id)
            self._loop.post(Abort(request_id))
        if not self._all_fronts and self._on_deserted is not None:
            self._on_deserted()

    def _drop_silent_fronts(self) -> None:
        """After what has come was read: a step may have taken longer than that."""
        if self._silence_s is None:
            return
        for front in list(self._all_fronts):
            silent_s = time.monotonic() - front.heard_s
            if silent_s > self._silence_s:
                _log.error("a front process has said nothing for %.0f s, and is given up", silent_s)
                self._drop(front)

    # -- outputs -------------------------------------------------------------------------------

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for_fronts: dict[int, tuple[_Front, list[StepOutput]]] = {}
        for output in outputs:
            front = self._fronts.get(output.request_id)
            if front is not None:
                for_fronts.setdefault(id(front), (front, []))[1].append(output)
                if output.finish_reason is not None:
                    self._note_end(output.request_id, output.index)
        for front, its in for_fronts.values():
            self._send(front, encode(Outputs(its)))

    def _note_end(self, request_id: str, index: int) -> None:
        """One of a request's outputs has ended."""
        front = self._fronts.get(request_id)
        if front is None:
            return
        unfinished = front.unfinished[request_id]
        unfinished.discard(index)
        if not unfinished:
            del front.unfinished[request_id], self._fronts[request_id]

    def _pulse(self) -> None:
        self._pulse_s = time.monotonic()
        pulse = encode(self._stats())
        for front in list(self._all_fronts):
            self._send(front, pulse)

    def _stats(self) -> FromEngine:
        stats, carrier = self._loop.stats(fresh=True), self._carrier
        if carrier is None:
            return Pulse(stats, self._loop.is_asleep)
        return Pulse(
            stats,
            self._loop.is_asleep,
            *carrier.num_carried,
            is_leaving=self._is_leaving,
            lending=None if self._lending is None else self._lending.report(),
        )

    def ask_to_leave(self) -> None:
        """Tell all fronts that the process is to end; from any thread, or a signal's handler."""
        self._is_leaving = True
        self._preparing.wake()

    def _send(self, front: _Front, message: bytes | None) -> None:
        """Send a message, or what was kept before; a front that is gone is dropped."""
        if front not in self._all_fronts:
            return
        try:
            front.frames.flush() if message is None else front.frames.write(message)
        except OSError:
            self._drop(front)
            return
        if front.frames.num_kept_bytes > _MOST_KEPT_BYTES:
            _log.error("a front process reads nothing; its requests are dropped")
            self._drop(front)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if front.frames.has_kept else 0)
        self._selector.modify(front.frames, events, front)


def _aborted(add: Add) -> list[StepOutput]:
    """The end of every sequence of a request that the engine never had."""
    return [
        StepOutput(request_id=add.spec.request_id, index=index, finish_reason="abort")
        for index in range(add.spec.params.n)
    ]


def main() -> None:
    """Load what standard input orders, and serve it until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    order: EngineOrder = pickle.load(sys.stdin.buffer)
    die_with_parent(sys.stdin.fileno())
    try:
        server = _build(order)
    except UsageError as error:
        print(f"vkv serve: {error}", file=sys.stderr)  # noqa: T201 - the command's last word
        sys.exit(REFUSED)
    gc.collect()
    gc.freeze()
    ready_mark(server.path).touch()
    server.run()


def die_with_parent(lifeline: int) -> None:
    """End this process when what it reads from the descriptor `lifeline` ends, whatever it does."""

    def watch() -> None:
        while os.read(lifeline, 1):  # not by a file, whose lock would outlive the interpreter
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="vkv-lifeline", daemon=True).start()


def ready_mark(path: str) -> Path:
    """A file that is there once the engine that listens at `path` has loaded its model."""
    return Path(path + ".ready")


def _build(order: EngineOrder) -> EngineServer:
    config = EngineConfig(**order.options)
    loaded = load(
        order.model, tokenizer=None, device=order.device, dtype=order.dtype, config=config
    )
    loop = build_loop(loaded, config)
    face = Face.of(loaded, loop.engine, config)
    listener = socket.socket(fileno=order.listener)
    return EngineServer(loop, face, listener, idle_trim_s=config.idle_trim_s)
