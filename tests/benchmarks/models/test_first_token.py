"""`vkv bench first-token`: fresh processes, each timed to its first token."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from vkv.bench.models import first_token
from vkv.bench.models.options import FirstTokenOptions
from vkv.vmem.errors import InvalidConfig

SERVER = f"""#!{sys.executable}
import http.server, json, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
begun = time.time()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200 if time.time() - begun > 0.1 else 503)
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(200 if asked["prompt"] == [1, 2, 3] and asked["n_predict"] == 1 else 400)
    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{{}}")

if not open(given["--model"], "rb").read(4) == b"GGUF":
    sys.exit("no model")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def options(**changes: object) -> FirstTokenOptions:
    given = {"shape": "llama-tiny", "dtype": "bfloat16", "threads": 1, "prompt_len": 3}
    return FirstTokenOptions(**given | changes)  # type: ignore[arg-type]


def test_every_start_is_timed_and_who_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    server = tmp_path / "llama-server"
    server.write_text(SERVER)
    server.chmod(0o755)
    monkeypatch.setattr(first_token, "IMPORTS", {"Python alone": "pass"})
    peers = {"openvino": sys.executable, "llama-server": os.fspath(server)}
    chosen = options(systems=("vkv",), peers=peers, repeats=1)
    path, tables = first_token.run(chosen, tmp_path, "vkv bench first-token")
    results = json.loads(path.read_text())["results"]
    names = ["vkv", "llama-server", "llama-server, no warm-up"]
    assert list(results["first_token"]) == names
    for name in names:
        (ready,), (first,) = results["ready"][name], results["first_token"][name]
        assert 0.1 < ready < first
    assert "pip install openvino-genai" in results["failures"]["openvino"]
    assert results["versions"]["vkv"]["torch"] == torch.__version__
    assert results["imports"]["Python alone"][0] < results["first_token"]["vkv"][0]
    assert tables[0].rows[-1][-1] == "1.00"
    assert [table.title for table in tables][-1] == "Not measured"
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no program at /nowhere/llama-server"):
        first_token.run(options(peers={"llama-server": "/nowhere/llama-server"}), tmp_path, "x")
