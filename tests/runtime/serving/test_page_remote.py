"""A map of an engine on the other side of a socket."""

import asyncio
import socket
import threading
from pathlib import Path

import pytest
import zoo
from vkv import LLM
from vkv.runtime.link.engine_process import EngineServer
from vkv.runtime.link.face import Face
from vkv.runtime.link.remote import RemoteEngine
from vkv.vmem.errors import EngineDied


def _face(llm: LLM) -> Face:
    return Face(
        token_bytes=1,
        capacity_tokens=1,
        name="tiny",
        tokenizer=None,
        sampling_defaults={},
        admission=llm.engine.admission,
        dtype="float32",
        device="cpu",
        max_seqs=2,
        page_bytes=llm.stats().page_bytes,
    )


def test_a_remote_engine_tells_the_map_that_its_loop_draws(tmp_path: Path) -> None:
    path = str(tmp_path / "engine.sock")
    with (
        LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({})) as llm,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        llm.generate([[1, 2, 3]], zoo.greedy(9))
        listener.bind(path)
        listener.listen()
        server = EngineServer(llm._driver._loop, _face(llm), listener, idle_trim_s=None)
        turns = threading.Thread(target=lambda: [server.turn() for _ in range(3)])
        turns.start()
        asyncio.run(_ask(path, llm))
        turns.join(20)
        assert not turns.is_alive()
        server.close()


async def _ask(path: str, llm: LLM) -> None:
    welcome = asyncio.Event()
    engine = RemoteEngine(path)
    engine.on_welcome = lambda _: welcome.set()
    with pytest.raises(EngineDied, match="not there"):
        await engine.memory_map()
    calling = asyncio.ensure_future(engine.stay_connected())
    async with asyncio.timeout(20):
        await welcome.wait()
        drawn = await engine.memory_map()
    assert drawn == llm._driver._loop.memory_map()
    assert [strip.state for strip in drawn.strips] == ["parked"]
    engine.close()
    calling.cancel()
