"""Callers who are gone, slow, silent or endless; against an application that only waits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import pytest
import uvicorn
from vkv.runtime.serving.http.connections import Connection

GET = b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n"
FLOOD = b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST /body HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


class Impatient(Connection):
    """With limits that a test can wait for."""

    head_s = 0.3
    stall_s = 0.3


class Waiting:
    """An application whose requests end when their callers go.

    Attributes:
        begun, gone: requests so far.
        flooded: bytes that a caller was sent.
    """

    def __init__(self) -> None:
        self.begun = self.gone = self.flooded = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        self.begun += 1
        message = await receive()
        while message["type"] == "http.request" and message["more_body"]:
            message = await receive()
        if scope["path"] == "/flood":
            await self._flood(send)
        while message["type"] != "http.disconnect":
            message = await receive()
        self.gone += 1

    async def _flood(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
            self.flooded += 1 << 16


@contextlib.asynccontextmanager
async def serving(app: Waiting) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    config = uvicorn.Config(app, port=0, http=Impatient, lifespan="off", log_config=None)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield server, port
    finally:
        await server.shutdown()


Visit = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def visit(app: Waiting, what: Visit) -> None:
    """Call it, and expect that no connection is left afterwards."""

    async def work() -> None:
        async with serving(app) as (server, port), asyncio.timeout(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(ConnectionError):
                await what(reader, writer)
            while server.server_state.connections or server.server_state.tasks:
                await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(work())


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_of_a_connections_requests_are_told_of_its_end(count: int) -> None:
    app = Waiting()

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(count * GET)
        await _until(lambda: app.begun == 1)
        writer.close()

    visit(app, leave)
    assert (app.begun, app.gone) == (1, 1)


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_has_its_time(sent: bytes) -> None:
    async def dawdle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        assert await reader.read() == b""

    visit(Waiting(), dawdle)


def test_a_request_under_way_may_take_longer() -> None:
    """Even if another has half begun behind it."""
    app = Waiting()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GET + b"GET")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * Impatient.head_s):
                await reader.read()
        writer.close()

    visit(app, wait)
    assert app.gone == 1


@pytest.mark.parametrize(
    "begin", [b"GET / HTTP/1.1\r\nx: ", CHUNKED + b"1;x=", CHUNKED + b"0\r\nx: "]
)
def test_endless_heads_extensions_and_trailers_are_cut(begin: bytes) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(begin)
        while not reader.at_eof() and sent < 1 << 27:
            writer.write(b"a" * 10_000)
            sent += 10_000
            await writer.drain()
            await asyncio.sleep(0)

    visit(Waiting(), flood)
    assert sent < 1 << 24


def test_who_takes_nothing_is_hung_up_on() -> None:
    app = Waiting()

    async def sleep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(FLOOD)
        await _until(lambda: app.gone == 1)

    visit(app, sleep)
    assert app.flooded  # what was sent behind the end went nowhere


def test_who_takes_it_slowly_is_not() -> None:
    app = Waiting()

    async def sip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(FLOOD)
        total = 0
        while total < 1000 << 16:
            total += len(await reader.read(1 << 18))
            await asyncio.sleep(0.01)
        writer.close()

    visit(app, sip)
    assert app.gone == 1
