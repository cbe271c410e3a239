"""What takes long is done beside the engine's loop, before the loop hears of it: grammars that
requests need are compiled, adapters' folders are read."""

import socket
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from ...vmem.errors import VkvError
from ..engine.messages import Add
from ..execution.grammars import Grammars

_MOST_AT_ONCE = 2  # as many as `Grammars` compiles: one that takes long holds nobody up


class Preparing:
    """Works on threads. For one selector's thread, which `fileno` wakes up.

    Args:
        grammars: the engine's; None for a model without a tokenizer.
    """

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._threads = ThreadPoolExecutor(_MOST_AT_ONCE, "vkv-preparing")
        self._waiting: dict[str, Add] = {}
        self._done: deque[tuple[str, Future[None]]] = deque()
        self._finished: deque[Callable[[], None]] = deque()
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)

    def fileno(self) -> int:
        """Readable when there is something to `take`."""
        return self._bell.fileno()

    def begin(self, add: Add) -> bool:
        """Compile what a request needs; False if it needs nothing, or has it already."""
        outputs, grammars = add.spec.params.structured_outputs, self._grammars
        if outputs is None or grammars is None or grammars.knows(outputs):
            return False
        self._waiting[add.spec.request_id] = add
        future = self._threads.submit(grammars.prepare, outputs)
        future.add_done_callback(lambda done: self._ring(add.spec.request_id, done))
        return True

    def do(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Have `work` done, which raises nothing; `take_finished` has `then` after that."""

        def ring(done: Future[None]) -> None:
            self._finished.append(then)
            self._ringer.send(b"!")

        self._threads.submit(work).add_done_callback(ring)

    def take_finished(self) -> list[Callable[[], None]]:
        """What is to be called on the selector's thread, after `take`."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def has(self, request_id: str) -> bool:
        """Whether a request is here."""
        return request_id in self._waiting

    def drop(self, request_id: str) -> Add | None:
        """Forget a request, if it is here; returns it."""
        return self._waiting.pop(request_id, None)

    def set_priority(self, request_id: str, priority: int) -> None:
        """Give a request another priority, if it is here."""
        if add := self._waiting.get(request_id):
            spec = msgspec.structs.replace(add.spec, priority=priority)
            self._waiting[request_id] = Add(spec)

    def take(self) -> list[tuple[Add, VkvError | None]]:
        """The requests that are ready, or why they are refused; without those dropped."""
        self._bell.recv(1 << 12)
        found = []
        while self._done:
            request_id, future = self._done.popleft()
            add = self.drop(request_id)
            if add is None:
                continue
            try:
                future.result()
                found.append((add, None))
            except VkvError as error:
                found.append((add, error))
        return found

    def wake(self) -> None:
        """Wake the selector's thread up; a signal's handler may."""
        self._ringer.send(b"!")

    def _ring(self, request_id: str, future: Future[None]) -> None:
        self._done.append((request_id, future))
        self._ringer.send(b"!")

    def close(self) -> None:
        """End the threads, once what they compile is compiled."""
        self._threads.shutdown(cancel_futures=True)
        self._bell.close()
        self._ringer.close()
