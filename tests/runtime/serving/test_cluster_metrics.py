"""What Prometheus reads of several instances, as they come and go."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
from vkv import LLM, SamplingParams
from vkv.runtime.cluster.members import Members
from vkv.runtime.cluster.stats import ClusterStats, Done, Member
from vkv.runtime.engine.migration.arbiter import Arbiter
from vkv.runtime.engine.stats import EngineStats
from vkv.runtime.link.face import Face
from vkv.runtime.link.messages import Pulse
from vkv.runtime.serving.metrics.cluster import ClusterCollector

Told = dict[tuple[str, frozenset[tuple[str, str]]], float]


class _NoLink:
    """The way to an instance that nobody needs to reach."""

    def close(self) -> None: ...


class _Instances:
    """As of `Instances`, over members that are noted by hand."""

    def __init__(self, face: Face) -> None:
        self.members = Members(Arbiter())
        self._face = face

    def join(self, number: int, **more: Any) -> None:
        link: Any = _NoLink()
        self.members.add(Member(id=number, role="both", pid=number, **more), link)
        self.members.meet(number, self._face)

    def cluster_now(self) -> ClusterStats | None:
        members, done = self.members.report()
        return ClusterStats(
            num_migrations=2,
            num_stayed=1,
            num_recomputed=3,
            done=done,
            instances=tuple(members),
        )


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[Face, EngineStats]]:
    with LLM(device="cpu", max_seqs=2) as llm:
        llm.generate("hello", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        yield Face.of(llm.loaded, llm.engine, llm.config), llm.loop.stats(fresh=True)


def _told(instances: _Instances) -> Told:
    found: Told = {}
    for metric in ClusterCollector("a model", instances).collect():
        for sample in metric.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            key = sample.name, frozenset(labels.items())
            assert key not in found, key
            found[key] = sample.value
            if "instance" in sample.labels:
                assert sample.labels["engine"] == sample.labels["instance"]
    return found


def _of(told: Told, name: str, **labels: str) -> float:
    return told[name, frozenset(labels.items())]


def test_each_instance_has_its_own_and_the_cluster_all(engine: tuple[Face, EngineStats]) -> None:
    face, stats = engine
    instances = _Instances(face)
    instances.join(0)
    instances.join(1)
    instances.members.note(0, Pulse(stats, carried_bytes=100, handed_pages=7))
    instances.members.note(1, Pulse(replace(stats, num_output_tokens=30), handed_pages=1))
    told = _told(instances)
    assert _of(told, "vllm:generation_tokens_total", instance="0") == 4
    assert _of(told, "vllm:generation_tokens_total", instance="1") == 30
    assert _of(told, "vkv:engine_up", instance="1") == 1
    assert _of(told, "vkv:migrated_pages_total", instance="0") == 7
    assert _of(told, "vkv:cluster_generation_tokens_total") == 34
    assert _of(told, "vkv:cluster_copied_bytes_total") == 100
    assert _of(told, "vkv:cluster_moved_pages_total") == 8
    assert _of(told, "vkv:cluster_instances", role="both", state="working") == 2
    assert _of(told, "vkv:cluster_migrations_total", outcome="moved") == 2
    assert _of(told, "vkv:cluster_recomputed_total") == 3


@pytest.mark.parametrize("why", ["died", "drained"])
def test_totals_stay_when_an_instance_ends(
    engine: tuple[Face, EngineStats], why: Literal["died", "drained"]
) -> None:
    face, stats = engine
    instances = _Instances(face)
    instances.join(0, is_draining=why == "drained")
    instances.join(1)
    for number in (0, 1):
        instances.members.note(number, Pulse(stats, carried_bytes=100, handed_pages=7))
    before = _told(instances)
    instances.members.remove(0, why)
    instances.members.remove(0, why)  # without effect
    after = _told(instances)
    assert not any(("instance", "0") in labels for _, labels in after)
    gone = {key for key in before if key not in after}
    assert all(("instance", "0") in labels for _, labels in gone)
    grown = {name for (name, labels), value in after.items() if value > before[name, labels]}
    assert grown == {"vkv:cluster_ended_instances_total"}
    assert _of(after, "vkv:cluster_ended_instances_total", why=why) == 1
    for (name, labels), value in after.items():
        assert not name.endswith("_total") or value >= before[name, labels], name
    instances.join(2)
    instances.members.note(2, Pulse(stats, carried_bytes=1))
    assert _of(_told(instances), "vkv:cluster_copied_bytes_total") == 201


def test_counts_are_added_field_by_field() -> None:
    one = Done(num_bytes_copied=1, num_died=2)
    assert one.plus([]) == one
    assert one.plus([one, Done(num_drained=5)]) == Done(
        num_bytes_copied=2, num_died=4, num_drained=5
    )
