"""A server in processes of its own, as its users start one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from vkv.bench.soak.left_over import children_of

_READY_S = 120.0


class Served:
    """`vkv serve` on a free port, with what it logs.

    Args:
        arguments: of the command, after the port.

    Attributes:
        log_path: where it logs.
    """

    def __init__(self, *arguments: str, log: Path, wait: bool = True) -> None:
        self.log_path = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vkv.runtime.cli.main", "serve", "--port", "0", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_WAIT_POLICY": "passive"},
            )
        self.url = self._wait_for_address()
        base_url = self.url if self.url.startswith("http") else "http://local"
        self.client = httpx.Client(base_url=base_url, timeout=60)
        if wait:
            self.wait_until_ready()

    def _wait_for_address(self) -> str:
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            if found := re.search(r'listening on ([^\s"]+)', self.log()):
                return found[1]
            assert self.process.poll() is None, self.log()
            time.sleep(0.05)
        raise AssertionError(f"no address in {_READY_S} s:\n{self.log()}")

    def wait_until_ready(self) -> None:
        """Until the engine has loaded its model."""
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            if self.client.get("/ready").status_code == 200:
                return
            assert self.process.poll() is None, self.log()
            time.sleep(0.05)
        raise AssertionError(f"not ready in {_READY_S} s:\n{self.log()}")

    def log(self) -> str:
        """All it has said."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def children(self) -> list[int]:
        """Processes that it has started and that live."""
        return children_of(self.process.pid)

    def engine(self) -> int:
        """The engine's process."""
        (pid,) = [
            pid
            for pid in self.children()
            if b"engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return pid

    def load(self) -> dict[str, Any]:
        """What it holds, by its own account."""
        return self.client.get("/v1/load").json()

    def wait_until_idle(self, within_s: float = 10.0) -> None:
        """Until no request runs and no page is held by one."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            load = self.load()
            if not load["server_load"] and not load["running"] and not load["kv_used_bytes"]:
                return
            time.sleep(0.02)
        raise AssertionError(f"still busy: {self.load()}\n{self.log()[-2000:]}")

    def stop(self, number: int = signal.SIGTERM, within_s: float = 60.0) -> int:
        """End it as an operator does; returns its exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(within_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def events(lines: Any) -> list[str]:
    """The data of a stream's events, comments left out."""
    return [line[len("data: ") :] for line in lines if line.startswith("data: ")]
