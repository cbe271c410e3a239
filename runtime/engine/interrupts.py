"""Signals between steps, never within one."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

_Handler = Callable[[int, FrameType | None], Any]


class Shield:
    """Holds Python's signal handlers back: what they do, they do at `deliver` or at the end.

    A step changes the page table and its accounts in many places, and clean-up must not be
    skipped; an exception that a handler raises in between (Ctrl-C, a time limit by SIGALRM) would
    lose pages. Every handler written in Python waits, whatever its signal. Within another shield,
    and outside the main thread, where no handler runs, it does nothing.

        with Shield() as shield:
            while working:
                step()
                shield.deliver()  # a handler may raise here, and nothing is torn by it
    """

    _outermost: ClassVar["Shield | None"] = None

    def __init__(self) -> None:
        self._handlers: dict[int, _Handler] = {}
        self._received: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread or Shield._outermost is not None:
            return self
        # A handler that is not exchanged yet may raise here; those that are hold back already.
        try:
            Shield._outermost = self
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._receive)
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if Shield._outermost is self:
            self._take_down()

    def _take_down(self) -> None:
        try:
            self._restore()
        finally:
            self._deliver()

    def _restore(self) -> None:
        """Give the signals their handlers back, each of which may raise from then on."""
        try:
            for number, handler in self._handlers.items():
                if signal.getsignal(number) == self._receive:  # else someone set another meanwhile
                    signal.signal(number, handler)
            Shield._outermost = None
        except BaseException:
            self._restore()
            raise

    def deliver(self) -> None:
        """Let the handlers run whose signals came. What one of them raises is raised here."""
        shield = Shield._outermost
        if shield is not None and threading.current_thread() is threading.main_thread():
            shield._deliver()

    def _deliver(self) -> None:
        if self._received:
            number, frame = self._received.pop(0)
            try:
                self._handlers[number](number, frame)
            finally:
                self._deliver()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if Shield._outermost is self:
            self._received.append((number, frame))
        else:
            self._handlers[number](number, frame)

    @classmethod
    def _forget(cls) -> None:
        """In a child of a fork: what its parent is in the middle of is not the child's."""
        shield = cls._outermost
        if shield is not None:
            shield._received.clear()
            shield._take_down()


os.register_at_fork(after_in_child=Shield._forget)
