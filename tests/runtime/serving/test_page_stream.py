"""The stream of maps: one asks for all of them, whoever is slow or gone; and the page's policy."""

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import pytest
import zoo
from page_app import page_app, served
from vkv import AsyncLLM, SamplingParams
from vkv.runtime.engine.memory.memory_map import MemoryMap
from vkv.runtime.link.remote import RemoteEngine
from vkv.runtime.serving import page
from vkv.runtime.serving.http.app import build_app
from vkv.runtime.serving.http.errors import ApiError
from vkv.runtime.serving.options import ServeOptions
from vkv.runtime.serving.page import Frame, Projector
from vkv.runtime.serving.server import Server
from vkv.vmem.errors import EngineDied


@pytest.fixture(scope="module")
def drawn() -> MemoryMap:
    """The map of an engine that has nothing to do."""

    async def draw() -> MemoryMap:
        async with AsyncLLM(zoo.tiny_model("llama"), **zoo.with_defaults({})) as llm:
            return await llm.memory_map()

    return asyncio.run(draw())


@dataclass
class Source:
    """Maps of which `num_waiting` counts how often it was asked, unless `answer` says otherwise."""

    drawn: MemoryMap
    answer: Callable[[int], int] = lambda number: number
    asked_s: list[float] = field(default_factory=list)
    most_at_once: int = 0
    gate: asyncio.Event | None = None
    _num_asking: int = 0

    @property
    def num_asked(self) -> int:
        return len(self.asked_s)

    async def memory_map(self) -> MemoryMap:
        self.asked_s.append(time.monotonic())
        self._num_asking += 1
        self.most_at_once = max(self.most_at_once, self._num_asking)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(0)
            return msgspec.structs.replace(self.drawn, num_waiting=self.answer(self.num_asked))
        finally:
            self._num_asking -= 1


def _number(sent: bytes) -> int:
    """Which map an event shows."""
    assert sent.startswith(b"data: ")
    assert sent.endswith(b"\n\n")
    return msgspec.json.decode(sent[6:], type=Frame).map.num_waiting


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def _run(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


# -- who asks, and when -----------------------------------------------------------------------


def test_one_task_asks_for_all_viewers_and_none_while_nobody_looks(drawn: MemoryMap) -> None:
    async def test() -> None:
        source = Source(drawn, gate=asyncio.Event())
        projector = Projector(source)
        await asyncio.sleep(0.05)
        assert source.num_asked == 0
        viewers = [projector.watch() for _ in range(5)]
        waiting = [asyncio.ensure_future(anext(viewer)) for viewer in viewers]
        await _until(lambda: source.num_asked == 1)
        assert source.gate is not None
        source.gate.set()
        first = await asyncio.gather(*waiting)
        assert len({id(sent) for sent in first}) == 1, "it was encoded more than once"
        await _until(lambda: source.num_asked == 5)
        gaps = [b - a for a, b in zip(source.asked_s, source.asked_s[1:], strict=False)]
        assert min(gaps[1:]) > 0.09, "asked more than ten times a second"
        assert source.most_at_once == 1
        for viewer in viewers[1:]:
            await viewer.aclose()
        num_asked = source.num_asked
        await _until(lambda: source.num_asked > num_asked)  # one is still looking
        await viewers[0].aclose()
        assert projector.num_viewers == 0
        num_asked = source.num_asked
        await asyncio.sleep(0.3)
        assert source.num_asked == num_asked

    _run(test())


def test_a_map_that_looks_the_same_is_sent_once_and_a_newcomer_gets_it(drawn: MemoryMap) -> None:
    async def test() -> None:
        source = Source(drawn, lambda number: int(number > 4))
        projector = Projector(source)
        viewer = projector.watch()
        assert _number(await anext(viewer)) == 0
        await _until(lambda: source.num_asked == 3)
        newcomer = projector.watch()
        assert _number(await anext(newcomer)) == 0
        assert _number(await anext(viewer)) == _number(await anext(newcomer)) == 1
        assert source.num_asked >= 5
        rest = asyncio.ensure_future(anext(viewer))
        await _until(lambda: source.num_asked >= 8)
        assert not rest.done()
        rest.cancel()
        await asyncio.wait((rest,))
        await newcomer.aclose()

    _run(test())


def test_a_slow_viewer_gets_the_newest_map_and_none_of_those_it_missed(drawn: MemoryMap) -> None:
    async def test() -> None:
        source = Source(drawn)
        viewer = Projector(source).watch()
        assert _number(await anext(viewer)) == 1
        await _until(lambda: source.num_asked >= 5)
        await asyncio.sleep(0.02)  # until it is shown
        assert _number(await anext(viewer)) >= 5
        await viewer.aclose()

    _run(test())


def test_an_engine_that_is_gone_is_said_and_asked_again(
    drawn: MemoryMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_TROUBLE_S", 0.01)

    def answer(number: int) -> int:
        if number in (2, 3):
            raise EngineDied("the process\nhas ended")
        return number

    async def test() -> None:
        viewer = Projector(Source(drawn, answer)).watch()
        sent = [await anext(viewer) for _ in range(3)]
        assert sent[1] == b'event: trouble\ndata: {"message":"the process\\nhas ended"}\n\n'
        assert [_number(sent[0]), _number(sent[2])] == [1, 4]
        await viewer.aclose()

    _run(test())


def test_what_goes_wrong_otherwise_ends_every_stream_and_the_next_begins_anew(
    drawn: MemoryMap,
) -> None:
    def answer(number: int) -> int:
        assert number != 2, "a bug"
        return number

    async def test() -> None:
        projector = Projector(Source(drawn, answer))
        viewers = [projector.watch(), projector.watch()]
        assert [_number(await anext(viewer)) for viewer in viewers] == [1, 1]
        for viewer in viewers:
            with pytest.raises(AssertionError, match="a bug"):
                await anext(viewer)
        assert projector.num_viewers == 0
        viewer = projector.watch()
        assert _number(await anext(viewer)) == 3
        await viewer.aclose()

    _run(test())


def test_streams_end_when_the_server_shuts_down(drawn: MemoryMap) -> None:
    async def test() -> None:
        is_open = True
        projector = Projector(Source(drawn, lambda _: 0), lambda: is_open)
        viewer = projector.watch()
        await anext(viewer)
        is_open = False
        with pytest.raises(ApiError, match="shutting down"):
            await anext(viewer)
        with pytest.raises(ApiError, match="shutting down"):
            await anext(projector.watch())

    _run(test())


# -- over HTTP --------------------------------------------------------------------------------


async def _events(lines: AsyncIterator[str]) -> AsyncGenerator[Frame | str]:
    """Frames, and comments as texts."""
    async for line in lines:
        if line.startswith("data: "):
            yield msgspec.json.decode(line[6:], type=Frame)
        elif line:
            yield line


def test_a_stream_shows_a_request_grow_and_keeps_the_connection_afterwards() -> None:
    async def test() -> None:
        async with AsyncLLM(zoo.tiny_model("llama"), **zoo.with_defaults({})) as llm:
            with served(page_app(llm, llm)) as address:
                await _watch_one(llm, address)

    _run(test())


async def _watch_one(llm: AsyncLLM, address: str) -> None:
    async with (
        httpx.AsyncClient(base_url=address) as client,
        client.stream("GET", "/memory/stream") as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        events = _events(response.aiter_lines())
        first = await anext(events)
        assert isinstance(first, Frame)
        assert not first.map.strips
        asking = asyncio.ensure_future(_generate(llm))
        held = [0]
        async for event in events:
            if isinstance(event, Frame):
                held.append(event.map.totals.held)
                if event.map.counters.output_tokens == 200:
                    break
        await asking
        assert max(held) > held[1]
        async for event in events:  # nothing changes any more
            if isinstance(event, str):
                assert event.startswith(":")
                break
        await events.aclose()


async def _generate(llm: AsyncLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    async for _ in llm.generate([1, 2, 3], params):
        pass


def test_a_viewer_that_hangs_up_is_noticed(drawn: MemoryMap) -> None:
    async def test() -> None:
        source = Source(drawn, lambda _: 0)
        with served(page_app(source, None)) as address:
            async with (
                httpx.AsyncClient(base_url=address) as client,
                client.stream("GET", "/memory/stream") as response,
            ):
                lines = response.aiter_lines()  # which ends the stream when it is dropped
                await anext(lines)
                await _until(lambda: source.num_asked > 2)
            before = -1
            while source.num_asked != before:  # it goes on until the hang-up has arrived
                before = source.num_asked
                await asyncio.sleep(0.5)

    _run(test())


# -- the page itself --------------------------------------------------------------------------


def test_the_page_runs_what_is_in_it_and_nothing_else(drawn: MemoryMap) -> None:
    with served(page_app(Source(drawn), None)) as address:
        response = httpx.get(address + "/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.split(" ", 1) for part in response.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert forbidden not in response.text
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", response.text)


def test_a_server_shows_the_page_to_all_and_maps_to_who_has_a_key() -> None:
    server = Server(ServeOptions(api_key=["sesame"]), RemoteEngine("/nowhere/engine.sock"))
    with served(build_app(server)) as address, httpx.Client(base_url=address) as client:  # type: ignore[arg-type]
        assert client.get("/").status_code == 200
        assert client.get("/memory/stream").status_code == 401
        headers: dict[str, Any] = {"authorization": "Bearer sesame"}
        with client.stream("GET", "/memory/stream", headers=headers) as response:
            assert response.status_code == 200
            assert next(response.iter_lines()) == "event: trouble"  # there is no engine yet
        server.is_draining = True
        assert client.get("/memory/stream", headers=headers).status_code == 503
