"""An engine turned by hand some of whose requests' tokens lie elsewhere, and who has them."""

import socket
import time
from dataclasses import dataclass

from ....allocator.transfer import Spans
from ....runtime.engine.memory.segments import add_creditor, segment_server
from ....runtime.frontend.llm import LLM
from ....runtime.model.segments import RemoteHolder, SegmentServer
from ...driver import Driver


@dataclass(frozen=True)
class Elsewhere:
    """What of a running request lies elsewhere: segments, and tokens in them."""

    num_segments: int
    num_tokens: int


class SpreadDriver(Driver):
    """A driver of an engine whose requests outgrow its pool."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm)
        self._llm = llm

    def borrow(self, lender: RemoteHolder, num_tokens: int) -> None:
        """Have requests outgrow the pool into another engine's, by so many tokens at most."""
        add_creditor(self._llm.loop.engine, lender, num_tokens)

    def lends(self) -> SegmentServer:
        """What takes tokens of other engines in here; the caller closes it, before the engine."""
        server = segment_server(self._llm.loaded, self._llm.loop.engine)
        assert server is not None, "the paged baseline and hybrids lend nothing"
        return server

    def keep(self, num_tokens: int) -> None:
        """Have a request that may outgrow the pool keep so many tokens in it at most; what moves
        then is as much at once."""
        segments = self._llm.loop.engine.scheduler.tiers.segments
        assert segments is not None, "requests of this model cannot outgrow the pool"
        segments.local_tokens = num_tokens

    def elsewhere(self) -> list[Elsewhere]:
        """Of each request that runs."""
        return [
            Elsewhere(len(request.lent) + (request.segment is not None), request.slot_start)
            for request in self._llm.loop.engine.scheduler.running
        ]


class Stripe(RemoteHolder):
    """A lender that takes one stretch of every sequence, so that who has what is known.

    Args:
        start, stop: positions that it takes tokens of.

    Attributes:
        moved_bytes, moved_s: keys and values that went there, once each, and what that took.
    """

    def __init__(self, name: str, sock: socket.socket, start: int, stop: int) -> None:
        super().__init__(name, sock, timeout_s=60.0)
        self._start, self._stop = start, stop
        self.moved_bytes = 0
        self.moved_s = 0.0

    def take(self, spans: Spans, start: int, num_tokens: int) -> int | None:
        """As of `RemoteHolder`; None for what is another's to take."""
        if start < self._start or start + num_tokens > self._stop:
            return None
        begun_s = time.perf_counter()
        loan = super().take(spans, start, num_tokens)
        self.moved_s += time.perf_counter() - begun_s
        self.moved_bytes += sum(len(piece) for of_stream in spans for piece in of_stream)
        return loan
