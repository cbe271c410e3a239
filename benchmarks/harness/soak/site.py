"""What is soaked: what is done to it, what it has done, and what is left when nobody asks."""

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from ...runtime.cluster.cluster import Cluster
from ...runtime.engine.memory.memory_map import MemoryMap
from ...runtime.scheduling.kv_files import MOST_FILES
from ...vmem.errors import EngineDied
from . import left_over
from .faults import Faults
from .phases import KV_DIR, PAGE_BYTES
from .tally import Process, Tally

FRONT = "the soak itself"
_IDLE_S = 30.0  # for instances to hold nothing, once nobody asks
_MOST_OPEN = 16  # descriptors beyond the first count, and what each neighbour takes
_MOST_FILES = 2 * MOST_FILES  # of the soak's own two engines; more than an instance has
_MOST_THREADS = 12
_RSS_SLACK = 64 << 20
_RSS_SHARE = 0.3


class Site(Protocol):
    """What is soaked."""

    def faults(self) -> AbstractContextManager[None]:
        """What is done to it meanwhile."""
        ...

    def note(self) -> None:
        """Count what it has done."""
        ...

    def check_idle(self) -> None:
        """Nobody asks: note what is left that should not be."""
        ...


class ClusterSite:
    """A cluster that is soaked.

    Args:
        name: of its phase.
        faults: what is done to it.
        home: where all files of the soak are.
    """

    def __init__(
        self,
        name: str,
        cluster: Cluster,
        faults: Faults,
        tally: Tally,
        home: Path,
    ) -> None:
        self._home = home
        self._name, self._cluster, self._faults, self._tally = name, cluster, faults, tally
        self._turn = f"{name} {time.monotonic()}"
        self._before = cluster.stats()
        self._size = len(self._before.instances)
        self._num_died = 0  # by themselves, as noted so far

    def faults(self) -> AbstractContextManager[None]:
        """As of `Site`."""
        return self._faults.injected()

    def note(self) -> None:
        """As of `Site`."""
        stats = self._cluster.router.stats_now()
        before, done = self._before, stats.done
        self._before = stats
        for kind, count in {
            "to another instance": stats.num_migrations - before.num_migrations,
            "stayed after all": stats.num_stayed - before.num_stayed,
            "computed again elsewhere": stats.num_recomputed - before.num_recomputed,
            "pages handed over": done.num_pages_moved - before.done.num_pages_moved,
            "bytes copied": done.num_bytes_copied - before.done.num_bytes_copied,
            "instances that died": done.num_died - before.done.num_died,
            "instances that were drained": done.num_drained - before.done.num_drained,
        }.items():
            self._tally.move(kind, count)
        for member in stats.instances:
            if member.stats is not None:
                self._tally.note(self._turn, member.id, member.stats)

    def check_idle(self) -> None:
        """As of `Site`."""
        if not left_over.wait_until(lambda: not self._cluster.stats().requests, _IDLE_S):
            left = list(self._cluster.stats().requests)
            self._tally.leak(f"{self._name}: requests that nobody waits for: {left}")
        if not left_over.wait_until(self._holds_nothing, _IDLE_S):
            self._tally.leak(f"{self._name}: held while nothing runs: {self._totals()}")
        with suppress(EngineDied):  # which is noted below
            self._cluster.router.ask("trim")
        if not left_over.wait_until(lambda: not self._num_held(), _IDLE_S):
            self._tally.leak(f"{self._name}: parked after all was given back: {self._totals()}")
        self._tally.held_pages.append(self._num_held())
        self.note()
        if (folder := self._home / KV_DIR).exists():
            self._tally.there("files of keys and values, at most", len(os.listdir(folder)))
        num_died = self._before.done.num_died - self._faults.num_killed
        if num_died > self._num_died:
            self._tally.lost(f"{self._name}: {num_died} instances died by themselves so far")
            self._num_died = num_died
        names = {os.getpid(): f"{FRONT}, {self._name}"} | {
            member.pid: f"{self._name}: instance {member.id}"
            for member in self._cluster.router.members_now()
        }
        look_at(names, self._home, self._tally, most_open=_MOST_OPEN + 4 * self._size)

    def _holds_nothing(self) -> bool:
        return all(map(left_over.holds_nothing, self._maps()))

    def _num_held(self) -> int:
        """Pages of all instances."""
        found = 0
        for picture in self._maps():
            t = picture.totals
            found += (t.held + t.ahead + t.parked + t.promised) // PAGE_BYTES
        return found

    def _totals(self) -> list[object]:
        return [(picture.totals, picture.lent) for picture in self._maps()]

    def _maps(self) -> Sequence[MemoryMap]:
        for _ in range(50):
            with suppress(EngineDied):
                maps = self._cluster.router.ask("memory_map")
                return [one for one in maps if isinstance(one, MemoryMap)]
            time.sleep(0.2)
        raise EngineDied("instances come and go, though nothing is done to them")


def look_at(names: dict[int, str], home: Path, tally: Tally, *, most_open: int) -> None:
    """Count what processes hold, and compare it with what each held when it was first seen so."""
    for pid, name in names.items():
        try:
            num_descriptors, num_threads = left_over.num_open(pid)
            num_files = left_over.num_files(pid, home)  # of which an engine keeps some open
            rss_bytes = left_over.rss_bytes(pid)
            now = Process(name, num_descriptors - num_files, num_threads, rss_bytes)
        except OSError:
            tally.leak(f"{name} has ended by itself")
            continue
        seen = tally.processes.setdefault(f"{name}, {pid}", [])
        seen.append(now)
        first = seen[0]
        if num_files > _MOST_FILES:
            tally.leak(f"{name} has {num_files} files of keys and values open")
        if now.num_descriptors > first.num_descriptors + most_open:
            tally.leak(
                f"{name} has {now.num_descriptors} descriptors, and had {first.num_descriptors}"
            )
        if now.num_threads > first.num_threads + _MOST_THREADS:
            tally.leak(f"{name} has {now.num_threads} threads, and had {first.num_threads}")
        if now.rss_bytes > first.rss_bytes * (1 + _RSS_SHARE) + _RSS_SLACK:
            tally.leak(f"{name} has {now.rss_bytes >> 20} MiB, and had {first.rss_bytes >> 20}")
    if left_over.zombies() and not left_over.wait_until(lambda: not left_over.zombies(), 10.0):
        tally.leak(f"processes that nobody collected: {left_over.zombies()}")
