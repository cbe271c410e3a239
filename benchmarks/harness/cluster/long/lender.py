"""An engine in a process of its own that lends all of its memory, and runs nothing.

    python -m vkv.bench.cluster.long.lender '{"model": …, "dtype": …, "path": …}'

It listens at a Unix path and at a port of the loopback, which it says on stdout, and ends when its
stdin does.
"""

import json
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....runtime.frontend.llm import LLM
from .spread_driver import SpreadDriver

LINKS = ("unix", "tcp")
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Lender:
    """A process that was begun."""

    process: "subprocess.Popen[str]"
    path: Path
    port: int

    def call(self, link: str) -> socket.socket:
        """A connection to it, by "unix" or "tcp"."""
        if link == "tcp":
            return socket.create_connection((_LOOPBACK, self.port))
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        return sock


def start(stack: ExitStack, count: int, scratch: Path, **options: Any) -> list[Lender]:
    """Begin so many, all at once, and end them with `stack`.

    Args:
        options: `model`, `dtype`, `max_len` and `kv_memory`, in bytes, of each.
    """
    begun = []
    for number in range(count):
        order = {**options, "path": str(scratch / f"lender-{number}")}
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(_end, process)
        begun.append((process, Path(order["path"])))
    return [Lender(process, path, _port(process)) for process, path in begun]


def _port(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    for line in process.stdout:  # what libraries print comes before it
        with suppress(ValueError):
            return int(line)
    raise RuntimeError(f"a lender ended with {process.wait()} before it listened")


def _end(process: "subprocess.Popen[str]") -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(model: str, dtype: str, path: str, max_len: int, kv_memory: int) -> None:
    """Lend until stdin ends."""
    torch.set_num_threads(1)
    with LLM(
        model, device="cpu", dtype=dtype, max_len=max_len, kv_memory=kv_memory, max_seqs=64
    ) as llm:
        server = SpreadDriver(llm).lends()
        near = socket.socket(socket.AF_UNIX)
        near.bind(path)
        far = socket.create_server((_LOOPBACK, 0))
        for listener in (near, far):
            listener.listen()
            threading.Thread(target=_accept, args=(listener, server.serve), daemon=True).start()
        sys.stdout.write(f"{far.getsockname()[1]}\n")
        sys.stdout.flush()
        sys.stdin.read()
        for listener in (near, far):
            listener.close()
        server.close()


def _accept(listener: socket.socket, serve: Any) -> None:
    with suppress(OSError):  # it is closed
        while True:
            serve(listener.accept()[0])


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
