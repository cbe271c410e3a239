"""Callers of a server who mean harm, or are careless: each a coroutine that raises Wrong."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from callers import Wrong

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
REFUSALS = (400, 401, 404, 405, 408, 413, 422, 431)

ENDLESS = {"max_tokens": 1500, "temperature": 0.0, "stream": True}
_SAID = [{"role": "user", "content": "Tell me of the sea."}]
STREAMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "hello", "ignore_eos": True, **ENDLESS}),
    ("/v1/completions", {"prompt": ["hello", "you"], "ignore_eos": True, **ENDLESS}),
    ("/v1/chat/completions", {"messages": _SAID, "ignore_eos": True, **ENDLESS}),
    ("/v1/messages", {"messages": _SAID, **ENDLESS, "temperature": 100.0}),  # hardly ever an end
)


@dataclass(frozen=True)
class Target:
    """A server that is attacked.

    Attributes:
        most_body_bytes: that it takes.
    """

    host: str
    port: int
    key: str
    most_body_bytes: int

    def head(self, path: str, num_bytes: int, *more: str, key: str | None = None) -> bytes:
        """Of a request with a JSON body."""
        lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json"]
        lines += [f"authorization: Bearer {key or self.key}", f"content-length: {num_bytes}", *more]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def request(self, path: str, body: Any) -> bytes:
        """A whole request."""
        data = json.dumps(body).encode()
        return self.head(path, len(data)) + data

    @asynccontextmanager
    async def connection(self, *, abort: bool = False) -> AsyncIterator[tuple[Reader, Writer]]:
        """A connection, left with a reset if `abort`."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            if abort:
                writer.transport.abort()
            writer.close()


async def _status(reader: Reader) -> int:
    line = await asyncio.wait_for(reader.readline(), 60)
    if not line.startswith(b"HTTP/1.1 "):
        raise Wrong(f"{line!r} is no status")
    return int(line.split()[1])


async def _refused(target: Target, data: bytes, statuses: Sequence[int] = REFUSALS) -> None:
    async with target.connection() as (reader, writer):
        writer.write(data)
        status = await _status(reader)
    if status not in statuses:
        raise Wrong(f"status {status} for {data[:300]!r}")


WRONG_BODIES: tuple[tuple[str, str], ...] = (
    ("/v1/completions", "{"),
    ("/v1/completions", "[" * 50_000),
    ("/v1/completions", '{"prompt": "a", "max_tokens": "many"}'),
    ("/v1/completions", '{"prompt": "a", "seed": 1' + "0" * 40 + "}"),
    ("/v1/completions", '{"prompt": "a", "temperature": NaN}'),
    ("/v1/completions", '{"prompt": "\\ud800"}'),
    ("/v1/completions", '{"prompt": "a", "max_token": 3}'),
    ("/v1/completions", '{"prompt": "a", "n": 2000}'),
    ("/v1/completions", '{"prompt": [[999999]]}'),
    ("/v1/chat/completions", '{"messages": []}'),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "\\udfff"}]}'),
    ("/v1/chat/completions", '{"messages": [{"role": {}, "content": 5}]}'),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": {"a": [[[]]]}}]}'),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}'),
    (
        "/v1/chat/completions",
        '{"messages": [{"role": "user", "content": "a"}], "tools": [{"function": {"name": "f"}}],'
        ' "tool_choice": {"type": "function", "function": 5}}',
    ),
    ("/v1/messages", '{"messages": [{"role": "user", "content": "a"}]}'),
    ("/v1/messages", '{"max_tokens": 2, "messages": [{"role": "user", "content": []}]}'),
    ("/v1/messages", '{"max_tokens": 2, "messages": [{"role": "user", "content": [5]}]}'),
    (
        "/v1/messages",
        '{"max_tokens": 2, "messages": [{"role": "user", "content": '
        '[{"type": "tool_result", "content": 5}]}]}',
    ),
    (
        "/v1/messages",
        '{"max_tokens": 2, "messages": [{"role": "user", "content": '
        '[{"type": "tool_result", "content": [5]}]}]}',
    ),
    (
        "/v1/messages",
        '{"max_tokens": 2, "messages": [{"role": "user", "content": "a"}], '
        '"tool_choice": {"type": []}}',
    ),
    ("/tokenize", '{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}'),
    ("/detokenize", '{"tokens": [99999999999999999999999]}'),
    ("/v1/nothing", "{}"),
    ("/v1/models/../completions", "{}"),
)

HOSTILE_SCHEMAS: tuple[Any, ...] = (
    {"$ref": "#"},
    {"$ref": "http://127.0.0.1:1/x"},
    {"type": "string", "pattern": "(a{1000}){1000}"},
    {"type": "array", "minItems": 1_000_000_000},
    {"type": "integer", "multipleOf": 0},
    {"type": ["nothing"]},
    {"not": {}},
    {"enum": []},
    {"properties": {f"p{i}": {"$ref": "#"} for i in range(200)}},
    {"anyOf": [{"const": "x" * i} for i in range(300)]},
)


async def refused(target: Target, path: str, body: str) -> None:
    """Send a body that is wrong."""
    data = body.encode()
    await _refused(target, target.head(path, len(data)) + data)


async def wrong_body(target: Target, rng: random.Random) -> None:
    await refused(target, *rng.choice(WRONG_BODIES))


async def huge_body(target: Target, rng: random.Random) -> None:
    """By its length, or by its chunks."""
    most = target.most_body_bytes
    if rng.random() < 0.5:
        await _refused(target, target.head("/v1/completions", most + 1), (413,))
        return
    head = target.head("/v1/completions", 0).replace(
        b"content-length: 0", b"transfer-encoding: chunked"
    )
    chunk = b"%x\r\n%b\r\n" % (most // 4, b" " * (most // 4))
    await _refused(target, head + 5 * chunk, (413,))


async def wrong_key(target: Target, rng: random.Random) -> None:
    key = rng.choice(("", "x", target.key + "x", target.key[:-1], "\xff"))
    data = target.head("/v1/completions", 2, key=key or " ")
    await _refused(target, data + b"{}", (401,))


async def garbage(target: Target, rng: random.Random) -> None:
    """What is no HTTP, or heads without an end."""
    kinds = (
        rng.randbytes(200),
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\nhost\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"GET ?x HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 400_000,
    )
    async with target.connection() as (reader, writer):
        try:
            writer.write(rng.choice(kinds))
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 60)
        except OSError:  # it had enough before all was said
            return
    if b" 500 " in answer[:20] or b" 200 " in answer[:20]:
        raise Wrong(f"{answer[:200]!r} for garbage")


async def hostile_schema(target: Target, rng: random.Random) -> None:
    schema = {"name": "x", "schema": rng.choice(HOSTILE_SCHEMAS)}
    held = {"type": "json_schema", "json_schema": schema}
    body = {"messages": _SAID, "max_tokens": 8, "response_format": held}
    await _refused(target, target.request("/v1/chat/completions", body), (200, 400, 503))


async def slow_reader(target: Target, rng: random.Random) -> None:
    async with target.connection(abort=rng.random() < 0.5) as (reader, writer):
        writer.write(target.request(*rng.choice(STREAMS)))
        for _ in range(rng.randrange(1, 20)):
            if not await asyncio.wait_for(reader.read(1), 60):
                raise Wrong("a stream ended while it was read slowly")
            await asyncio.sleep(0.05)


async def slow_sender(target: Target, rng: random.Random) -> None:
    """Some leave before the request is whole; the others get their answer."""
    data = target.request("/v1/completions", {"prompt": "hello", "max_tokens": 2})
    stop = rng.choice((len(data), rng.randrange(1, len(data))))
    async with target.connection(abort=rng.random() < 0.5) as (reader, writer):
        step = max(1, stop // 12)
        for start in range(0, stop, step):
            writer.write(data[start : min(stop, start + step)])
            await writer.drain()
            await asyncio.sleep(0.03)
        if stop == len(data) and (status := await _status(reader)) != 200:
            raise Wrong(f"status {status} for a slow sender")


async def half_closed(target: Target, rng: random.Random) -> None:
    """It says that it sends nothing more, which counts as hanging up."""
    async with target.connection() as (reader, writer):
        writer.write(target.request(*rng.choice(STREAMS)))
        await asyncio.sleep(rng.uniform(0, 0.1))
        writer.write_eof()
        try:
            await asyncio.wait_for(reader.read(), 60)
        except ConnectionError:
            return


async def pipelined(target: Target, rng: random.Random) -> None:
    """Several requests without waiting: answered in their order, or left behind."""
    short = {"prompt": "hello", "max_tokens": 2}
    bodies = [{**short, "request_id": f"n{i}"} for i in range(4)]
    if rng.random() < 0.5:
        data = target.request(*rng.choice(STREAMS))
        async with target.connection(abort=True) as (reader, writer):
            writer.write(data + data)
            await asyncio.wait_for(reader.read(100), 60)
        return
    async with target.connection() as (reader, writer):
        writer.write(b"".join(target.request("/v1/completions", body) for body in bodies))
        for body in bodies:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            told = json.loads(await reader.readexactly(length))
            if told.get("id") != f"cmpl-{body['request_id']}":
                raise Wrong(f"{told} in the place of {body}")


async def cancelled(target: Target, rng: random.Random) -> None:
    """A stream that is left at a random moment, politely or not."""
    async with target.connection(abort=rng.random() < 0.5) as (reader, writer):
        writer.write(target.request(*rng.choice(STREAMS)))
        await writer.drain()
        try:
            async with asyncio.timeout(rng.choice((0.0, 0.01, 0.1, 0.5))):
                while await reader.read(1 << 16):
                    pass
        except TimeoutError:
            pass


async def plain_cancelled(target: Target, rng: random.Random) -> None:
    """As `cancelled`, of an answer that would come at once."""
    path, body = rng.choice(STREAMS)
    async with target.connection(abort=rng.random() < 0.5) as (_, writer):
        writer.write(target.request(path, {**body, "stream": False}))
        await writer.drain()
        await asyncio.sleep(rng.choice((0.0, 0.01, 0.1, 0.5)))


async def long_prompt_left(target: Target, rng: random.Random) -> None:
    """It goes while its prompt, which is long, is read."""
    body = {"prompt": "hello " * (target.most_body_bytes // 8), "stream": True}
    async with target.connection(abort=True) as (_, writer):
        writer.write(target.request("/v1/completions", body))
        await writer.drain()
        await asyncio.sleep(rng.choice((0.0, 0.01, 0.05)))


async def left(target: Target, rng: random.Random) -> None:
    """A connection on which nothing comes, or half a head."""
    async with target.connection(abort=rng.random() < 0.5) as (_, writer):
        writer.write(rng.choice((b"", b"POST /v1/compl", target.head("/tokenize", 50))))
        await asyncio.sleep(rng.uniform(0, 0.5))


HARM: tuple[Callable[[Target, random.Random], Awaitable[None]], ...] = (
    wrong_body,
    huge_body,
    wrong_key,
    garbage,
    hostile_schema,
    slow_reader,
    slow_sender,
    half_closed,
    pipelined,
    cancelled,
    plain_cancelled,
    long_prompt_left,
    left,
)
LEAVING = (cancelled, plain_cancelled, slow_reader, half_closed, pipelined)
