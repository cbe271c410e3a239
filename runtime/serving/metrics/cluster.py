"""What the instances of a cluster hold and have done, each under its number, and all of them.

Prometheus has a label `instance` of its own, the address that it reads from, and calls the one here
`exported_instance` unless it is told otherwise (`honor_labels`). `engine` says the same.

What is an instance's own ends with it. What is of the cluster stays, and only grows.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, get_args, runtime_checkable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ...cluster.snapshot import Role
from ...cluster.stats import ClusterStats
from .engines import LABELS, Reported, cache_config, of_engines

STATES = ("loading", "working", "draining")


@runtime_checkable
class Instances(Protocol):
    """An engine that is several instances."""

    def cluster_now(self) -> ClusterStats | None:
        """What they hold and have done, without waiting; None before there are any."""
        ...


class ClusterCollector:
    """Of a server with several instances.

    Args:
        model_name: the label of all of it.
    """

    def __init__(self, model_name: str, instances: Instances) -> None:
        self._model_name = model_name
        self._instances = instances

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        now = self._instances.cluster_now()
        if now is not None:
            yield from self._of_each(now)
            yield from self._of_all(now)

    def _of_each(self, now: ClusterStats) -> Iterator[Metric]:
        labels = {member.id: (self._model_name, *[str(member.id)] * 2) for member in now.instances}
        names = (*LABELS, "instance")
        up = GaugeMetricFamily("vkv:engine_up", "1 while the engine is there", labels=names)
        copied = CounterMetricFamily(
            "vkv:migrated_bytes", "Copied of sequences that left", labels=names
        )
        handed = CounterMetricFamily(
            "vkv:migrated_pages", "Handed over of sequences that left", labels=names
        )
        for member in now.instances:
            up.add_metric(labels[member.id], float(member.face is not None))
            copied.add_metric(labels[member.id], float(member.carried_bytes))
            handed.add_metric(labels[member.id], float(member.handed_pages))
        yield from (up, copied, handed)
        known = [(labels[m.id][1:], m.face) for m in now.instances if m.face is not None]
        yield cache_config(names[1:], known)
        told = [(member.id, member.stats) for member in now.instances if member.stats is not None]
        yield from of_engines(names, [Reported(labels[number], stats) for number, stats in told])

    def _of_all(self, now: ClusterStats) -> Iterator[Metric]:
        there = Counter((member.role, member.state) for member in now.instances)
        family = GaugeMetricFamily(
            "vkv:cluster_instances",
            "By what they are for, and how they are",
            labels=("model_name", "role", "state"),
        )
        for role in get_args(Role):
            for state in STATES:
                family.add_metric((self._model_name, role, state), float(there[role, state]))
        yield family
        for name, what, label, values in _TOTALS:
            names = ("model_name", label) if label else ("model_name",)
            counted = CounterMetricFamily(f"vkv:cluster_{name}", what, labels=names)
            for key, value in values(now).items():
                counted.add_metric((self._model_name, key)[: len(names)], float(value))
            yield counted


_Total = tuple[str, str, str, Callable[[ClusterStats], Mapping[str, int]]]
_TOTALS: tuple[_Total, ...] = (  # name, help, label, and values by that label
    (
        "migrations",
        "By how they ended",
        "outcome",
        lambda now: {"moved": now.num_migrations, "stayed": now.num_stayed},
    ),
    (
        "ended_instances",
        "By why",
        "why",
        lambda now: {"died": now.done.num_died, "drained": now.done.num_drained},
    ),
    ("recomputed", "Sequences whose instance had died", "", lambda now: {"": now.num_recomputed}),
    (
        "ended_loans",
        "By why; their tokens were computed again",
        "why",
        lambda now: {"called back": now.done.num_called_back, "lost": now.done.num_lost},
    ),
    (
        "recomputed_tokens",
        "As loans had ended: theirs alone, or all of their requests",
        "what",
        lambda now: {"loan": now.done.mended_tokens, "request": now.done.redone_tokens},
    ),
    ("copied_bytes", "By migrations", "", lambda now: {"": now.num_bytes_copied}),
    ("moved_pages", "Handed over in migrations", "", lambda now: {"": now.num_pages_moved}),
    ("prompt_tokens", "Computed of prompts", "", lambda now: {"": now.done.num_prompt_tokens}),
    ("generation_tokens", "Generated", "", lambda now: {"": now.done.num_output_tokens}),
    ("preemptions", "Slots taken away", "", lambda now: {"": now.done.num_preemptions}),
)
