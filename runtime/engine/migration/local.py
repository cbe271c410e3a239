"""Several engines in one process, between which sequences move while they run."""

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from ...request.spec import RequestSpec, SequenceKey
from ...request.step_output import StepOutput
from ..loop import EngineLoop
from ..messages import Abort, Add, Finish, Resume, SetPriority
from .arbiter import Arbiter
from .carriers import Carrier, CopyCarrier
from .endpoints import MigrationSource, MigrationTarget
from .handshake import Stages
from .messages import Answer, Begin, Carry, Command, GoOn, Pause, Release

_ARBITER = ""  # the receiver of answers


class Channel(Protocol):
    """Brings commands and answers to whoever they are for. It may lose, double and reorder them."""

    def send(self, receiver: str, message: Command | Answer) -> None: ...

    def receive(self, receiver: str) -> list[Command | Answer]:
        """What has come for a receiver since the last call."""
        ...


class Post:
    """A channel that does none of that."""

    def __init__(self) -> None:
        self._boxes: dict[str, deque[Command | Answer]] = {}

    def send(self, receiver: str, message: Command | Answer) -> None:
        self._boxes.setdefault(receiver, deque()).append(message)

    def receive(self, receiver: str) -> list[Command | Answer]:
        return list(self._boxes.pop(receiver, ()))


class _Instance:
    """An engine with both of its ends."""

    def __init__(self, loop: EngineLoop, carrier: Carrier) -> None:
        self.loop = loop
        self._source = MigrationSource(loop, carrier)
        self._target = MigrationTarget(loop, carrier)

    def handle(self, command: Command) -> list[Answer]:
        if isinstance(command, Begin | Carry | Pause | GoOn | Release):
            return [*self._source.handle(command)]
        return [*self._target.handle(command)]

    def poll(self) -> list[Answer]:
        return [*self._source.poll(), *self._target.poll()]


class Migrations:
    """Turns the loops of several engines and moves sequences between them. For one thread.

    Args:
        loops: by name of the instance; driven by nobody else. They stay their owner's.
        stages: how migrations copy.
        carrier: carries keys and values; None to copy at once.
        channel: brings commands and answers; None for one that loses nothing.
        clock, repeat_s: as of `Arbiter`.

    Attributes:
        arbiter: says who owns what.
    """

    def __init__(
        self,
        loops: Mapping[str, EngineLoop],
        *,
        stages: Stages | None = None,
        carrier: Carrier | None = None,
        channel: Channel | None = None,
        clock: Callable[[], float] = time.monotonic,
        repeat_s: float = 0.1,
    ) -> None:
        carrier = carrier or CopyCarrier()
        self._instances = {name: _Instance(loop, carrier) for name, loop in loops.items()}
        self._channel = channel or Post()
        self.arbiter = Arbiter(stages=stages, clock=clock, repeat_s=repeat_s)

    @property
    def instances(self) -> list[str]:
        """Those that are not dead."""
        return list(self._instances)

    @property
    def has_work(self) -> bool:
        """True while there is something to turn for."""
        loops = (instance.loop for instance in self._instances.values())
        return self.arbiter.num_moving > 0 or any(loop.has_work for loop in loops)

    def add(self, spec: RequestSpec, instance: str) -> None:
        """Queue a request with an instance."""
        self.arbiter.add(spec, instance)
        self._send()

    def migrate(self, key: SequenceKey, target: str) -> int:
        """As `Arbiter.migrate`; it goes on in the next turns."""
        return self.arbiter.migrate(key, target)

    def tell(self, message: Finish | Abort | SetPriority) -> None:
        """As `Arbiter.tell`."""
        self.arbiter.tell(message)
        self._send()

    def died(self, instance: str) -> None:
        """An instance is gone; its sequences go on with the first of the others."""
        del self._instances[instance]
        self.arbiter.died(instance)

    def turn(self, resting: Collection[str] = ()) -> list[StepOutput]:
        """Deliver what is to be told and run one step of each engine; returns what counts.

        Those that are `resting` neither read nor step.
        """
        outputs = self.arbiter.accept()
        for orphan in self.arbiter.take_orphans():
            self.arbiter.resume(orphan, next(iter(self._instances)))
        self._send()
        for name, instance in list(self._instances.items()):
            if name in resting:
                continue
            if instance.loop.has_mail:  # what was told before these commands is done before them
                outputs += self.arbiter.accept(instance.loop.carry_out())
            answers: list[Answer] = []
            for command in self._channel.receive(name):
                answers += instance.handle(command)  # type: ignore[arg-type]
            outputs += self.arbiter.accept(instance.loop.turn())
            for answer in (*answers, *instance.poll()):
                self._channel.send(_ARBITER, answer)
        for answer in self._channel.receive(_ARBITER):
            self.arbiter.on(answer)  # type: ignore[arg-type]
        return outputs + self.arbiter.accept()

    def _send(self) -> None:
        for name, message in self.arbiter.take():
            instance = self._instances.get(name)
            if instance is None:
                continue
            if isinstance(message, Add | Resume | Finish | Abort | SetPriority):
                instance.loop.post(message)
            else:
                self._channel.send(name, message)
