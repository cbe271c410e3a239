"""Pages that change hands over a Unix socket: no byte of KV is copied but of what others share."""

import os
import socket
import struct
from collections.abc import Sequence

import torch

from ....vmem import Fence
from ....vmem.errors import InvalidConfig, InvalidOperation, TransferError
from ..transfers import Incoming, Outgoing
from . import wire
from .job import ChannelJob
from .sockets import SocketChannel, Stage

_CREDENTIALS = struct.Struct("3i")  # process, user, group


class PageChannel(SocketChannel):
    """Hands the pages of a slot to the cache of another process on this machine.

    Both caches must be movable, of one page size and token format. The sender's transfer must be
    the only one that reads the slot, and its request at rest: all its tokens go in one stage. The
    other side must be of the same user.

    Raises TransferError if it is not, InvalidConfig if `sock` is no Unix socket.
    """

    moves_pages = True

    def __init__(
        self, sock: socket.socket, *, timeout_s: float = 10.0, is_checked: bool = False
    ) -> None:
        if sock.family != socket.AF_UNIX:
            raise InvalidConfig("pages only go over a Unix socket; copy the tokens instead")
        found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(found)
        if user != os.geteuid():
            raise TransferError(f"the other side is of user {user}, not {os.geteuid()}")
        super().__init__(sock, timeout_s=timeout_s, is_checked=is_checked)

    def send(
        self, outgoing: Outgoing, start: int, stop: int, *, after: Fence | None = None
    ) -> ChannelJob:
        """Lend all tokens of a transfer. What the loan ends in is the transfer's `commit` or
        `abort`; the job only delivers it."""
        if (start, stop) != (0, outgoing.num_tokens):
            raise InvalidOperation(
                f"pages go at once: tokens 0 to {outgoing.num_tokens}, not {start} to {stop}"
            )
        lent = outgoing.lend()  # which waits for work of its own
        try:
            after = after or outgoing.record_fence()
        except BaseException:
            wire.close_all(lent.descriptors)
            raise
        stage = Stage(
            name=outgoing.key.name,
            epoch=outgoing.key.epoch,
            start=start,
            stop=stop,
            num_bytes=sum(map(len, lent.copied)),
            is_checked=self._is_checked,
            parcel=lent.parcel,
        )
        job = ChannelJob(
            lambda _: self._offer(stage, lent.descriptors, lent.copied),
            after=after,
            interrupt=self.close,
            give_back=lambda: wire.close_all(lent.descriptors),
        )
        job.num_bytes = stage.num_bytes + lent.num_parted_bytes
        job.num_pages = lent.parcel.num_lent_pages
        return job

    def receive(
        self, incoming: Incoming, start: int, stop: int, *, after: Fence | None = None
    ) -> ChannelJob:
        """Borrow all tokens of a transfer that was begun `by_pages`.

        Until the job is done the transfer must not end; one that failed is to be aborted.
        """

        def borrow(stage: Stage, descriptors: Sequence[int]) -> list[torch.Tensor]:
            assert stage.parcel is not None
            pieces = incoming.borrow(stage.parcel, descriptors)
            job.num_bytes, job.num_pages = stage.num_bytes, stage.parcel.num_lent_pages
            return pieces

        job = ChannelJob(
            lambda _: self._accept(incoming, start, stop, borrow),
            after=after or incoming.record_fence(),
            interrupt=self.close,
        )
        return job
