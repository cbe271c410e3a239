"""Answers that come bit by bit, and callers that go."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ....vmem.errors import VkvError
from .errors import ApiError, internal_error, refusal
from .gate import Receive, Scope, Send

_log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": still here\n\n"

_T = TypeVar("_T")
_json = msgspec.json.Encoder()
encode_json = _json.encode


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"data: " if name is None else b"event: " + name.encode() + b"\ndata: "
    return head + _json.encode(data) + b"\n\n"


def json_response(data: Any, status: int = 200) -> Response:
    """Plain data as JSON."""
    return Response(_json.encode(data), status, media_type="application/json")


class Gone(Exception):
    """The caller has hung up."""


async def unless_gone(request: Request, answer: Awaitable[_T]) -> _T:
    """What `answer` comes to; it is cancelled if the caller hangs up. Raises Gone then.

    The request's body must have been read.
    """
    work = asyncio.ensure_future(answer)
    watch = asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Gone
        return work.result()
    finally:
        watch.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait((work,))


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, as they come.

    The status waits for the first event, so that what goes wrong before has a status of its own;
    or until it is time for a comment that keeps the connection. A caller that hangs up ends
    `events` at once.

    Args:
        events: whole events. What it raises is told in the stream, or as the response.
        last_words: events that tell of an error, in the protocol's words.
        keep_alive_s: without an event, until a comment is sent; 0 for none.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        last_words: Callable[[ApiError], bytes],
        *,
        keep_alive_s: float,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._last_words = last_words
        self._keep_alive_s = keep_alive_s
        self._writing = asyncio.Lock()
        self._has_begun = False
        self._sent_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._run(send))
        others = [asyncio.ensure_future(_hung_up(receive)), asyncio.ensure_future(self._keep(send))]
        try:
            await asyncio.wait((work, others[0]), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (*others, work):
                task.cancel()
            await asyncio.wait((*others, work))

    async def _run(self, send: Send) -> None:
        try:
            async for chunk in self._events:
                await self._put(send, chunk)
        except (VkvError, ApiError) as error:
            told = error if isinstance(error, ApiError) else refusal(error)
            if not self._has_begun:
                raise told from error
            await self._put(send, self._last_words(told))
        except Exception:
            if not self._has_begun:
                raise
            _log.exception("a stream failed")
            await self._put(send, self._last_words(internal_error()))
        finally:
            await self._events.aclose()
        async with self._writing:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep(self, send: Send) -> None:
        """Comments wherever nothing else was sent for so long."""
        while self._keep_alive_s:
            idle_s = time.monotonic() - self._sent_s
            await asyncio.sleep(max(0.01, self._keep_alive_s - idle_s))
            if time.monotonic() - self._sent_s >= self._keep_alive_s:
                await self._put(send, _KEEP_ALIVE)

    async def _put(self, send: Send, chunk: bytes) -> None:
        async with self._writing:
            if not self._has_begun:
                self._has_begun = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._sent_s = time.monotonic()


async def placed(
    place: AbstractContextManager[None], events: AsyncGenerator[bytes]
) -> AsyncGenerator[bytes]:
    """The events, of a request that holds places meanwhile."""
    with place:
        async with aclosing(events):
            async for chunk in events:
                yield chunk


def last_words(error: ApiError) -> bytes:
    """How OpenAI's streams end by an error."""
    return event(error.body()) + DONE
