"""What a server asks of an engine, wherever it is."""

from typing import Protocol

from ..engine.memory.memory_map import MemoryMap
from ..engine.stats import EngineStats
from ..frontend.driving.port import EnginePort
from .messages import Question


class EngineLink(EnginePort, Protocol):
    """An engine's port, and what operators want to know of it."""

    @property
    def stats(self) -> EngineStats | None:
        """What it holds and has done, a moment ago; None if nothing is known yet."""
        ...

    @property
    def is_ready(self) -> bool:
        """True while it is there and has loaded its model."""
        ...

    @property
    def is_asleep(self) -> bool:
        """True while it sleeps."""
        ...

    @property
    def has_died(self) -> bool:
        """True if it was there and is not."""
        ...

    @property
    def stuck_s(self) -> float:
        """For how long requests have waited without a step."""
        ...

    async def memory_map(self) -> MemoryMap:
        """What its slots hold, between two steps."""
        ...

    async def ask(self, question: Question, *about: str) -> int | MemoryMap | None:
        """Have it do something between steps (`Ask`). Raises what it raises."""
        ...
