"""Whose process something is: what a fork copies, and must not be used through the copy."""

import os
import threading

from .errors import ForkedProcess


class ProcessOwner:
    """The process that made something that holds pages; no other may use it.

    A forked child shares the parent's pages, so that what it writes changes the parent's tokens.
    And it has a copy of every lock, of which those that the parent's threads held at the fork are
    never released. So `check` comes before any lock, and before any short cut.

    Args:
        what: names the thing in the error, as in "this cache".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._pid = os.getpid()

    @property
    def is_mine(self) -> bool:
        """Whether the calling process is the owner."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise ForkedProcess in any process but the owner."""
        if os.getpid() != self._pid:
            raise ForkedProcess(
                f"{self._what} belongs to process {self._pid}, not {os.getpid()}; a forked child "
                "shares its pages, so create another there (or start the child with 'spawn')"
            )


class OwnedLock:
    """A lock, for `with`, that a forked child is refused (ForkedProcess) and so never waits for.

    Args:
        owner: who may take it.
        lock: what is taken; a new re-entrant lock by default.
    """

    def __init__(
        self, owner: ProcessOwner, lock: "threading.RLock | threading.Condition | None" = None
    ) -> None:
        self._owner = owner
        self._lock = threading.RLock() if lock is None else lock

    def __enter__(self) -> None:
        self._owner.check()
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()
