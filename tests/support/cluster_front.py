"""A program that has a cluster whose sequences move without end; what is left of it if killed.

python tests/support/cluster_front.py pages|copies
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cluster_attack
import served
from vkv import SamplingParams
from vkv.runtime.cluster.cluster import Cluster
from vkv.vmem.errors import InvalidOperation

_GONE_S = 10.0


def main(by: str) -> None:
    options = {**cluster_attack.OPTIONS, "movable": by == "pages", "kv_memory": "64MiB"}
    with Cluster(
        instances=2, policy="round_robin", threads=1, stages=cluster_attack.STAGES, **options
    ) as cluster:
        for _ in range(6):
            threading.Thread(target=_ask, args=(cluster,), daemon=True).start()
        threading.Thread(target=_move, args=(cluster,), daemon=True).start()
        while cluster.stats().num_migrations < 3:
            time.sleep(0.02)
        pids = [member.pid for member in cluster.stats().instances]
        what = {"pids": pids, "folder": cluster._launcher._folder}
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()
        time.sleep(600)


def _ask(cluster: Cluster) -> None:
    params = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
    while True:
        cluster.generate({"prompt_token_ids": list(range(3, 200))}, params)


def _move(cluster: Cluster) -> None:
    while True:
        for (request_id, index), owner in cluster.stats().requests.items():
            others = [m.id for m in cluster.router.members_now() if m.id != owner]
            with contextlib.suppress(InvalidOperation):  # it has just ended
                cluster.migrate(request_id, random.choice(others), index=index)


def kill_one(by: str, *, after_s: float = 0.0, stops_one: bool = False) -> float:
    """Start such a program, and kill it; how long it takes until nothing of it is left, in seconds.

    With `stops_one` one of its instances is stopped before. Raises AssertionError if something is
    left.
    """
    program = subprocess.Popen([sys.executable, __file__, by], stdout=subprocess.PIPE)
    assert program.stdout is not None
    what: dict[str, Any] = json.loads(program.stdout.readline())
    time.sleep(after_s)
    if stops_one:
        os.kill(what["pids"][0], signal.SIGSTOP)
    family = _descendants(program.pid)
    assert set(what["pids"]) <= family
    program.kill()
    began_s = time.monotonic()
    program.wait()
    program.stdout.close()
    while left := _left(family, what["folder"]):
        assert time.monotonic() - began_s < _GONE_S, f"left of a killed front end: {left}"
        time.sleep(0.02)
    return time.monotonic() - began_s


def _left(family: set[int], folder: str) -> list[str]:
    """Processes, files, and shared memory, which carries the number of who made it."""
    found = [_name(pid) for pid in family if served.is_alive(pid)]
    found += [folder] if Path(folder).exists() else []
    found += [name for name in os.listdir("/dev/shm") if any(str(pid) in name for pid in family)]
    return found


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid} {Path(f'/proc/{pid}/comm').read_text().strip()}"
    return str(pid)


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for one in new for child in served.children_of(one)} - found
        found |= new
    return found


if __name__ == "__main__":
    main(sys.argv[1])
