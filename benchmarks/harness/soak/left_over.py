"""What must not be left: pages, descriptors, memory, processes that nobody has collected."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ...runtime.engine.memory.memory_map import MemoryMap


def wait_until(is_so: Callable[[], bool], within_s: float) -> bool:
    """Wait until something is so; returns whether it came to that."""
    deadline = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def holds_nothing(picture: MemoryMap) -> bool:
    """Whether all that an engine holds is parked, and nothing is lent."""
    totals = picture.totals
    held = totals.held or totals.ahead or totals.promised or picture.lent
    return not held and all(strip.state == "parked" for strip in picture.strips)


def num_open(pid: int) -> tuple[int, int]:
    """A process's descriptors and threads."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def num_files(pid: int, home: Path) -> int:
    """Of a process's descriptors, those of files under `home`."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            found += home in link.readlink().parents
    return found


def rss_bytes(pid: int) -> int:
    """Memory of a process that is its own: resident, and of no file and no other process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def children_of(pid: int) -> list[int]:
    """Processes that another has started and that live."""
    return [child for child, parent, state in _processes() if parent == pid and state != "Z"]


def zombies() -> list[int]:
    """Processes of ours that have ended and that nobody has collected."""
    every = list(_processes())
    family, new = set[int](), {os.getpid()}
    while new:
        family |= new
        new = {child for child, parent, _ in every if parent in new} - family
    return [child for child, parent, state in every if state == "Z" and parent in family]


def _processes() -> list[tuple[int, int, str]]:
    """All of the machine: each with its parent and its state."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        found.append((int(stat.parent.name), int(parent), state))
    return found
