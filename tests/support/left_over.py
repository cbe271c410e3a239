"""What a cluster must not leave: pages, descriptors, threads, processes, files."""

import os
from collections.abc import Callable, Collection
from typing import Any

from vkv.bench.soak.left_over import holds_nothing, num_open, wait_until, zombies
from vkv.runtime.cluster.cluster import Cluster

__all__ = ["holds_nothing", "num_open", "strange_sockets", "until", "wait_until", "zombies"]


def until(is_so: Callable[[], bool], why: Any, within_s: float = 30.0) -> None:
    """Wait until something is so. Raises AssertionError with `why`, or with what that returns."""
    assert wait_until(is_so, within_s), why() if callable(why) else why


def strange_sockets(cluster: Cluster, members: Collection[int]) -> list[str]:
    """Sockets of instances that are no more."""
    numbers = {name: name.partition(".")[0] for name in os.listdir(cluster._launcher._folder)}
    return [n for n, number in numbers.items() if number.isdigit() and int(number) not in members]
