"""Copying over a socket, for another machine or another layout: a few large writes a stage."""

from ....vmem import Fence
from ....vmem.errors import InvalidOperation
from ..transfers import Incoming, Outgoing
from .job import ChannelJob
from .sockets import SocketChannel, Stage


class CopyChannel(SocketChannel):
    """Copies tokens from the memory of one cache into that of another, with nothing between but the
    socket (a GPU's goes through pinned buffers). Page sizes may differ; token formats may not.

    A transfer may come in stages: tokens 0 to n, then, once both sides have extended it, n to m.
    """

    def send(
        self, outgoing: Outgoing, start: int, stop: int, *, after: Fence | None = None
    ) -> ChannelJob:
        """Tokens `start … stop`. They must stay pinned until the job is done."""
        pieces = [piece for stream in outgoing.spans(start, stop) for piece in stream]
        stage = Stage(
            name=outgoing.key.name,
            epoch=outgoing.key.epoch,
            start=start,
            stop=stop,
            num_bytes=sum(map(len, pieces)),
            is_checked=self._is_checked,
        )
        job = ChannelJob(
            lambda _: self._offer(stage, (), pieces),
            after=after or outgoing.record_fence(),
            interrupt=self.close,
        )
        job.num_bytes = stage.num_bytes
        return job

    def receive(
        self, incoming: Incoming, start: int, stop: int, *, after: Fence | None = None
    ) -> ChannelJob:
        """Tokens `start … stop`, which the transfer has memory for and does not hold already.

        Until the job is done the transfer must not end; one that failed is to be aborted, or its
        stage repeated.
        """
        if start < incoming.num_held:
            raise InvalidOperation(
                f"the slot holds {incoming.num_held} tokens, maybe in memory that others share; "
                f"begin there and not at {start}"
            )
        pieces = [piece for stream in incoming.spans(start, stop) for piece in stream]
        job = ChannelJob(
            lambda _: self._accept(incoming, start, stop, lambda *_: pieces),
            after=after or incoming.record_fence(),
            interrupt=self.close,
        )
        job.num_bytes = sum(map(len, pieces))
        return job
