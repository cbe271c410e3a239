"""Two machines on one: network namespaces with a cable between them, which can be cut."""

import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

HEAD, OTHER = "10.77.0.1", "10.77.0.2"
_INSIDE = "VKV_TEST_NAMESPACES"
_UNSHARE = ["unshare", "-r", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
_CABLE = ["ip", "link", "add", "va", "type", "veth", "peer", "name", "vb"]
_PORT = 6399


def why_not() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    for tool in ("unshare", "nsenter", "ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    tried = subprocess.run([*_UNSHARE, *_CABLE], capture_output=True, text=True, check=False)
    return None if not tried.returncode else f"no namespaces here: {tried.stderr.strip()}"


def enter() -> None:
    """Run this program again in namespaces of its own, with all that it starts: it ends with it."""
    if os.environ.get(_INSIDE) is None:
        os.environ[_INSIDE] = "yes"
        again = [sys.executable, *sys.argv]
        os.execvp(_UNSHARE[0], [*_UNSHARE, *again])


class TwoMachines:
    """This namespace, with a Ray head, and another, with a Ray node. For use after `enter`."""

    def __init__(self) -> None:
        _run("ip", "link", "set", "lo", "up")
        self._other = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        while not _is_apart(self._other.pid):
            pass
        self._there = ["nsenter", "--target", str(self._other.pid), "--net"]
        _run(*_CABLE)
        _run("ip", "link", "set", "vb", "netns", str(self._other.pid))
        _run("ip", "addr", "add", f"{HEAD}/24", "dev", "va")
        _run("ip", "link", "set", "va", "up")
        _run(*self._there, "ip", "link", "set", "lo", "up")
        _run(*self._there, "ip", "addr", "add", f"{OTHER}/24", "dev", "vb")
        self.mend()
        self._folder = tempfile.mkdtemp(prefix="vkv-ray-")
        self._environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        os.environ["RAY_AUTH_MODE"] = "disabled"
        self._ray(
            "--head",
            f"--port={_PORT}",
            f"--node-ip-address={HEAD}",
            f"--temp-dir={self._folder}",
            "--include-dashboard=false",
        )
        self.address = f"{HEAD}:{_PORT}"
        self.join()

    def join(self) -> None:
        """Start a Ray node over there."""
        self._ray(f"--address={self.address}", f"--node-ip-address={OTHER}", there=True)

    def cut(self) -> None:
        """The other machine has no network any more."""
        _run(*self._there, "ip", "link", "set", "vb", "down")

    def mend(self) -> None:
        """It has one again."""
        _run(*self._there, "ip", "link", "set", "vb", "up")

    def slow(self, rate: str) -> None:
        """Let no more than that over the cable, either way; as of `tc`."""
        how = f"root tbf rate {rate} burst 32kbit latency 2s".split()
        _run("tc", "qdisc", "replace", "dev", "va", *how)
        _run(*self._there, "tc", "qdisc", "replace", "dev", "vb", *how)

    def fast(self) -> None:
        """As much as it takes."""
        _run("tc", "qdisc", "del", "dev", "va", "root")
        _run(*self._there, "tc", "qdisc", "del", "dev", "vb", "root")

    def close(self) -> None:
        """Ray ends with this process's namespaces; its files go now."""
        self._other.kill()
        self._other.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ray(self, *options: str, there: bool = False) -> None:
        _run(
            *(self._there if there else []),
            *(sys.executable, "-m", "ray.scripts.scripts", "start"),
            *options,
            "--num-cpus=1",
            f"--object-store-memory={80 << 20}",
            "--disable-usage-stats",
            env=self._environment,
        )


def _is_apart(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def _run(*command: str, **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert not done.returncode, f"{' '.join(command)}: {done.stdout}{done.stderr}"
