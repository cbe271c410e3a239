"""Turns an engine's loop on a thread of its own."""

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

from ....vmem.at_exit import stop_at_exit
from ....vmem.errors import VkvError
from ...engine.loop import EngineLoop
from ...engine.messages import Message
from .driver import LoopDriver
from .sinks import Sink

_log = logging.getLogger(__name__)

_SETTLE_POLL_S = 0.02  # between two looks whether what was copied and written is there


class EngineThread:
    """Turns a loop on a thread of its own, while there is something to do.

    Attributes:
        driver: for requests, and for what else there is to ask of the loop.
        error: what ended the thread before its time, or None.
    """

    def __init__(self, loop: EngineLoop, *, idle_trim_s: float | None) -> None:
        self._loop = loop
        self._calls: SimpleQueue[bool] = SimpleQueue()  # False: stop. A finaliser may `put`.
        calls = self._calls
        self.driver = LoopDriver(loop, idle_trim_s=idle_trim_s, on_post=lambda: calls.put(True))
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="vkv-engine", daemon=True)
        self.thread.start()
        stop_at_exit(self)

    def check_process(self) -> None:
        """As `EnginePort.check_process`."""
        self.driver.check_process()

    def check_open(self) -> None:
        """As `EnginePort.check_open`."""
        self.driver.check_open()

    def submit(self, sinks: Sequence[Sink]) -> None:
        """As `EnginePort.submit`."""
        self.driver.submit(sinks)

    def abandon(self, sinks: Sequence[Sink]) -> None:
        """As `EnginePort.abandon`."""
        self.driver.abandon(sinks)

    def post(self, message: Message) -> None:
        """As `EnginePort.post`."""
        self.driver.post(message)

    def close(self) -> None:
        """End the thread after the step under way, and all requests, and give all back."""
        if self.driver.is_mine:
            self.stop()
            self.driver.close()

    def stop(self) -> None:
        """End the thread after the step under way. Nobody is told: the interpreter exits."""
        if self.driver.is_mine:
            self._calls.put(False)
            self.thread.join()

    def _run(self) -> None:
        try:
            while self._is_called():
                self.driver.turn()
        except Exception as error:  # noqa: BLE001 - told to every consumer, and logged
            _log.exception("the engine's thread ends")
            self.error = error
            try:
                self.driver.close()
            except VkvError:
                _log.exception("memory could not be given back; close() tries again")

    def _is_called(self) -> bool:
        """Wait until there is something to do: True; or until stopped: False."""
        while True:
            while not self._calls.empty():
                if not self._calls.get():
                    return False
            if self.driver.has_work:
                return True
            if self._loop.is_settled:
                self._calls.put(self._calls.get())
                continue
            with suppress(Empty):
                self._calls.put(self._calls.get(timeout=_SETTLE_POLL_S))
            self.driver.settle()
