"""What operators rely on: keys, limits, health, restarts, and ends without loose ends."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from served import Served, events, is_alive
from typer.testing import CliRunner
from vkv.runtime.cli.main import app
from vkv.vmem.errors import InvalidConfig

CHAT = {"messages": [{"role": "user", "content": "What is 3 + 4?"}], "max_tokens": 8}
LONG = {"prompt": "hello", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with keys, small limits, JSON logs, and an engine that is started again."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text("# ours\nfirst\nsecond\n")
    arguments = ["--api-key-file", str(folder / "keys"), "--max-body-bytes", "2000"]
    arguments += ["--max-num-seqs", "2", "--max-num-queued-reqs", "2", "--log-format", "json"]
    arguments += ["--served-model-name", "one", "--served-model-name", "two", "--restart-engine"]
    with Served(*arguments, "--sse-keep-alive-interval", "0.2", log=folder / "log") as server:
        server.client.headers["authorization"] = "Bearer first"
        yield server


def test_every_route_wants_a_key_but_two(guarded: Served) -> None:
    with httpx.Client(base_url=guarded.url) as nobody:
        paths = nobody.get("/openapi.json", headers={"x-api-key": "second"}).json()["paths"]
        for path, methods in {**paths, "/nowhere": {"get": {}}, "/docs": {"get": {}}}.items():
            for method in methods:
                answer = nobody.request(method, path.replace("{name}", "one"))
                is_open = path in ("/health", "/ready")
                assert answer.status_code == (200 if is_open else 401), (method, path)
        for shown in ("Bearer third", "Bearer", "Basic first", "Bearer first second"):
            answer = nobody.get("/v1/models", headers={"authorization": shown})
            assert answer.status_code == 401, shown
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
        assert nobody.get("/v1/models", headers={"x-api-key": "first"}).status_code == 200


def test_names_of_the_model(guarded: Served) -> None:
    cards = guarded.client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["one", "two"]
    for name in ("one", "two"):
        answer = guarded.client.post("/v1/chat/completions", json={**CHAT, "model": name})
        assert answer.json()["model"] == name


def test_request_ids_are_echoed(guarded: Served) -> None:
    for given, expected in (("mine-1", "mine-1"), ("not\tone", None), ("x" * 200, None)):
        answer = guarded.client.get("/v1/models", headers={"x-request-id": given})
        told = answer.headers["x-request-id"]
        assert told == expected or (expected is None and told != given and len(told) == 16)
    entries = [json.loads(line) for line in guarded.log().splitlines() if '"path"' in line]
    assert any(entry["request_id"] == "mine-1" for entry in entries)
    assert not any("What is" in line for line in guarded.log().splitlines())


def test_a_body_that_is_too_large_is_not_read(guarded: Served) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    for content in (b" " * 2001, pieces()):
        answer = guarded.client.post("/v1/completions", content=content)
        assert answer.status_code == 413, answer.text
        assert "2000" in answer.json()["error"]["message"]


def test_more_than_the_places_is_refused_with_a_time(guarded: Served) -> None:
    """Two run and two wait; of these four one key may hold two."""
    first = {"authorization": "Bearer first"}
    second = {"authorization": "Bearer second"}
    body = {**LONG, "stream": True}
    url = guarded.url + "/v1/completions"
    with httpx.Client(timeout=60) as client:
        streams = []
        for headers in (first, first, second, second):
            stream = client.stream("POST", url, json=body, headers=headers)
            streams.append(stream)
            assert stream.__enter__().status_code == 200
        refused = client.post(url, json=body, headers=first)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        for stream in streams[:1]:
            stream.__exit__(None, None, None)
        _until(lambda: guarded.load()["server_load"] == 3)
        refused = client.post(url, json={**body, "n": 2, "temperature": 1}, headers=second)
        assert refused.status_code == 429
        for stream in streams[1:]:
            stream.__exit__(None, None, None)
    guarded.wait_until_idle()


def test_comments_keep_a_stream_that_waits(guarded: Served) -> None:
    """Two run, and a third stands in line: it gets comments meanwhile, and then its answer."""
    keys = [{"authorization": f"Bearer {key}"} for key in ("first", "first", "second")]
    url = guarded.url + "/v1/completions"
    lengths = (1500, 1500, 4)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=60))
        answers = []
        for key, length in zip(keys, lengths, strict=True):
            body = {**LONG, "max_tokens": length, "stream": True}
            answers.append(stack.enter_context(client.stream("POST", url, json=body, headers=key)))
        lines = list(answers[2].iter_lines())
    comments = [line for line in lines if line.startswith(":")]
    assert comments
    assert lines.index(comments[-1]) < lines.index("data: [DONE]")
    assert len(events(lines)) >= 2
    guarded.wait_until_idle()


def test_disconnects_free_their_pages(served: Served) -> None:
    """Fifty callers hang up at some time, on every streaming route and on plain ones."""
    rng = random.Random(0)
    routes = [
        ("/v1/completions", {**LONG, "stream": True}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 1500, "ignore_eos": True, "stream": True}),
        ("/v1/completions", LONG),
        ("/v1/completions", {**LONG, "prompt": ["hello", "you"], "n": 1, "stream": True}),
    ]
    url = served.url

    def hang_up(path: str, body: dict[str, object], after_s: float) -> None:
        timeout = httpx.Timeout(30, read=after_s)
        with httpx.Client(timeout=timeout) as client:
            try:
                with client.stream("POST", url + path, json=body) as answer:
                    end = time.monotonic() + after_s
                    for _ in answer.iter_bytes():
                        if time.monotonic() > end:
                            break
            except httpx.TimeoutException:
                pass

    threads = [
        threading.Thread(target=hang_up, args=(*rng.choice(routes), rng.uniform(0.0, 0.6)))
        for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served.wait_until_idle()
    assert served.client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_abort_by_name(served: Served) -> None:
    body = {**LONG, "stream": True, "request_id": "mine"}
    with served.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        refused = served.client.post("/abort_requests", json={})
        assert refused.status_code == 400
        told = served.client.post("/abort_requests", json={"request_ids": ["cmpl-mine"]})
        assert told.status_code == 200
        data = events(lines)
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["choices"][0]["finish_reason"] == "abort"
    served.wait_until_idle()


def test_sleep_and_wake_up(served: Served) -> None:
    served.wait_until_idle()
    assert served.client.post("/sleep").status_code == 200
    assert served.client.get("/is_sleeping").json() == {"is_sleeping": True}
    refused = served.client.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 503
    assert "asleep" in refused.json()["error"]["message"]
    assert served.client.post("/wake_up").status_code == 200
    assert served.client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert served.client.post("/reset_prefix_cache").json()["freed_bytes"] > 0
    assert served.load()["kv_parked_bytes"] == 0


def test_a_killed_engine_ends_streams_and_comes_back(guarded: Served) -> None:
    body = {**LONG, "stream": True}
    with guarded.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(guarded.engine(), signal.SIGKILL)
        data = events(lines)
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["error"]["code"] == "engine_dead"
    health = guarded.client.get("/health")
    assert health.status_code == 503
    assert "died" in health.json()["error"]["message"]
    _until(lambda: _engine_of(guarded) is not None)
    os.kill(_engine_of(guarded) or 0, signal.SIGKILL)  # while it loads again
    guarded.wait_until_ready()
    assert guarded.client.get("/health").status_code == 200
    assert guarded.client.post("/v1/chat/completions", json=CHAT).status_code == 200


def _engine_of(server: Served) -> int | None:
    """The engine's process; None while there is none."""
    try:
        return server.engine()
    except (ValueError, OSError):
        return None


def test_a_stopped_engine_is_no_healthy_one(tmp_path: Path) -> None:
    with Served("--stuck-after", "0.5", log=tmp_path / "log") as server:
        engine = server.engine()
        body = {**LONG, "temperature": 1, "n": 16, "stream": True}  # for long enough
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()  # which ends the request when it is dropped
            next(lines)
            os.kill(engine, signal.SIGSTOP)
            _until(lambda: server.client.get("/health").status_code == 503)
            os.kill(engine, signal.SIGCONT)
            _until(lambda: server.client.get("/health").status_code == 200)
        os.kill(server.process.pid, signal.SIGKILL)  # and its children go with it
        _until(lambda: not is_alive(engine))


def _over_tls(folder: Path) -> tuple[list[str], httpx.Client]:
    """Arguments of a server with a certificate of its own, and a client that believes it."""
    key, certificate = folder / "key", folder / "certificate"
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", str(key), "-out", str(certificate))
    command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    arguments = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    return arguments, httpx.Client(verify=ssl.create_default_context(cafile=certificate))


def _at_a_unix_socket(folder: Path) -> tuple[list[str], httpx.Client]:
    path = str(folder / "socket")
    return ["--uds", path], httpx.Client(transport=httpx.HTTPTransport(uds=path))


@pytest.mark.parametrize(
    ("reached", "base_url", "patience_s"),
    [(_over_tls, "https://127.0.0.1:", 30), (_at_a_unix_socket, "unix:", 0)],
    ids=["over TLS, in time", "at a Unix socket, too late"],
)
def test_sigterm_ends_what_is_under_way(
    tmp_path: Path,
    reached: Callable[[Path], tuple[list[str], httpx.Client]],
    base_url: str,
    patience_s: int,
) -> None:
    """In its time if that suffices, else with the reason "abort"; and nothing is left behind."""
    if reached is _over_tls and shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not there")
    arguments, client = reached(tmp_path)
    arguments += ["--shutdown-timeout", str(patience_s), "--api-server-count", "1"]
    with Served(*arguments, log=tmp_path / "log", wait=False) as server:
        assert server.url.startswith(base_url)
        client.base_url = server.client.base_url  # "http://local" for a Unix socket
        client.timeout = 60
        server.client.close()
        server.client = client
        server.wait_until_ready()
        assert client.get("/version").status_code == 200
        children = server.children()
        body = {**LONG, "max_tokens": 300, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            if patience_s:
                _until(lambda: client.get("/ready").status_code == 503)
                assert client.post("/v1/completions", json=LONG).status_code == 503
            data = events(lines)
        assert data[-1] == "[DONE]"
        reason = json.loads(data[-2])["choices"][0]["finish_reason"]
        assert reason == ("length" if patience_s else "abort")
        assert server.stop() == 0
        assert not [pid for pid in children if is_alive(pid)]


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of two front processes, which all are told to end at once in the end."""
    log = tmp_path_factory.mktemp("fronts") / "log"
    with Served("--api-server-count", "2", log=log) as server:
        yield server
        body = {**LONG, "max_tokens": 300, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            for pid in (*server.children(), server.process.pid):  # as service managers do
                os.kill(pid, signal.SIGTERM)
            data = events(lines)
        assert json.loads(data[-2])["choices"][0]["finish_reason"] == "length"
        assert server.stop() == 0


def test_a_front_that_dies_is_started_again(fronts: Served) -> None:
    engine = fronts.engine()
    first, second = (pid for pid in fronts.children() if pid != engine)
    greedy = {**CHAT, "temperature": 0}
    answers = [
        httpx.post(fronts.url + "/v1/chat/completions", json=greedy, timeout=60) for _ in range(8)
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
    os.kill(first, signal.SIGKILL)
    _until(lambda: {*fronts.children()} - {first} > {second, engine})
    _until(lambda: _is_ready(fronts))


def test_several_fronts_tell_of_all(fronts: Served) -> None:
    before = _num_stopped(fronts)
    for _ in range(6):  # a connection each, so that both have some
        body = {**CHAT, "max_tokens": 64, "temperature": 0}
        httpx.post(fronts.url + "/v1/chat/completions", json=body, timeout=60)
    fronts.wait_until_idle()
    assert _num_stopped(fronts) - before == 6


def _num_stopped(server: Served) -> float:
    """Requests that ended by themselves, as whichever front is asked counts them."""
    of_one = r'^vllm:request_success_total\{.*finished_reason="stop".*\} (\S+)$'
    text = httpx.get(server.url + "/metrics").text
    return sum(map(float, re.findall(of_one, text, flags=re.MULTILINE)))


def _is_ready(server: Served) -> bool:
    try:
        return all(httpx.get(server.url + "/ready").status_code == 200 for _ in range(4))
    except httpx.TransportError:
        return False


def test_an_address_in_use(served: Served) -> None:
    port = served.url.rpartition(":")[2]
    told = CliRunner().invoke(app, ["serve", "--port", port])
    assert isinstance(told.exception, InvalidConfig)
    assert "cannot be listened on" in str(told.exception)


def test_a_certificate_that_is_none() -> None:
    files = ["--ssl-certfile", __file__, "--ssl-keyfile", __file__]
    told = CliRunner().invoke(app, ["serve", "--port", "0", *files])
    assert isinstance(told.exception, InvalidConfig)
    assert f"ssl_certfile {__file__}" in str(told.exception)


def test_what_only_the_engine_can_say_ends_the_server(tmp_path: Path) -> None:
    for arguments, words in (
        (["--port", "0", str(tmp_path / "nothing")], "nothing"),
        (["--port", "0", "--tool-call-parser", "hf", "--api-server-count", "2"], "response_templ"),
    ):
        told = subprocess.run(
            [sys.executable, "-m", "vkv.runtime.cli.main", "serve", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert told.returncode == 2, told.stderr
        assert words in told.stderr


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--chat-template", "/nowhere/none", "chat_template"),
        ("--tool-call-parser", "nope", "tool_call_parser is 'nope'"),
        ("--max-num-seqs", "0", "max_seqs is 0"),
        ("--key-share", "2", "key_share is 2"),
        ("--port", "65536", "port is 65536"),
    ],
)
def test_a_value_that_cannot_be_is_refused_at_once(option: str, value: str, words: str) -> None:
    told = CliRunner().invoke(app, ["serve", "--port", "0", option, value])
    assert isinstance(told.exception, InvalidConfig)
    assert words in str(told.exception)


def _until(condition: object, within_s: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
