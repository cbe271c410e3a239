"""Priorities and tenants of a server: who is served first, and what is told of whom."""

import asyncio
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zoo
from prometheus_client.parser import text_string_to_metric_families
from served import Served
from vkv import LLM, AsyncLLM
from vkv.runtime.engine.messages import SetPriority
from vkv.runtime.link.engine_process import EngineServer
from vkv.runtime.link.face import Face
from vkv.runtime.link.remote import RemoteEngine
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.request.step_output import StepOutput
from vkv.runtime.serving.local import app_of
from vkv.runtime.serving.options import ServeOptions
from vkv.runtime.serving.processes.run import serve
from vkv.vmem.errors import InvalidConfig, VkvError

GO_ON = {"prompt": "hello", "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}


def _value(server: Served, name: str, **labels: str) -> float:
    """Of one sample of /metrics."""
    text = server.client.get("/metrics").text
    (found,) = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return found


@pytest.fixture(scope="module")
def by_priority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    arguments = ["--scheduling-policy", "priority", "--priority-aging", "0", "--max-num-seqs", "1"]
    with Served(*arguments, log=tmp_path_factory.mktemp("priority") / "log") as server:
        yield server


def test_routes_take_priorities(by_priority: Served) -> None:
    for path, body in (
        ("/v1/chat/completions", {**CHAT, "priority": 3}),
        ("/v1/completions", {**GO_ON, "priority": -3, "max_tokens": 2}),
        ("/v1/responses", {"input": "What is 3 + 4?", "priority": 2}),
    ):
        answer = by_priority.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
    for priority, words in ((1 << 60, "priority = "), ("high", "priority")):
        answer = by_priority.client.post(
            "/v1/completions", json={**GO_ON, "priority": priority, "max_tokens": 2}
        )
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    claude = {**CHAT, "max_tokens": 4, "priority": 1}
    answer = by_priority.client.post("/v1/messages", json=claude)
    assert answer.status_code == 400
    assert "OpenAI's routes take it" in answer.json()["error"]["message"]


def test_the_better_priority_takes_the_slot_of_a_long_answer(by_priority: Served) -> None:
    async def work() -> list[str]:
        ended: list[str] = []

        async def ask(name: str, priority: int, count: int) -> None:
            body = {**GO_ON, "priority": priority, "max_tokens": count}
            answer = await client.post("/v1/completions", json=body)
            assert answer.json()["usage"]["completion_tokens"] == count, answer.text
            ended.append(name)

        async with httpx.AsyncClient(base_url=by_priority.url, timeout=60) as client:
            long = asyncio.ensure_future(ask("long", 5, 1200))
            while not (await client.get("/v1/load")).json()["running"]:
                await asyncio.sleep(0.01)
            low = asyncio.ensure_future(ask("low", 4, 4))
            high = asyncio.ensure_future(ask("high", 0, 40))
            await asyncio.gather(long, low, high)
        return ended

    ended = asyncio.run(work())
    assert ended[-1] == "long"
    by_priority.wait_until_idle()
    num_preemptions = _value(by_priority, "vkv:preemptions_total", kind="recompute")
    assert num_preemptions >= 1
    assert _value(by_priority, "vllm:num_preemptions_total") == num_preemptions


@pytest.fixture(scope="module")
def fair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fair")
    (folder / "keys").write_text("sesame tenant=ann weight=2\nother\n")
    arguments = ["--scheduling-policy", "fair", "--api-key-file", str(folder / "keys")]
    with Served(*arguments, "--max-num-seqs", "2", log=folder / "log", wait=False) as server:
        server.client.headers["authorization"] = "Bearer sesame"
        server.wait_until_ready()
        yield server


def test_tenants_are_the_keys_and_no_key_is_told(fair: Served) -> None:
    body = {**GO_ON, "max_tokens": 7}
    for path, asked in (
        ("/v1/completions", body),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 5, "ignore_eos": True}),
        ("/v1/messages", {**CHAT, "max_tokens": 5}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 5, "ignore_eos": True}),
    ):
        assert fair.client.post(path, json=asked).status_code == 200, path
    other = {"authorization": "Bearer other"}
    assert fair.client.post("/v1/completions", json=body, headers=other).status_code == 200
    fair.wait_until_idle()
    generated = "vkv:tenant_generation_tokens_total"
    assert _value(fair, generated, tenant="ann") >= 7 + 5 + 5 + 1
    assert _value(fair, generated, tenant="key-2") == 7
    assert _value(fair, "vkv:tenant_prompt_tokens_total", tenant="key-2") >= 1
    assert _value(fair, "vkv:tenant_requests", tenant="ann") == 0
    text = fair.client.get("/metrics").text
    assert "sesame" not in text + fair.log()
    assert '"other"' not in text


def test_a_priority_is_refused_where_requests_go_fairly(fair: Served) -> None:
    answer = fair.client.post("/v1/completions", json={**GO_ON, "priority": 1, "max_tokens": 2})
    assert answer.status_code == 400
    assert "priority is 1" in answer.json()["error"]["message"]


def test_weights_are_for_fair_scheduling(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame tenant=ann weight=2\n")
    options = ServeOptions(api_key_file=keys, port=0)
    with pytest.raises(InvalidConfig, match="use 'fair'"):
        serve(options, model=None, device="cpu", dtype="auto", engine={})
    llm = AsyncLLM(device="cpu")
    with pytest.raises(InvalidConfig, match="tenant_weights"):
        app_of(llm, api_key_file=keys)
    asyncio.run(llm.close())


class _Sink:
    """Notes the end of a request."""

    def __init__(self, name: str, ended: list[str], **more: Any) -> None:
        self.spec = RequestSpec(
            request_id=name, prompt_token_ids=[1, 2, 3], params=zoo.greedy(4), **more
        )
        self.is_finished = False
        self._ended = ended

    def accept(self, output: StepOutput) -> tuple[()]:
        if output.finish_reason is not None:
            self.is_finished = True
            self._ended.append(output.request_id)
        return ()

    def fail(self, error: VkvError) -> None:
        raise error


def test_a_priority_changes_in_an_engine_of_another_process(tmp_path: Path) -> None:
    path = str(tmp_path / "engine.sock")
    options = zoo.with_defaults({"max_seqs": 1, "scheduling_policy": "priority"})
    with (
        LLM(zoo.tiny_model("llama"), device="cpu", **options) as llm,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(path)
        listener.listen()
        face = Face.of(llm.loaded, llm.engine, llm.config)
        assert Face.unpack(face.pack()).admission.takes_priority
        server = EngineServer(llm.loop, face, listener, idle_trim_s=None)
        ended: list[str] = []

        async def work() -> None:
            welcome = asyncio.Event()
            engine = RemoteEngine(path)
            engine.on_welcome = lambda _: welcome.set()
            calling = asyncio.ensure_future(engine.stay_connected())
            async with asyncio.timeout(20):
                while not welcome.is_set():
                    await asyncio.to_thread(_turn, server)
                sinks = [_Sink(str(n), ended, priority=5, tenant=str(n)) for n in range(4)]
                engine.submit(sinks)
                engine.post(SetPriority("3", 1))
                engine.post(SetPriority("1", 9))
                while len(ended) < 4:
                    await asyncio.to_thread(_turn, server)
                while not engine.stats or engine.stats.num_running:
                    await asyncio.sleep(0.01)
                told = {tenant.tenant: tenant.output_tokens for tenant in engine.stats.tenants}
                assert told == {str(n): 4 for n in range(4)}
            engine.close()
            calling.cancel()

        asyncio.run(work())
        assert ended == ["3", "0", "2", "1"]
        server.close()


def _turn(server: EngineServer) -> None:
    """One turn, if there is something to do."""
    if server._loop.has_work or select.select([server._selector], [], [], 0.05)[0]:
        server.turn()
