"""The same server over an `AsyncLLM`, in one process."""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ...vmem.errors import InvalidConfig
from ..engine.memory.memory_map import MemoryMap
from ..engine.messages import Message
from ..engine.stats import EngineStats
from ..frontend.async_llm import AsyncLLM
from ..frontend.driving.sinks import Sink
from ..link.face import Face
from ..link.messages import Question
from .http.app import build_app
from .options import ServeOptions
from .server import Server


def app_of(llm: AsyncLLM, **options: Any) -> Callable[..., Awaitable[None]]:
    """An ASGI application that serves a model of this process, to be run by any ASGI server.

    Args:
        llm: open for as long as the application is used.
        options: of `ServeOptions`; those of addresses and processes mean nothing here.

    Example:
        >>> uvicorn.run(app_of(AsyncLLM()))
    """
    resolved = ServeOptions(**options)
    if resolved.tenant_weights and resolved.tenant_weights != llm.config.tenant_weights:
        raise InvalidConfig(
            f"api_key_file has the weights {resolved.tenant_weights}, and the model has others; "
            "give them to AsyncLLM as tenant_weights"
        )
    server = Server(resolved, LocalEngine(llm))
    server.meet(Face.of(llm.loaded, llm.engine, llm.config), llm.engine.grammars)
    return build_app(server)


class LocalEngine:
    """An `AsyncLLM` as `EngineLink` has it."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._moved_s = time.monotonic()
        self._num_steps = 0

    @property
    def error(self) -> BaseException | None:
        """As of `EnginePort`."""
        return self._llm.port.error

    @property
    def stats(self) -> EngineStats | None:
        """As of `EngineLink`."""
        return self._llm.stats()

    @property
    def is_ready(self) -> bool:
        """As of `EngineLink`."""
        return not self.has_died

    @property
    def is_asleep(self) -> bool:
        """As of `EngineLink`."""
        return self._llm.is_asleep

    @property
    def has_died(self) -> bool:
        """As of `EngineLink`."""
        return self._llm.port.error is not None

    @property
    def stuck_s(self) -> float:
        """As of `EngineLink`; it counts from one look to the next."""
        stats, now = self._llm.stats(), time.monotonic()
        if stats.num_steps != self._num_steps or not stats.num_running + stats.num_waiting:
            self._num_steps, self._moved_s = stats.num_steps, now
        return now - self._moved_s

    async def ask(self, question: Question, *about: str) -> int | None:
        """As of `EngineLink`."""
        if question == "load_adapter":
            return await self._llm.load_adapter(*about)
        if question == "unload_adapter":
            return await self._llm.unload_adapter(*about)
        if question == "wake":
            return await self._llm.wake()
        if question == "weights_changed":
            return await self._llm.weights_changed()
        if question == "trim":
            return await self._llm.trim()
        return await self._llm.sleep(weights=question == "sleep_weights")

    async def memory_map(self) -> MemoryMap:
        """As of `EngineLink`."""
        return await self._llm.memory_map()

    def check_process(self) -> None:
        """As of `EnginePort`."""
        self._llm.port.check_process()

    def check_open(self) -> None:
        """As of `EnginePort`."""
        self._llm.port.check_open()

    def submit(self, sinks: Sequence[Sink]) -> None:
        """As of `EnginePort`."""
        self._llm.port.submit(sinks)

    def abandon(self, sinks: Sequence[Sink]) -> None:
        """As of `EnginePort`."""
        self._llm.port.abandon(sinks)

    def post(self, message: Message) -> None:
        """As of `EnginePort`."""
        self._llm.port.post(message)
