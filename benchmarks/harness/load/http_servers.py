"""Servers to compare: one that is there already, or one that is started here and ended again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ...vmem.errors import InvalidConfig
from ..peers.peer import WORKERS, WorkerFailed, interpreter_of
from .http_client import Endpoint

STARTED = ("vkv", "vkv-cluster", "vllm", "llama-cpp")
_READY_S = 900.0  # vLLM compiles for minutes where it was never run
_CELLS = 256  # tokens that llama.cpp rounds a request's share of its context up to


@dataclass(frozen=True, kw_only=True)
class Started:
    """A server to be started on a free port of the loopback.

    Attributes:
        interpreter: a Python that has it; of llama.cpp its own program, `llama-server`.
        max_seqs, max_len: requests that run at once, and tokens of the longest.
        max_batch_tokens: of a step; None for the server's own default.
    """

    name: str
    interpreter: str
    model: Path
    dtype: str
    threads: int
    max_seqs: int
    max_len: int
    max_batch_tokens: int | None

    def command(self, port: int) -> Sequence[str]:
        """What starts it."""
        if self.name in ("vkv", "vkv-cluster"):
            budget = ["--max-num-batched-tokens", str(self.max_batch_tokens)]
            # One instance behind a policy: what a cluster costs where it can bring nothing.
            instances = ["--instances", "1", "--cluster-policy", "llumnix"]
            return [
                *(self.interpreter, "-m", "vkv.runtime.cli.main", "serve", str(self.model)),
                *("--port", str(port), "--dtype", self.dtype, "--device", "cpu"),
                *("--max-num-seqs", str(self.max_seqs), "--max-model-len", str(self.max_len)),
                *(budget if self.max_batch_tokens else ()),
                *(instances if self.name == "vkv-cluster" else ()),
            ]
        if self.name == "vllm":
            return [
                *(self.interpreter, "-m", "vllm.entrypoints.openai.api_server"),
                *("--model", str(self.model)),
                *("--port", str(port), "--dtype", self.dtype, "--host", "127.0.0.1"),
                *("--max-num-seqs", str(self.max_seqs), "--max-model-len", str(self.max_len)),
                *("--skip-tokenizer-init", "--no-enable-prefix-caching"),
            ]
        return [
            *(self.interpreter, "--model", str(self.model), "--host", "127.0.0.1"),
            *("--port", str(port), "--threads", str(self.threads)),
            *("--parallel", str(self.max_seqs)),
            *("--ctx-size", str(_round_up(self.max_len) * self.max_seqs)),  # shared out evenly
        ]

    @property
    def extra(self) -> tuple[tuple[str, object], ...]:
        """Fields of its requests, so that events name their tokens."""
        if self.name == "vllm":
            return (("return_token_ids", True), ("detokenize", False))
        return (("return_token_ids", True),) if self.name.startswith("vkv") else ()


def checked(peers: dict[str, str]) -> dict[str, str]:
    """Interpreters of servers to be started. Raises InvalidConfig for unknown ones."""
    return {name: interpreter_of(name, path, STARTED) for name, path in peers.items()}


def named(servers: Sequence[str]) -> dict[str, str]:
    """Addresses by name, from NAME=URL or URL alone. Raises InvalidConfig."""
    found: dict[str, str] = {}
    for text in servers:
        name, separator, url = text.partition("=")
        if not separator or "://" in name:
            name, url = f"server-{len(found) + 1}", text
        if not url.startswith(("http://", "https://")):
            raise InvalidConfig(f"server is {text!r}; write URL or NAME=URL, as http://host:port")
        found[name] = url.removesuffix("/").removesuffix("/v1")
    return found


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a server that is ready took to get there.

    Attributes:
        ready_s: from the start of its first process on.
        processes: of each its program and its memory in bytes, what several share in parts (PSS).
    """

    ready_s: float
    processes: Sequence[tuple[str, int]]

    @property
    def num_bytes(self) -> int:
        """Of all processes together."""
        return sum(num_bytes for _, num_bytes in self.processes)


@contextmanager
def running(server: Started, log: Path) -> Iterator[tuple[Endpoint, Footprint]]:
    """Start a server and wait until it is ready; gives where it is, and what that took.

    Raises WorkerFailed, with the end of its log, if it does not come up.
    """
    port, began_s = _free_port(), time.perf_counter()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(server.threads),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    with log.open("ab") as file:
        process = subprocess.Popen(
            server.command(port), stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/v1/models", process, log)
        model = str(server.model) if server.name != "llama-cpp" else None
        ready_s = time.perf_counter() - began_s
        footprint = Footprint(ready_s=ready_s, processes=_processes(process.pid))
        yield Endpoint(url=url, model=model, extra=server.extra), footprint
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // _CELLS) * _CELLS


def as_gguf(model: Path, scratch: Path, dtype: torch.dtype) -> Path:
    """The model as llama.cpp reads it, with a made-up vocabulary, written once."""
    if dtype != torch.bfloat16:
        raise InvalidConfig(f"llama.cpp runs in bfloat16 here, not in {dtype}")
    weights = "bf16"
    path = scratch / f"model-{weights}.gguf"
    if not path.exists():
        code = (
            "import sys; from pathlib import Path; from llama_gguf import write_gguf; "
            "write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], has_words=True)"
        )
        told = subprocess.run(
            [sys.executable, "-c", code, str(model), str(path), weights],
            cwd=WORKERS,
            capture_output=True,
            text=True,
        )
        if told.returncode:
            raise WorkerFailed(f"llama-cpp: {told.stderr[-1000:]}")
    return path


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise WorkerFailed(f"the server did not come up: {log.read_text(errors='replace')[-2000:]}")


def _processes(pid: int) -> list[tuple[str, int]]:
    """A process and all that come from it, each with its memory."""
    found, parents = [], {pid}
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    while parents:
        one = parents.pop()
        parents |= set(children.get(one, ()))
        with suppress(OSError):
            found.append((_program(one), _pss_bytes(one)))
    return found


def _program(pid: int) -> str:
    """What a process runs: Ray's call themselves so; of a Python its module."""
    words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split()
    if not words:
        return "?"
    name = words[0].rsplit("/", 1)[-1]
    if name.startswith("python"):
        named = [word for word in words[1:] if not word.startswith("-")]
        name = named[0].rsplit("/", 1)[-1] if named else name
    return name


def _pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
