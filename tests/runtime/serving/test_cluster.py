"""A server of several instances: its clients see one, its operators all of them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, is_alive
from vkv.runtime.serving.options import ServeOptions
from vkv.vmem.errors import InvalidConfig

pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")

_PROMPT = "Tell me a story about the number 7."
_KEY = "of-the-operator"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of two instances, whose end leaves no process."""
    log = tmp_path_factory.mktemp("cluster") / "log"
    arguments = ["--instances", "2", "--roles", "both,both", "--cluster-policy", "round_robin"]
    arguments += ["--api-key", _KEY]
    some = ["--device", "cpu", "--dtype", "float32", "--max-num-seqs", "4"]
    with Served(*arguments, *some, log=log) as served:
        served.client.headers["authorization"] = f"Bearer {_KEY}"
        yield served
        pids = [member["pid"] for member in _state(served)["instances"]]
        assert served.stop() == 0
        assert not any(map(is_alive, pids))


def _body(max_tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny-chat",
        "prompt": _PROMPT,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


def _complete(served: Served, max_tokens: int) -> str:
    answer = served.client.post("/v1/completions", json=_body(max_tokens))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def _state(served: Served) -> dict[str, Any]:
    return served.client.get("/cluster").json()


class _Stream:
    """A completion that is read on a thread."""

    def __init__(self, served: Served, max_tokens: int) -> None:
        self.text = ""
        self.is_whole = False
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(served, max_tokens))
        self._thread.start()

    def _read(self, served: Served, max_tokens: int) -> None:
        body = _body(max_tokens, stream=True)
        with served.client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.is_whole = True
                elif line.startswith("data:"):
                    event = json.loads(line[5:])
                    assert "error" not in event, event
                    self.text += event["choices"][0]["text"]
                    self.begun.set()

    def wait(self) -> str:
        self._thread.join(60)
        assert self.is_whole
        return self.text


def test_clients_see_one_server_and_operators_its_instances(served: Served) -> None:
    assert served.client.get("/health").status_code == 200
    texts = {_complete(served, 24) for _ in range(4)}  # by both of them
    assert len(texts) == 1
    state = _state(served)
    assert [one["role"] for one in state["instances"]] == ["both", "both"]
    assert all(one["kv_limit_bytes"] > 0 for one in state["instances"])
    metrics = served.client.get("/metrics").text
    for number in (0, 1):
        assert re.search(rf'vllm:generation_tokens_total{{.*instance="{number}".*}} \d', metrics)
    assert (
        'vkv:cluster_instances{model_name="tiny-chat",role="both",state="working"} 2.0' in metrics
    )
    assert served.load()["max_running"] == 8


def test_the_page_is_told_whose_slots_are_whose(served: Served) -> None:
    with served.client.stream("GET", "/memory/stream") as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data:"))
        frame = json.loads(next(lines)[5:])
    instances = frame["instances"]
    assert [(one["id"], one["state"]) for one in instances] == [(0, "working"), (1, "working")]
    assert [one["first_slot"] for one in instances] == [0, instances[0]["num_slots"]]
    assert frame["map"]["num_slots"] == sum(one["num_slots"] for one in instances)


def test_orders_need_a_key_and_sense(served: Served) -> None:
    nobody = {"authorization": "Bearer nobody"}
    assert served.client.get("/cluster", headers=nobody).status_code == 401
    for path, body in (
        ("/cluster/drain", {"instance": 99}),
        ("/cluster/drain", {"instances": 0}),
        ("/cluster/scale", {"instances": 0}),
        ("/sleep", {}),
    ):
        answer = served.client.post(path, json=body)
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["message"]


def test_a_killed_instance_breaks_no_stream(served: Served) -> None:
    right = _complete(served, 400)
    streams = [_Stream(served, 400) for _ in range(2)]
    for stream in streams:
        assert stream.begun.wait(30)
    victim = _state(served)["instances"][0]
    os.kill(victim["pid"], signal.SIGKILL)
    assert [stream.wait() for stream in streams] == [right, right]
    state = _state(served)
    assert [one["id"] for one in state["instances"]] != [victim["id"]]
    assert len(state["instances"]) == 1
    assert state["num_recomputed"] >= 1
    assert served.client.get("/health").status_code == 200


def test_the_command_scales_and_drains(served: Served) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "vkv.runtime.cli.main", "cluster", *words]
        environment = {**os.environ, "VKV_API_KEY": _KEY}
        return subprocess.run(
            [*line, "--url", served.url], capture_output=True, text=True, env=environment
        )

    told = command("scale", "2")
    assert told.returncode == 0, told.stderr
    right = _complete(served, 300)
    streams = [_Stream(served, 300) for _ in range(2)]
    for stream in streams:
        assert stream.begun.wait(30)
    before = _state(served)
    oldest = before["instances"][0]
    assert command("drain", str(oldest["id"])).returncode == 0
    assert not is_alive(oldest["pid"])
    assert [stream.wait() for stream in streams] == [right, right]
    after = _state(served)
    assert after["num_recomputed"] == before["num_recomputed"]
    told = command("status")
    assert f"{after['num_migrations']} sequences moved" in told.stdout
    told = command("drain", "77")
    assert told.returncode == 2
    assert "instance 77 is not there" in told.stderr


def test_a_model_that_is_not_there_ends_the_server(tmp_path: Path) -> None:
    arguments = ["/nowhere/at/all", "--instances", "1", "--roles", "both"]
    served = Served(*arguments, log=tmp_path / "log", wait=False)
    assert served.process.wait(60) == 2
    assert "/nowhere/at/all" in served.log()


@pytest.mark.parametrize("options", [{"api_server_count": 2}, {"restart_engine": True}])
def test_what_is_for_one_engine_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="for one engine"):
        ServeOptions(instances=2, **options)


@pytest.mark.parametrize("options", [{"lending": True}, {"ray_address": "auto"}])
def test_what_is_for_instances_is_refused_for_one_engine(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="cluster_policy to have a cluster of one"):
        ServeOptions(**options)
    for several in ({"instances": 2}, {"cluster_policy": "llumnix"}, {"max_instances": 2}):
        ServeOptions(**several, **options)
    ServeOptions(lending=False)  # as one engine does


@pytest.mark.parametrize(
    "options", [{"roles": "prefill, decode"}, {"cluster_policy": "round_robin"}, {"instances": 5}]
)
def test_what_does_not_go_with_more_instances_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="the cluster policy llumnix, and no roles but both"):
        ServeOptions(**{"instances": 2, "max_instances": 4, **options})
    ServeOptions(instances=2, max_instances=4, roles="both,both")
