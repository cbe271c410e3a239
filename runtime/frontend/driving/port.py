"""Where requests are handed to an engine, wherever it is."""

from collections.abc import Sequence
from typing import Protocol

from ...engine.messages import Message
from .sinks import Sink


class EnginePort(Protocol):
    """The way to an engine: to a thread of this process, or to another process."""

    @property
    def error(self) -> BaseException | None:
        """What ended the engine before its time, or None."""
        ...

    def check_process(self) -> None:
        """Raises ForkedProcess in a child of a fork."""
        ...

    def check_open(self) -> None:
        """Raises InvalidOperation once closed, and as `check_process`."""
        ...

    def submit(self, sinks: Sequence[Sink]) -> None:
        """Queue requests, whose outputs go to the sinks. Raises InvalidOperation."""
        ...

    def abandon(self, sinks: Sequence[Sink]) -> None:
        """Drop requests that nobody waits for any more; a finaliser may call it."""
        ...

    def post(self, message: Message) -> None:
        """Tell the engine something. From any thread, and by finalisers."""
        ...
