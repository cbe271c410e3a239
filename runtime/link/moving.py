"""Sequences that leave an engine's process and come to it, as its callers command."""

from ..engine.loop import EngineLoop
from ..engine.migration.carriers import Carrier
from ..engine.migration.endpoints import MigrationSource, MigrationTarget
from ..engine.migration.messages import (
    Answer,
    Begin,
    Carry,
    Command,
    GoOn,
    Pause,
    Release,
)


class MoveEnds:
    """Both ends of an engine's migrations. For the driver of its loop, between turns.

    Args:
        loop: of the engine.
        carrier: carries keys and values from process to process.
    """

    def __init__(self, loop: EngineLoop, carrier: Carrier) -> None:
        self._loop = loop
        self._source = MigrationSource(loop, carrier)
        self._target = MigrationTarget(loop, carrier)

    @property
    def is_busy(self) -> bool:
        """True while sequences are on their way: time may bring something by itself."""
        return self._loop.departures.num_under_way + self._loop.arrivals.num_under_way > 0

    def handle(self, command: Command) -> list[Answer]:
        """Carry out a command; what takes time is answered by `poll`."""
        if isinstance(command, Begin | Carry | Pause | GoOn | Release):
            return [*self._source.handle(command)]
        return [*self._target.handle(command)]

    def poll(self) -> list[Answer]:
        """What is to be said of what was begun."""
        return [*self._source.poll(), *self._target.poll()]
