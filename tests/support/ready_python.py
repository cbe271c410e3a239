"""A Python that has PyTorch, transformers and vkv imported already: processes that begin at once.

What a benchmark or a test of several processes needs is that each is fresh, not that each spends
four seconds on imports. So one process imports them, and forks for every program that is to run.
A small script stands in for `sys.executable`: it hands over what to run, where, and with which
streams, waits, and ends as the program did. Killing it kills the program.

    python tests/support/ready_python.py SOCKET

`-c CODE`, `-m MODULE` and SCRIPT are understood, with their arguments, and no other options.
`OMP_NUM_THREADS` is 1 for all of them.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULES = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "vkv.runtime.frontend.llm",
    "vkv.bench.models.shapes",
)
_LENGTH = 4  # bytes of an order's length, and of a status
_STAND_IN = """#!{python} -SE
import json, os, signal, socket, sys
order = {{"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
said = json.dumps(order).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    socket.send_fds(server, [len(said).to_bytes({length}, "little")], [0, 1, 2])
    server.sendall(said)
    said = server.recv({length})
status = int.from_bytes(said, "little", signed=True) if said else 1
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Path]:
    """Begin such a process; what stands in for `sys.executable` while it lives."""
    path, stand_in = folder / "socket", folder / "python"
    stand_in.write_text(_STAND_IN.format(python=sys.executable, path=str(path), length=_LENGTH))
    stand_in.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, __file__, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield stand_in
        # Its standard input ends with the block, and so does it.


class _Running:
    """A program: its process, and whoever waits for it."""

    def __init__(self, pid: int, caller: socket.socket) -> None:
        self.pid = pid
        self.caller = caller
        self.end = os.pidfd_open(pid)

    def close(self) -> None:
        self.caller.close()
        os.close(self.end)


def serve(path: str) -> dict[str, Any]:
    """Fork for every caller until standard input ends. In a child it returns what to run."""
    for name in _MODULES:
        importlib.import_module(name)
    running: list[_Running] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        os.write(1, b"ready\n")
        while True:
            ends, callers = [one.end for one in running], [one.caller for one in running]
            ready, _, _ = select.select([0, listener, *ends, *callers], [], [])
            for one in list(running):
                if one.end in ready:
                    status = os.waitstatus_to_exitcode(os.waitpid(one.pid, 0)[1])
                    with contextlib.suppress(OSError):  # whoever waited has been killed
                        one.caller.sendall(status.to_bytes(_LENGTH, "little", signed=True))
                    one.close()
                    running.remove(one)
                elif one.caller in ready:
                    signal.pidfd_send_signal(one.end, signal.SIGKILL)
                    select.select([one.end], [], [])
            if 0 in ready:
                for one in running:
                    os.kill(one.pid, signal.SIGKILL)
                os._exit(0)
            if listener not in ready:
                continue
            caller, _ = listener.accept()
            order, streams = _hear(caller)
            if pid := os.fork():
                for stream in streams:
                    os.close(stream)
                running.append(_Running(pid, caller))
                continue
            for one in running:
                one.close()
            caller.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return order


def _hear(caller: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What is to be run, and its standard streams."""
    length, streams, _, _ = socket.recv_fds(caller, _LENGTH, 3)
    said = b""
    while len(said) < int.from_bytes(length, "little"):
        said += caller.recv(1 << 16)
    return json.loads(said), streams


def run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be the program, as Python itself would be."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    is_code, is_module = words[0] == "-c", words[0] == "-m"
    others = environment.get("PYTHONPATH", "").split(os.pathsep)
    first = "" if is_code or is_module else str(Path(words[0]).parent)
    sys.path[:1] = [first, *filter(None, others)]
    if is_module:
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    if is_code:
        sys.argv = ["-c", *words[2:]]
        code = compile(words[1], "<string>", "exec")
    else:
        sys.argv = words
        main.__dict__["__file__"] = words[0]
        code = compile(Path(words[0]).read_bytes(), words[0], "exec")
    exec(code, main.__dict__)


if __name__ == "__main__":
    run(**serve(sys.argv[1]))
