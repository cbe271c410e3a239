"""Clients of an OpenAI server that cost little: what they take, the server lacks."""

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from .client import RequestTrace, Trace
from .workloads import WorkItem


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where `/v1/completions` is.

    Attributes:
        model: the name of the model there; None to leave it out.
        extra: further fields of each request.
        api_key: shown as a Bearer key, where there is one.
    """

    url: str
    model: str | None = None
    extra: tuple[tuple[str, Any], ...] = ()
    api_key: str | None = None

    def request(self, item: WorkItem) -> bytes:
        """A streaming request of exactly the item's length, whole."""
        at = urlsplit(self.url)
        body = {
            "prompt": list(item.prompt),
            "max_tokens": item.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"model": self.model} if self.model else {}),
            **dict(self.extra),
        }
        data = json.dumps(body).encode()
        key = f"authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"POST {at.path.rstrip('/')}/v1/completions HTTP/1.1\r\nhost: {at.netloc}\r\n{key}"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n"
            "connection: close\r\n\r\n"
        )
        return head.encode() + data

    async def send(self, item: WorkItem) -> "Answer":
        """Ask, and take the whole answer. Raises OSError, or RuntimeError for a refusal."""
        at = urlsplit(self.url)
        loop = asyncio.get_running_loop()
        is_secret = at.scheme == "https"
        transport, answer = await loop.create_connection(
            Answer,
            at.hostname or "",
            at.port or (443 if is_secret else 80),
            ssl=ssl.create_default_context() if is_secret else None,
        )
        try:
            transport.write(self.request(item))
            await answer.is_over
        finally:
            transport.close()
        if answer.status != 200:
            raise RuntimeError(f"{self.url} answered {answer.status}: {answer.text()[:500]}")
        return answer


class Answer(asyncio.Protocol):
    """An answer as it comes: pieces of its body, and when each was there.

    They are read as events afterwards, not while others are waited for.
    """

    def __init__(self) -> None:
        self.is_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self._pieces: list[tuple[float, bytes]] = []
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        if not self.is_over.done():
            self.is_over.set_exception(ConnectionError("the answer broke off"))

    def on_headers_complete(self) -> None:
        """Of the parser."""
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Of the parser."""
        self._pieces.append((time.perf_counter(), body))

    def on_message_complete(self) -> None:
        """Of the parser."""
        if not self.is_over.done():
            self.is_over.set_result(None)

    def text(self) -> str:
        """The body."""
        return b"".join(piece for _, piece in self._pieces).decode(errors="replace")

    def token_times_s(self) -> list[float]:
        """When each token was there.

        An event counts for as many tokens as it names; where events name none, the tokens that
        `usage` has more than there are events count for the last.

        Raises RuntimeError for an error within the stream, or a stream without its end.
        """
        times: list[float] = []
        num_tokens = None
        rest, is_done = b"", False
        for when_s, piece in self._pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: [DONE]"):
                    is_done = True
                elif line.startswith(b"data:"):
                    event = json.loads(line[5:])
                    if "error" in event:
                        raise RuntimeError(f"the stream ended with an error: {event['error']}")
                    times += [when_s] * _num_tokens(event)
                    usage = event.get("usage")
                    num_tokens = usage["completion_tokens"] if usage else num_tokens
        if not is_done:
            raise RuntimeError("the stream has no end")
        if num_tokens is not None:
            times = times[:num_tokens] + [self._pieces[-1][0]] * (num_tokens - len(times))
        return times


def _num_tokens(event: dict[str, Any]) -> int:
    for choice in event.get("choices") or ():
        if choice.get("token_ids") is not None:
            return len(choice["token_ids"])
        return int(bool(choice.get("text")) or choice.get("finish_reason") is None)
    return 0


@dataclass
class _Run:
    """Requests under way."""

    endpoint: Endpoint
    work: Sequence[WorkItem]
    on_finish: Callable[[], None]
    start_s: float = field(default_factory=time.perf_counter)
    trace: Trace = field(default_factory=Trace)

    async def ask(self, index: int, due_s: float) -> None:
        item = self.work[index]
        answer = await self.endpoint.send(item)
        times_s = [when_s - self.start_s for when_s in answer.token_times_s()]
        if len(times_s) != item.num_output_tokens:
            raise RuntimeError(
                f"{self.endpoint.url} gave {len(times_s)} tokens of {item.num_output_tokens}"
            )
        self.trace.requests.append(RequestTrace(len(item.prompt), due_s, times_s))
        self.trace.step_ends_s.append(times_s[-1])
        self.on_finish()


async def drive_server(
    endpoint: Endpoint,
    work: Sequence[WorkItem],
    arrivals_s: Sequence[float],
    *,
    on_finish: Callable[[], None] = lambda: None,
) -> Trace:
    """As `client.drive`, but over HTTP: request `i` is sent at `arrivals_s[i]`, and what lies
    beyond follows whenever another has finished."""
    run = _Run(endpoint, work, on_finish)
    following = iter(range(len(arrivals_s), len(work)))

    async def client(index: int) -> None:
        await asyncio.sleep(max(0.0, run.start_s + arrivals_s[index] - time.perf_counter()))
        await run.ask(index, arrivals_s[index])
        if len(arrivals_s) < len(work):
            for another in following:
                await run.ask(another, time.perf_counter() - run.start_s)

    async with asyncio.TaskGroup() as clients:
        for index in range(min(len(arrivals_s), len(work))):
            clients.create_task(client(index))
    run.trace.step_ends_s.sort()
    return run.trace
