"""What only goes wrong at the edges: feeders, places, paths, templates, an end while it rests."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from vkv import AsyncLLM
from vkv.runtime.serving import cluster_engine, generation
from vkv.runtime.serving.http.app import build_app
from vkv.runtime.serving.http.errors import ApiError
from vkv.runtime.serving.local import app_of
from vkv.runtime.serving.options import ServeOptions
from vkv.runtime.serving.places import Admittance
from vkv.runtime.serving.processes import run
from vkv.runtime.serving.server import Server
from vkv.vmem.errors import InvalidConfig, InvalidOperation

ENDLESS_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


class _Broken:
    """Requests of which one fails in a way that nobody thought of, and the others never end."""

    def run(self, text: str, name: str) -> AsyncGenerator[None]:
        return self._arrivals(text)

    async def _arrivals(self, text: str) -> AsyncGenerator[None]:
        if text == "broken":
            raise ZeroDivisionError
        await asyncio.Event().wait()
        yield


class _NoMetrics:
    def ended(self, text: str) -> None:
        """Nothing is counted."""


def test_one_of_several_requests_fails_in_an_unknown_way() -> None:
    async def work() -> None:
        requests: Any = _Broken()
        texts: Any = ["fine", "broken"]
        metrics: Any = _NoMetrics()
        async with asyncio.timeout(10):
            async for _ in generation.deltas(requests, metrics, texts, "name"):
                raise AssertionError("nothing comes")

    with pytest.raises(ZeroDivisionError):
        asyncio.run(work())


@pytest.mark.parametrize(("key", "most"), [(None, 6), (0, 3)])
def test_what_never_has_a_place_is_not_told_to_wait(key: int | None, most: int) -> None:
    options = ServeOptions(max_num_queued_reqs=4, api_key=("a", "b"))
    refused: list[str] = []
    places = Admittance(options, 2, refused.append)
    with places.place(most, 1, key):
        for count, status in ((1, 503 if key is None else 429), (most + 1, 400)):
            with pytest.raises(ApiError) as error:
                places.check(count, 1, key)
            assert error.value.status == status
    places.check(most, 1, key)


def test_a_path_forges_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        llm = AsyncLLM(device="cpu")
        transport = httpx.ASGITransport(app=app_of(llm, root_path="/under", api_key=("x",)))
        async with httpx.AsyncClient(transport=transport, base_url="http://local") as client:
            await client.get("/a%0A2026-01-01 INFO forged")
            for path in ("/health", "/under/health", "/under/ready"):
                assert (await client.get(path)).status_code == 200, path
            for path in ("http://local//health", "/health/", "/v1/%2e%2e/health", "/under//health"):
                assert (await client.get(path)).status_code == 401, path
            refused = await client.post("/under/v1/messages", json={})
            assert refused.json()["type"] == "error"  # in the protocol's words under a proxy, too
            shown = {"x-api-key": "x"}
            for extra, status in ((CHAT, 200), ({**CHAT, "chat_template": ENDLESS_TEMPLATE}, 400)):
                told = await client.post("/v1/chat/completions", json=extra, headers=shown)
                assert told.status_code == status, told.text
            assert "--trust-request-chat-template" in told.text
        await llm.close()

    with caplog.at_level(logging.INFO, logger="vkv.access"):
        asyncio.run(work())
    lines = [record.getMessage() for record in caplog.records if record.name == "vkv.access"]
    assert lines
    assert not any("\n" in line for line in lines)


class _Quiet:
    """An engine that is there, and has said nothing yet of what it holds."""

    is_ready = True
    has_died = False
    stats = None
    stuck_s = 99.0

    async def memory_map(self) -> None:
        """Nobody asks."""


def _status_of(path: str, **options: Any) -> int:
    """Of a server of such an engine."""

    async def work() -> httpx.Response:
        engine: Any = _Quiet()
        app = build_app(Server(ServeOptions(**options), engine))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://local") as client:
            return await client.get(path)

    return asyncio.run(work()).status_code


def test_how_much_is_under_way_before_the_first_word_of_it() -> None:
    assert _status_of("/v1/load") == 503


def test_how_long_an_engine_may_rest() -> None:
    assert [_status_of("/health", stuck_after=s) for s in (60, 100, 0)] == [503, 200, 200]


class _DeadEngine:
    """An engine's process that has ended."""

    def wait(self) -> int:
        return 1

    def stop(self) -> None:
        """It has."""


class _Socket:
    path = "/nowhere"
    was_ready = True

    def start(self, *order: object) -> _DeadEngine:
        return _DeadEngine()

    def close(self) -> None:
        """There is none."""


def test_instances_that_cannot_be_started_end_the_command(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: object) -> None:
        raise InvalidOperation("instance 0 ended before it had loaded its model")

    monkeypatch.setattr(cluster_engine, "Cluster", fail)
    options = ServeOptions(port=0, instances=2)

    async def work() -> int:
        supervisor = run.Supervisor(options, (None, "cpu", "auto", {}), run.listen(options))
        async with asyncio.timeout(60):
            return await supervisor.run()

    assert asyncio.run(work()) == 1
    assert "instance 0 ended" in caplog.text


def test_a_unix_socket_is_taken_over_of_the_dead_alone(tmp_path: Path) -> None:
    options = ServeOptions(uds=str(tmp_path / "socket"))
    first = run.listen(options)
    with pytest.raises(InvalidConfig, match="another server does; use another --uds"):
        run.listen(options)
    first.close()
    run.listen(options).close()
    for path in ("/no/such/folder/socket", str(tmp_path / ("long" * 50))):
        with pytest.raises(InvalidConfig, match=r"cannot be listened on: (?!None).*another --uds"):
            run.listen(ServeOptions(uds=path))


def test_sigterm_while_it_rests_before_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "EngineSocket", _Socket)
    monkeypatch.setattr(run, "_FIRST_REST_S", 300.0)
    options = ServeOptions(port=0, restart_engine=True)

    async def work() -> int:
        supervisor = run.Supervisor(options, (None, "cpu", "auto", {}), run.listen(options))
        asyncio.get_running_loop().call_later(0.5, os.kill, os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(60):
            return await supervisor.run()

    assert asyncio.run(work()) == 0
