"""An engine in another process, as a front process sees it."""

import asyncio
import itertools
import logging
import socket
import time
import weakref
from collections.abc import Callable, Sequence

import msgspec

from ...vmem.errors import EngineDied, InvalidOperation, UsageError
from ...vmem.process import ProcessOwner
from ..engine.memory.memory_map import MemoryMap
from ..engine.messages import Abort, Add, Message
from ..engine.stats import EngineStats
from ..frontend.driving.sinks import Sink, give
from ..request.step_output import StepOutput
from .face import Face
from .messages import (
    Answer,
    Ask,
    FromEngine,
    Outputs,
    Pulse,
    Question,
    Welcome,
    decode_from_engine,
    encode,
)
from .wire import Frames

_CALL_AGAIN_S = 0.1  # while no engine answers

_log = logging.getLogger(__name__)


class RemoteEngine:
    """The way to an engine's process, and what is known of it. Of one event loop.

    It calls at a socket's path, again whenever the engine has died, until it is closed. What was
    under way when it died ends with EngineDied.

    Args:
        path: of the engine's socket.

    Attributes:
        on_welcome: called with the `Face` of each engine that answers.
        on_refusal: never called: an engine's process that cannot load its model says so itself.
        stats: of the last pulse; None before the first.
        error: as of `EnginePort`.
        has_died: an engine that had answered is gone, and none has answered since.
    """

    def __init__(self, path: str) -> None:
        self.on_welcome: Callable[[Face], None] = lambda face: None
        self.on_refusal: Callable[[UsageError], None] = lambda error: None
        self.stats: EngineStats | None = None
        self.error: BaseException | None = None
        self.is_asleep = False
        self.has_died = False
        self._path = path
        self._owner = ProcessOwner("this server")
        self._frames: Frames | None = None
        self._is_welcome = False
        self._is_closed = False
        self._sinks: weakref.WeakValueDictionary[str, Sink] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[int | MemoryMap | None]] = {}
        self._moved_s = time.monotonic()  # when the engine last got on, or had nothing to do
        self._num_steps = 0

    # -- the connection ------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """True while an engine that has loaded its model is there."""
        return self._is_welcome

    @property
    def stuck_s(self) -> float:
        """For how long requests have waited without a step."""
        return time.monotonic() - self._moved_s if len(self._sinks) else 0.0

    async def stay_connected(self) -> None:
        """Call the engine, and call again when it is gone; until cancelled."""
        self._loop = asyncio.get_running_loop()
        while not self._is_closed:
            if self._frames is None:
                self._call()
            await asyncio.sleep(_CALL_AGAIN_S)

    def _call(self) -> None:
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:  # no descriptor is left, say: there may be one the next time
            _log.warning("the engine's process could not be called: %s", error)
            return
        connection.setblocking(False)  # to connect would wait where the line of callers is full
        try:
            connection.connect(self._path)
        except OSError:  # nobody there yet
            connection.close()
            return
        self._frames = Frames(connection)
        self._loop.add_reader(self._frames, self._read)

    def close(self) -> None:
        """Hang up: the engine drops what is unfinished."""
        self._is_closed = True
        self._hang_up(InvalidOperation("the server is shutting down"))

    def _hang_up(self, error: EngineDied | InvalidOperation) -> None:
        if self._frames is not None:
            self._loop.remove_reader(self._frames)
            self._loop.remove_writer(self._frames)
            self._frames.close()
            self._frames = None
        self._is_welcome = False
        self.error = error
        for future in self._asked.values():
            if not future.done():
                future.set_exception(error)
        self._asked.clear()
        for reference in self._sinks.valuerefs():
            sink = reference()
            if sink is not None:
                sink.fail(error)
        self._sinks.clear()

    # -- as of `EnginePort` --------------------------------------------------------------------

    def check_process(self) -> None:
        """As of `EnginePort`."""
        self._owner.check()

    def check_open(self) -> None:
        """As of `EnginePort`; raises EngineDied while there is no engine."""
        self._owner.check()
        if self._is_closed:
            raise InvalidOperation("the server is shutting down")
        if not self._is_welcome:
            raise EngineDied("the engine is not there; try again once it has come back")

    def submit(self, sinks: Sequence[Sink]) -> None:
        """As of `EnginePort`."""
        self.check_open()
        if not len(self._sinks):
            self._moved_s = time.monotonic()
        for sink in sinks:
            self._sinks[sink.spec.request_id] = sink
            self._send(Add(sink.spec))

    def abandon(self, sinks: Sequence[Sink]) -> None:
        """As of `EnginePort`."""
        for sink in sinks:
            if not sink.is_finished and self._sinks.pop(sink.spec.request_id, None) is not None:
                self.post(Abort(sink.spec.request_id))

    def post(self, message: Message) -> None:
        """As of `EnginePort`, on the event loop's thread."""
        self._send(message)

    async def memory_map(self) -> MemoryMap:
        """What each slot of the engine holds. Raises EngineDied while there is no engine."""
        answer = await self.ask("memory_map")
        assert isinstance(answer, MemoryMap), answer
        return answer

    async def ask(self, question: Question, *about: str) -> int | MemoryMap | None:
        """As of `EngineLink`."""
        self.check_open()
        number = next(self._numbers)
        future: asyncio.Future[int | MemoryMap | None] = self._loop.create_future()
        self._asked[number] = future
        self._send(Ask(number, question, about))
        return await future

    def _send(self, message: Message | Ask) -> None:
        if self._frames is None:
            return
        try:
            self._frames.write(encode(message))
        except OSError:
            self._died()
            return
        if self._frames.has_kept:
            self._loop.add_writer(self._frames, self._flush)

    def _flush(self) -> None:
        assert self._frames is not None
        try:
            self._frames.flush()
        except OSError:
            self._died()
            return
        if not self._frames.has_kept:
            self._loop.remove_writer(self._frames)

    # -- what comes ----------------------------------------------------------------------------

    def _read(self) -> None:
        assert self._frames is not None
        try:
            messages = self._frames.read()
        except EOFError:
            self._died()
            return
        for packed in messages:
            try:
                message = decode_from_engine(packed)
            except msgspec.MsgspecError as error:  # what follows cannot be trusted
                _log.error("the engine's process says what nobody says here: %s", error)
                self._died()
                return
            self._take(message)

    def _died(self) -> None:
        _log.error("the engine's process is gone")
        self.has_died = True
        self._hang_up(EngineDied("the process that had the engine has ended"))

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            self._moved_s = time.monotonic()
            for output in message.outputs:
                self._route(output)
        elif isinstance(message, Pulse):
            self.stats, self.is_asleep = message.stats, message.is_asleep
            if message.stats.num_steps != self._num_steps:
                self._num_steps, self._moved_s = message.stats.num_steps, time.monotonic()
        elif isinstance(message, Answer):
            self._answer(message)
        else:
            assert isinstance(message, Welcome), message
            self.on_welcome(Face.unpack(message.face))
            self.error, self._is_welcome, self.has_died = None, True, False

    def _answer(self, answer: Answer) -> None:
        future = self._asked.pop(answer.number, None)
        if future is None or future.done():
            return
        if answer.failure is not None:
            future.set_exception(answer.failure.error())
        else:
            future.set_result(answer.value)

    def _route(self, output: StepOutput) -> None:
        sink = self._sinks.get(output.request_id)
        if sink is None:
            if output.finish_reason is None:  # its stream was dropped
                self._send(Abort(output.request_id))
            return
        for message in give(sink, output):
            self._send(message)
        if sink.is_finished:
            self._sinks.pop(output.request_id, None)
