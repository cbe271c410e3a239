"""The way to one instance: messages there, outputs and answers back."""

import asyncio
import itertools
import logging
import socket
from typing import Protocol

import msgspec

from ....vmem.errors import EngineDied
from ...engine.memory.memory_map import MemoryMap
from ...engine.messages import Message
from ...engine.migration.messages import Answer as MoveAnswer
from ...engine.migration.messages import Command
from ...link.face import Face
from ...link.messages import (
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
from ...link.wire import Frames
from ...request.step_output import StepOutput

_PING_S = 1.0

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who hears what an instance says, in order."""

    def on_outputs(self, instance: int, outputs: list[StepOutput]) -> None: ...
    def on_answer(self, instance: int, answer: MoveAnswer) -> None: ...
    def on_pulse(self, instance: int, pulse: Pulse) -> None: ...
    def on_face(self, instance: int, face: Face) -> None: ...
    def on_gone(self, instance: int, why: str) -> None: ...


class InstanceLink:
    """A connection to an instance. Of one event loop.

    An instance that hangs up is gone, and so is one that answers nothing for `liveness_s`, as a
    stopped process does, or a machine that cannot be reached. A step that takes longer than that
    looks the same. Time in which this loop stood still itself, as where all was frozen, counts not.

    Args:
        connection: to it; this object's from now on.
        listener: is told what comes; after `on_gone` nothing.
    """

    def __init__(
        self,
        instance: int,
        connection: socket.socket,
        listener: Listener,
        *,
        liveness_s: float,
    ) -> None:
        self.instance = instance
        self._listener = listener
        self._liveness_s = liveness_s
        self._loop = asyncio.get_running_loop()
        self._frames: Frames | None = Frames(connection)
        self._numbers = itertools.count()
        self._pinged_s: float | None = None  # unanswered since
        self._asked: dict[int, asyncio.Future[int | MemoryMap | None]] = {}
        self._loop.add_reader(self._frames, self._read)
        self._due_s = self._loop.time() + _PING_S
        self._pinging = self._loop.call_at(self._due_s, self._ping)

    def send(self, message: Message | Command | Ask) -> None:
        """Send, or keep what the system does not take at once. Without effect once it is gone."""
        if self._frames is None:
            return
        try:
            self._frames.write(encode(message))
        except OSError as error:
            self._end(f"it has hung up: {error}")
            return
        if self._frames.has_kept:
            self._loop.add_writer(self._frames, self._flush)

    def ask(self, question: Question, *about: str) -> "asyncio.Future[int | MemoryMap | None]":
        """Have it do something between steps; what comes of it, or why not."""
        number = next(self._numbers)
        future = self._asked[number] = self._loop.create_future()
        self.send(Ask(number, question, about))
        if self._frames is None:
            self._fail_asked()
        return future

    @property
    def silent_s(self) -> float:
        """For how long it has not answered; 0 if it owes no answer. A step may take that long."""
        return 0.0 if self._pinged_s is None else self._loop.time() - self._pinged_s

    def close(self) -> None:
        """Hang up; nobody is told but those that have asked."""
        self._pinging.cancel()
        self._fail_asked()
        frames, self._frames = self._frames, None
        if frames is not None:
            self._loop.remove_reader(frames)
            self._loop.remove_writer(frames)
            frames.close()

    def _ping(self) -> None:
        now_s = self._loop.time()
        if self._pinged_s is not None:
            self._pinged_s += max(0.0, now_s - self._due_s)  # nobody looked for an answer then
        if self._pinged_s is None:
            self._pinged_s = now_s
            self.send(Ask(next(self._numbers), "ping"))
        elif now_s - self._pinged_s > self._liveness_s:
            self._end(f"it has answered nothing for {now_s - self._pinged_s:.0f} s")
            return
        if self._frames is not None:
            self._due_s = now_s + min(_PING_S, self._liveness_s / 2)
            self._pinging = self._loop.call_at(self._due_s, self._ping)

    def _fail_asked(self) -> None:
        for future in self._asked.values():
            if not future.done():
                future.set_exception(EngineDied(f"instance {self.instance} is gone"))
        self._asked.clear()

    def _answered(self, answer: Answer) -> None:
        future = self._asked.pop(answer.number, None)
        if future is None:
            self._pinged_s = None
        elif not future.done() and answer.failure is not None:
            future.set_exception(answer.failure.error())
        elif not future.done():
            future.set_result(answer.value)

    def _flush(self) -> None:
        assert self._frames is not None
        try:
            self._frames.flush()
        except OSError as error:
            self._end(f"it has hung up: {error}")
            return
        if not self._frames.has_kept:
            self._loop.remove_writer(self._frames)

    def _read(self) -> None:
        assert self._frames is not None
        try:
            messages = self._frames.read()
        except EOFError as error:
            self._end(str(error))
            return
        for packed in messages:
            if self._frames is None:  # what came before has ended it
                return
            try:
                message = decode_from_engine(packed)
            except msgspec.MsgspecError as error:
                self._end(f"it says what nobody says here ({error}); use one vkv on all nodes")
                return
            try:
                self._take(message)
            except Exception:  # noqa: BLE001 - logged; what came behind it counts all the same
                _log.exception("what instance %d said was not heeded", self.instance)

    def _take(self, message: FromEngine) -> None:
        instance, listener = self.instance, self._listener
        if isinstance(message, Outputs):
            listener.on_outputs(instance, message.outputs)
        elif isinstance(message, Pulse):
            listener.on_pulse(instance, message)
        elif isinstance(message, Answer):
            self._answered(message)
        elif isinstance(message, Welcome):
            listener.on_face(instance, Face.unpack(message.face))
        else:
            listener.on_answer(instance, message)

    def _end(self, why: str) -> None:
        if self._frames is not None:
            self.close()
            _log.error("instance %d is gone: %s", self.instance, why)
            self._listener.on_gone(self.instance, why)
