"""Who carries bytes of keys and values from one engine to another."""

import threading
from typing import Protocol

from ....allocator.transfer import Copier, CopyJob, Incoming, Outgoing
from ....vmem import Fence
from ....vmem.errors import InvalidOperation


class Carriage(Protocol):
    """Some tokens on their way.

    Attributes:
        error: why it failed, once it is done; None if it did not.
    """

    @property
    def is_done(self) -> bool:
        """True once the bytes are in the target's memory, or never will be."""
        ...

    @property
    def error(self) -> Exception | None: ...

    def cancel(self) -> None:
        """Stop, and return once nothing is read any more."""
        ...


class Carrier(Protocol):
    """Carries tokens between two caches of equal token formats. Each side has its own methods, and
    may be in a process of its own; what one tells the other is `address`.

    Attributes:
        moves_pages: it can hand pages over, where both caches can.
        node: names the machine that this end is on; pages change hands within one alone.
    """

    moves_pages: bool

    @property
    def node(self) -> str: ...

    def offer(self, incoming: Incoming) -> bytes:
        """At the target: where its bytes are to go. Offering twice gives the same."""
        ...

    def withdraw(self, incoming: Incoming) -> None:
        """At the target: return once nothing is written there any more."""
        ...

    def carry(self, outgoing: Outgoing, address: bytes, start: int, stop: int) -> Carriage:
        """At the source: begin to carry tokens `start … stop`.

        Raises InvalidOperation if nothing is offered at `address`.
        """
        ...


class CopyCarrier:
    """A carrier between engines of one process: copies, on a thread of their own or at once.

    For any number of threads.

    Args:
        copier: does the copies; None to copy on the caller's thread.
    """

    moves_pages = False
    node = ""

    def __init__(self, copier: Copier | None = None) -> None:
        self._copier = copier
        self._lock = threading.Lock()
        self._offered: dict[bytes, tuple[Incoming, list[CopyJob]]] = {}

    def offer(self, incoming: Incoming) -> bytes:
        address = f"{incoming.key.name}@{incoming.key.epoch}/{id(incoming)}".encode()
        with self._lock:
            self._offered.setdefault(address, (incoming, []))
        return address

    def withdraw(self, incoming: Incoming) -> None:
        with self._lock:
            mine = [a for a, (offered, _) in self._offered.items() if offered is incoming]
            jobs = [job for address in mine for job in self._offered.pop(address)[1]]
        for job in jobs:
            job.cancel()

    def carry(self, outgoing: Outgoing, address: bytes, start: int, stop: int) -> Carriage:
        with self._lock:
            if address not in self._offered:
                raise InvalidOperation(f"nothing is expected at {address!r}; begin another move")
            incoming, jobs = self._offered[address]
            job = CopyJob(
                outgoing.spans(start, stop),
                incoming.spans(start, stop),
                after=_Both(outgoing.record_fence(), incoming.record_fence()),
            )
            jobs.append(job)
            if self._copier is not None:
                return self._copier.submit(job)
            job.run()
            return job


class _Both:
    """Two devices' work."""

    def __init__(self, first: Fence, second: Fence) -> None:
        self._fences = first, second

    def wait(self) -> None:
        for fence in self._fences:
            fence.wait()
