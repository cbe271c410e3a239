"""The dashboard for Grafana asks for what `/metrics` tells, by labels that are there."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from vkv import LLM
from vkv.allocator.transfer import MoveStats
from vkv.runtime import serving
from vkv.runtime.adapters.adapters import AdapterStats
from vkv.runtime.cluster.stats import ClusterStats, Done, Member
from vkv.runtime.engine.stats import Borrowed, Lent, SegmentStats
from vkv.runtime.link.face import Face
from vkv.runtime.scheduling.accounts import TenantStats
from vkv.runtime.serving.metrics import Metrics

_DASHBOARD = Path(serving.__file__).parent / "static" / "grafana.json"
_TENANT = TenantStats(tenant="a", num_unfinished=1, prompt_tokens=2, output_tokens=3, counter=4.0)

_BORROWED = Borrowed(
    holder="instance 1",
    num_loans=1,
    num_tokens=512,
    num_steps=1,
    sent_bytes=1,
    received_bytes=1,
    waited_s=0.0,
)
_SEGMENTS = SegmentStats(
    num_requests=1,
    num_tokens=512,
    moved=MoveStats(),
    lent=MoveStats(),
    borrowed=(_BORROWED,),
    given=Lent(num_loans=1, num_tokens=1, num_called_back=0, slowest_call_back_s=0.0),
)
_ADAPTER = AdapterStats(
    name="odd",
    digest="1",
    path="",
    num_bytes=100,
    is_here=True,
    num_requests=2,
    is_leaving=False,
)


class _Engine:
    """As much of an engine as metrics ask for."""

    is_ready = True
    is_asleep = False

    def __init__(self, member: Member) -> None:
        self.stats = member.stats
        self._now = ClusterStats(
            num_migrations=0, num_stayed=0, num_recomputed=0, done=Done(), instances=(member,)
        )

    def cluster_now(self) -> ClusterStats | None:
        return self._now


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """The labels of all that a server with a tier, tenants, adapters and instances tells."""
    with LLM(device="cpu", max_seqs=1, swap_memory="1MiB") as llm:
        face = Face.of(llm.loaded, llm.engine, llm.config)
        more = {"tenants": (_TENANT,), "segments": _SEGMENTS, "adapters": (_ADAPTER,)}
        stats = replace(llm.stats(), **more)
    engine: Any = _Engine(Member(id=0, role="both", pid=1, face=face, stats=stats))
    text = Metrics(face, "a model", engine).text().decode()
    found: dict[str, set[str]] = {"vllm:engine_sleep_state": {"model_name"}}  # of one engine
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _asked() -> list[str]:
    panels = json.loads(_DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_it_asks_for_what_there_is(told: dict[str, set[str]]) -> None:
    assert len(_asked()) > 40
    for asked in _asked():
        names = re.findall(r"\b(?:vllm|vkv):\w+", asked)
        assert names, asked
        for name in names:
            assert name in told, asked
            for labels in re.findall(r"by \(([^)]*)\)", asked):
                assert {one.strip() for one in labels.split(",")} <= told[name], asked


def test_panels_lie_beside_each_other_and_have_names() -> None:
    panels = json.loads(_DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        columns, rows = range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & taken, panel["title"]
        taken |= cells
