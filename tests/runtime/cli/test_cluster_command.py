"""`vkv cluster` before a server that answers as it is told."""

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner
from vkv.runtime.cli.cluster import cluster
from vkv.vmem.errors import InvalidConfig, InvalidOperation

_INSTANCE = {
    "id": 3,
    "role": "decode",
    "pid": 4711,
    "node": "",
    "state": "draining",
    "is_draining": True,
    "num_sequences": 5,
    "carried_bytes": 3 << 20,
    "handed_pages": 17,
    "running": 4,
    "waiting": 1,
    "kv_used_bytes": 1 << 20,
    "kv_limit_bytes": 64 << 20,
    "lent_tokens": 1536,
    "borrowed_tokens": 0,
}
_STATE = {
    "num_migrations": 9,
    "num_stayed": 1,
    "num_recomputed": 2,
    "num_under_way": 6,
    "num_bytes_copied": 5 << 20,
    "num_pages_moved": 40,
    "num_died": 1,
    "num_drained": 2,
    "num_loans_called_back": 7,
    "num_loans_lost": 8,
    "instances": [_INSTANCE],
    "loans": [
        {"debtor": 1, "creditor": 3, "num_loans": 2, "num_tokens": 1536, "bytes_a_step": 3072.0}
    ],
}


class _Server(http.server.ThreadingHTTPServer):
    """Answers `status` with `body`, orders after a while."""

    status = 200
    body: Any = _STATE
    orders: list[tuple[str, Any]]
    num_looks = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.num_looks += 1
        self._answer(200, _STATE)

    def do_POST(self) -> None:
        told = self.rfile.read(int(self.headers["content-length"]))
        self.server.orders.append((self.path, json.loads(told)))
        time.sleep(1.2)  # so that it is looked at meanwhile
        self._answer(self.server.status, self.server.body)

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.orders = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _run(server: _Server, *words: str) -> Any:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return CliRunner(env={"COLUMNS": "200"}).invoke(cluster, [*words, "--url", url])


def test_status_shows_what_each_has_and_what_all_have_done(server: _Server) -> None:
    told = _run(server, "status").output
    for word in ("decode", "draining", "here", "4711", "17", "3.0", "64.0", "1,536"):
        assert word in told
    assert "9 sequences moved, 1 stayed" in told
    assert "6 are on their way" in told
    assert "40 pages changed hands, 5.0 MiB were copied; 1 instances died, 2 were ended" in told
    assert "instance 3 lends instance 1 room for 1,536 tokens; 3.0 KiB" in told
    assert "7 loans were called back, 8 were lost" in told


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (("drain", "3"), ("/cluster/drain", {"instance": 3})),
        (("scale", "4"), ("/cluster/scale", {"instances": 4})),
    ],
)
def test_an_order_is_given_once_and_looked_after(
    server: _Server, words: tuple[str, ...], order: tuple[str, Any]
) -> None:
    told = _run(server, *words)
    assert told.exit_code == 0, told.exception
    assert server.orders == [order]
    assert server.num_looks >= 2
    assert "9 sequences moved" in told.output


def test_what_the_server_refuses_is_said(server: _Server) -> None:
    server.status, server.body = 400, {"error": {"message": "instance 3 is the only one"}}
    found = _run(server, "drain", "3").exception
    assert isinstance(found, InvalidOperation)
    assert "only one" in str(found)
    server.status, server.body = 401, {"error": {"message": "no key"}}
    assert "--api-key" in str(_run(server, "drain", "3").exception)
    server.status, server.body = 404, {}
    assert "has one engine" in str(_run(server, "scale", "3").exception)


def _say_what_is_no_http(listener: socket.socket) -> None:
    caller, _ = listener.accept()
    with caller:
        caller.recv(1024)
        caller.sendall(b"SSH-2.0-nobody\r\n")


def test_a_server_that_is_not_there_is_named() -> None:
    runner = CliRunner()
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=_say_what_is_no_http, args=(other,), daemon=True).start()
        urls = ["http://127.0.0.1:1", "127.0.0.1:8000", "http://127.0.0.1:port", "http://h/ x"]
        for url in (*urls, f"http://127.0.0.1:{other.getsockname()[1]}"):
            found = runner.invoke(cluster, ["status", "--url", url]).exception
            assert isinstance(found, InvalidConfig), url
            assert url in str(found)
    for words in (["scale", "0"], ["drain", "one"]):
        assert runner.invoke(cluster, words).exit_code == 2
