"""Where threads wait that step while the interpreter exits."""

import threading
import time
from typing import NoReturn

_RECENT_S = 1.0  # who stepped no longer ago than that is probably about to step again
_GATHER_S = 1.0  # for how long the exit waits for such threads, at most
_SETTLE_S = 0.01  # from the last line of such a thread to its being asleep


class ThreadsEnd:
    """Keeps daemon threads still once the interpreter exits: no step begins while it goes down.

    A thread that comes back from PyTorch, or only wants to run another line, when the interpreter
    is gone is ended by force, and the process may die of that. So no thread but the main one
    begins a step any more; each goes to sleep instead, for good.
    """

    def __init__(self) -> None:
        self._has_begun = False
        self._stepped: dict[int, float] = {}  # when each thread last did, by identifier
        self._asleep: set[int] = set()
        self._never = threading.Lock()
        self._never.acquire()

    def is_open_to_me(self) -> bool:
        """Whether the calling thread may step. False once it should `wait_for_it`."""
        if threading.current_thread() is threading.main_thread():
            return True
        self._stepped[threading.get_ident()] = time.monotonic()
        return not self._has_begun

    def wait_for_it(self) -> NoReturn:
        """Sleep until the process is gone."""
        while True:
            self._asleep.add(threading.get_ident())
            self._never.acquire()

    def begin(self) -> None:
        """The interpreter exits; nobody is in the middle of a step."""
        self._has_begun = True

    def gather(self) -> None:
        """Wait until the threads that stepped of late are asleep, or have ended."""
        now = time.monotonic()
        recent = {ident for ident, when in self._stepped.items() if now - when < _RECENT_S}
        while time.monotonic() - now < _GATHER_S:
            alive = {thread.ident for thread in threading.enumerate()}
            if not (recent & alive) - self._asleep:
                break
            time.sleep(_SETTLE_S)
        if recent:
            time.sleep(_SETTLE_S)
