"""The way to an engine's process, which is played here: what becomes of it when things go wrong."""

import asyncio
import errno
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vkv.runtime.link import remote
from vkv.runtime.link.remote import RemoteEngine
from vkv.runtime.link.wire import Frames


async def _calls(listener: socket.socket) -> socket.socket:
    loop = asyncio.get_running_loop()
    return (await asyncio.wait_for(loop.sock_accept(listener), 10))[0]


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.005)


@pytest.fixture
def listener(tmp_path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "engine"))
    listener.listen()
    listener.setblocking(False)
    return listener


def _run(listener: socket.socket, act: Callable[[RemoteEngine], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        engine = RemoteEngine(listener.getsockname())
        calling = asyncio.ensure_future(engine.stay_connected())
        try:
            await act(engine)
            assert not calling.done()
        finally:
            engine.close()
            calling.cancel()

    with listener:
        asyncio.run(run())


def test_without_a_descriptor_to_spare_the_engine_is_called_later(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [errno.EMFILE, errno.ENFILE]

    def fail_first(family: int, kind: int) -> socket.socket:
        if numbers:
            raise OSError(numbers.pop(), "injected")
        return socket.socket(family, kind)

    played = SimpleNamespace(**{**vars(socket), "socket": fail_first})
    monkeypatch.setattr(remote, "socket", played)

    async def act(engine: RemoteEngine) -> None:
        (await _calls(listener)).close()
        assert not numbers

    _run(listener, act)


def test_what_nobody_says_ends_the_connection_and_no_more(listener: socket.socket) -> None:
    async def act(engine: RemoteEngine) -> None:
        with await _calls(listener) as connection:
            Frames(connection).write(b"\xc1")  # which is no msgpack
            await _until(lambda: engine.has_died)
        (await _calls(listener)).close()  # it is called again

    _run(listener, act)
