"""Signals at chosen moments: at the n-th line that some files run."""

import signal
import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any


class Timeout(Exception):
    """What a caller's own handler of SIGALRM raises."""


def time_out(number: int, frame: FrameType | None) -> None:
    """A handler as callers write them, to limit the time that something takes."""
    raise Timeout


class SignalAt:
    """Runs `work()` and sends a signal before the `event`-th line that code of `files` runs.

    Attributes:
        was_sent: False if there were fewer lines.
        raised: what came out of `work`, if a handler's exception did.
    """

    def __init__(
        self, files: Collection[str], event: int, number: int, work: Callable[[], object]
    ) -> None:
        self._files = files
        self._left = event
        self._number = number
        self.was_sent = False
        self.raised: type[BaseException] | None = None
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            work()
        except (KeyboardInterrupt, Timeout) as error:
            self.raised = type(error)
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, kind: str, _: object) -> Any:
        if self.was_sent or frame.f_code.co_filename not in self._files:
            return None
        return self._line

    def _line(self, frame: FrameType, kind: str, _: object) -> Any:
        if kind == "line" and not self.was_sent:
            self._left -= 1
            if not self._left:
                self.was_sent = True
                signal.raise_signal(self._number)
        return self._line
