"""Connections to callers, who may be slow, silent, or gone."""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with an end to what would go on for ever.

    It hangs up on a caller who sends no whole head of a request in time, who sends too much that
    is neither a head nor a body (endless headers, trailers or extensions of chunks), and who takes
    nothing of an answer. It tells each request of a connection that is lost, not the last alone,
    where a caller sent several without waiting.

    Attributes:
        head_s: seconds for the head of a request, from the connection or its first byte on.
        stall_s: seconds in which a caller takes something of what waits for it.
        most_head_bytes: of a head; a read's worth more may pass.
        most_in_line: requests behind the one under way, from which on nothing more is read. An end
            of the connection is not seen then.
    """

    head_s: ClassVar[float] = 30.0
    stall_s: ClassVar[float] = 60.0
    most_head_bytes: ClassVar[int] = 1 << 16
    most_in_line: ClassVar[int] = 8

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cycles: list[RequestResponseCycle] = []
        self._num_loose_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    # -- the connection ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As of `asyncio.Protocol`."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """As of `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._stop_head_timer()
        self._stop_stall_timer()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """As of `asyncio.Protocol`."""
        self._num_loose_bytes += len(data)
        super().data_received(data)
        if self._num_loose_bytes > self.most_head_bytes:
            self.transport.close()

    # -- requests ------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """A request's head is whole."""
        self._stop_head_timer()
        self._num_loose_bytes = 0
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._cycles.append(self.cycle)
        if len(self.pipeline) < self.most_in_line:
            self.flow.resume_reading()  # or an end would not be seen

    def on_body(self, body: bytes) -> None:
        """A part of a request's body."""
        self._num_loose_bytes = 0
        super().on_body(body)

    def _await_head(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.head_s, self._lose_patience)

    def _lose_patience(self) -> None:
        if any(not cycle.response_complete for cycle in self._cycles):
            self._await_head()  # what is under way comes first
        else:
            self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # -- answers -------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """More waits for the caller than it takes."""
        super().pause_writing()
        self._await_progress()

    def resume_writing(self) -> None:
        """It has taken most of it."""
        super().resume_writing()
        self._stop_stall_timer()

    def _await_progress(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self.stall_s, self._check_progress, waiting)

    def _check_progress(self, num_bytes_before: int) -> None:
        if self.transport.get_write_buffer_size() < num_bytes_before:
            self._await_progress()
        else:
            self.transport.abort()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
