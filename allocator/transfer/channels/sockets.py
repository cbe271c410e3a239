"""What is said about a stage over a socket, and who says it.

    sender     Stage, descriptors │         bytes, their sum │
    receiver                      │ Answer                   │ Answer

A receiver that objects, before the bytes or after them, leaves both in step, and another stage
may follow. After any other error they are not, and the channel is closed.
"""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec
import torch

from ....vmem.errors import TransferError, VkvError
from ...parcel import Parcel
from ..transfers import Incoming
from . import wire


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a sender announces: which tokens of which transfer, and how many bytes follow."""

    name: str
    epoch: int
    start: int
    stop: int
    num_bytes: int
    is_checked: bool
    parcel: Parcel | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a receiver says to a stage, and again to its bytes: nothing, or why not."""

    objection: str = ""


class SocketChannel:
    """What both channels have: a connected stream socket, which is theirs from now on.

    It is used for one stage at a time, in the order in which the jobs are run.

    Args:
        sock: a stream, connected or to be by `opening`; of the Unix family or TCP.
        timeout_s: how long the other side may be silent, before a stage and in the middle of it.
        is_checked: send xxh3 checksums of what is copied.
        opening: called with the socket on the thread of the first stage, before it: connects a
            socket that is not, and says what must be said first. What it raises ends the stage.

    Attributes:
        is_open: False once it was closed, or the two sides may misunderstand each other.
    """

    moves_pages = False

    def __init__(
        self,
        sock: socket.socket,
        *,
        timeout_s: float = 10.0,
        is_checked: bool = False,
        opening: Callable[[socket.socket], None] | None = None,
    ) -> None:
        wire.prepare(sock, timeout_s)
        self.is_open = True
        self._is_checked = is_checked
        self._sock = sock
        self._opening = opening
        self._lock = threading.Lock()
        self._is_in_step = True

    def close(self) -> None:
        """End it. What is under way fails, on both sides."""
        self.is_open = False
        with suppress(OSError):  # the other side may have gone first
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._lock.acquire(blocking=False):  # or whoever uses it closes it
            self._sock.close()
            self._lock.release()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock:
            if not self.is_open:
                raise TransferError("the channel is closed; open another")
            self._is_in_step = False
            try:
                if self._opening is not None:
                    self._opening(self._sock)
                    self._opening = None
                yield
                self._is_in_step = True
            finally:
                self.is_open = self.is_open and self._is_in_step
                if not self.is_open:
                    self._sock.close()

    def _offer(
        self, stage: Stage, descriptors: Sequence[int], pieces: Sequence[torch.Tensor]
    ) -> None:
        """The sender's part."""
        with self._in_use():
            wire.send_message(self._sock, stage)
            wire.send_descriptors(self._sock, descriptors)
            self._heed("would not have the tokens")
            wire.send_bytes(self._sock, pieces, stage.is_checked)
            self._heed("did not get the tokens")

    def _heed(self, what: str) -> None:
        answer = wire.receive_message(self._sock, Answer)
        if answer.objection:
            self._is_in_step = True
            raise TransferError(f"the other side {what}: {answer.objection}")

    def _accept(
        self,
        incoming: Incoming,
        start: int,
        stop: int,
        prepare: Callable[[Stage, list[int]], Sequence[torch.Tensor]],
    ) -> None:
        """The receiver's part. `prepare` gives the memory that is to be filled."""
        with self._in_use():
            stage = wire.receive_message(self._sock, Stage)
            count = 0 if stage.parcel is None else stage.parcel.num_descriptors
            if count and not self.moves_pages:
                raise TransferError("pages came in place of bytes")
            descriptors = wire.receive_descriptors(self._sock, count)
            try:
                with self._objecting(VkvError):
                    self._check(stage, incoming, start, stop)
                    pieces = prepare(stage, descriptors)
                    if (num_bytes := sum(map(len, pieces))) != stage.num_bytes:
                        raise TransferError(f"{stage.num_bytes} bytes come in place of {num_bytes}")
            finally:
                wire.close_all(descriptors)
            wire.send_message(self._sock, Answer())
            with self._objecting(wire.Damaged):
                wire.receive_bytes(self._sock, pieces, stage.is_checked)
            wire.send_message(self._sock, Answer())

    def _check(self, stage: Stage, incoming: Incoming, start: int, stop: int) -> None:
        """What is announced must be what was agreed upon."""
        expected = (incoming.key.name, incoming.key.epoch, start, stop, self.moves_pages)
        found = (stage.name, stage.epoch, stage.start, stage.stop, stage.parcel is not None)
        if found != expected:
            raise TransferError(f"{found} come in place of {expected}")

    @contextmanager
    def _objecting(self, kind: type[VkvError]) -> Iterator[None]:
        """Tell the sender of an error of this kind, which leaves both sides in step."""
        try:
            yield
        except kind as error:
            wire.send_message(self._sock, Answer(objection=str(error) or repr(error)))
            self._is_in_step = True
            raise
