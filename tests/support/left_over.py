"""What a cluster must not leave: pages, descriptors, threads, processes, files."""

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import served
from vkv.runtime.cluster.cluster import Cluster
from vkv.runtime.engine.memory.memory_map import MemoryMap


def until(is_so: Callable[[], bool], why: Any, within_s: float = 30.0) -> None:
    """Wait until something is so. Raises AssertionError with `why`, or with what that returns."""
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, why() if callable(why) else why
        time.sleep(0.05)


def holds_nothing(picture: MemoryMap) -> bool:
    """Whether all that an engine holds is parked, and nothing is lent."""
    totals = picture.totals
    held = totals.held or totals.ahead or totals.promised or picture.lent
    return not held and all(strip.state == "parked" for strip in picture.strips)


def num_open(pid: int) -> tuple[int, int]:
    """A process's descriptors and threads."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def zombies() -> list[int]:
    """Processes of ours that have ended and that nobody has collected."""
    found, family = [], _family()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] == "Z" and int(fields[1]) in family:
            found.append(int(stat.parent.name))
    return found


def _family() -> set[int]:
    found, new = set(), {os.getpid()}
    while new:
        found |= new
        new = {child for pid in new for child in served.children_of(pid)} - found
    return found


def strange_sockets(cluster: Cluster, members: Collection[int]) -> list[str]:
    """Sockets of instances that are no more."""
    left = {name.partition(".")[0] for name in os.listdir(cluster._launcher._folder.name)}
    return [name for name in left if name.isdigit() and int(name) not in members]
