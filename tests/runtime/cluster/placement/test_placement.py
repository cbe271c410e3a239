"""The search for placements, beside one that was published, and runs that were measured."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from vkv.bench.cluster.options import Load
from vkv.bench.cluster.traces import trace_of
from vkv.runtime.cluster.placement.candidates import Group, Placement, placements
from vkv.runtime.cluster.placement.machine import (
    Machine,
    Wire,
    read_machine,
    read_table,
    table_names,
)
from vkv.runtime.cluster.placement.search import (
    SearchConfig,
    cluster_of,
    policy_of,
    rate,
    search,
)
from vkv.runtime.cluster.simulator.cluster import simulate
from vkv.runtime.cluster.simulator.costs import StepWork, pairs
from vkv.runtime.cluster.simulator.trace import Slo, TraceRequest
from vkv.vmem.errors import InvalidConfig

TABLE = read_table("opt-13b-a100-distserve")
# DistServe's example: OPT-13B and ShareGPT on 4 A100; each promise to 90 % of all requests.
SLO = Slo(ttft_s=0.2, tpot_s=0.1, share=0.9, is_joint=False)
SEARCH = SearchConfig(slo=SLO, most_rate=5.0, tolerance=0.25)
MEASURED = json.loads((Path(__file__).parent / "measured_distserve.json").read_text())["runs"]
PUBLISHED = Placement(groups=(Group(role="prefill", tensor=2), Group(role="decode")))


def _sharegpt(count: int, seed: int = 0) -> Callable[[float], Sequence[TraceRequest]]:
    load = Load(workload="sharegpt-turns", num_requests=count, most_tokens=2047, seed=seed)
    return lambda rate: trace_of(load, rate)


def _apart(machine: Machine, most_instances: int = 1) -> list[Placement]:
    return list(placements(machine, TABLE, most_instances=most_instances, together=False))


# -- tables and machines -------------------------------------------------------------------------


def test_tables_say_what_was_published() -> None:
    assert table_names() == [
        "llama-7b-a10",
        "opt-13b-a100-distserve",
        "opt-13b-a100-vllm",
        "opt-66b-a100-distserve",
    ]
    assert TABLE.capacity(1, 1) == 66144
    assert TABLE.capacity(3, 1) is None
    # a + b n + c n² of one prompt, and the host's 2 ms + 0.0001 ms a token + 1 ms of a prompt step
    prompt = 14.742973695171262 + 0.06857720739764 * 700 + 2.4495727400243586e-06 * 700**2
    step_s = TABLE.costs[2].step_s(StepWork(700, pairs(0, 700)))
    assert step_s * 1e3 == pytest.approx(prompt + 2 + 0.07 + 1)
    decode = 7.1661889468253595 + 0.0005798000403396046 * 50_000 + 0.15831096191764046 * 100
    step_s = TABLE.costs[1].step_s(StepWork(num_decodes=100, context_tokens=50_000))
    assert step_s * 1e3 == pytest.approx(decode + 2 + 5)


def test_every_table_can_be_placed() -> None:
    for name in table_names():
        table = read_table(name)
        assert ("DistServe" if "distserve" in name or "vllm" in name else "A10") in table.source
        assert table.token_bytes == 4 * table.num_layers * table.hidden_size
        assert list(placements(Machine(nodes=2, gpus_per_node=8), table))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"no table 'gpt-5'.*opt-13b"):
        read_table("gpt-5")
    (tmp_path / "bad.json").write_text('{"name": 1}')
    with pytest.raises(InvalidConfig, match="is no table of costs"):
        read_table(str(tmp_path / "bad.json"))
    (tmp_path / "bad.toml").write_text("gpus = 4")
    with pytest.raises(InvalidConfig, match=r"gpus.*gpus_per_node"):
        read_machine(tmp_path / "bad.toml")
    with pytest.raises(InvalidConfig, match="nodes 0"):
        Machine(nodes=0)
    with pytest.raises(InvalidConfig, match="rate above 0"):
        Wire(latency_s=0.0, bytes_per_s=0.0)
    with pytest.raises(InvalidConfig, match="tolerance"):
        SearchConfig(slo=SLO, tolerance=9.0)


def test_a_machine_is_described_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(
        'nodes = 2\naffinity = "low"\n[network]\nlatency_s = 1e-5\nbytes_per_s = 5e10\n'
    )
    wire = Wire(latency_s=1e-5, bytes_per_s=5e10)
    assert read_machine(path) == Machine(nodes=2, affinity="low", network=wire)


# -- candidates ----------------------------------------------------------------------------------


def test_candidates_are_those_of_the_published_search() -> None:
    """One instance of each on four devices: nine ways, as DistServe's own search lists them."""
    sizes = {tuple((g.tensor, g.pipeline) for g in p.groups) for p in _apart(Machine())}
    small = [(1, 1), (1, 2), (2, 1)]
    assert sizes == {(p, d) for p in small for d in small}


def test_candidates_fit_and_none_is_twice_another() -> None:
    for machine in (Machine(nodes=2), Machine(nodes=2, affinity="low")):
        found = _apart(machine, most_instances=3)
        assert len(found) == len(set(found))
        for placement in found:
            prefill, decode = placement.groups
            assert placement.num_gpus <= machine.num_gpus
            assert (prefill.count, decode.count) != (2, 2)
            for group in placement.groups:
                assert TABLE.capacity(group.tensor, group.pipeline)
                assert group.tensor <= machine.gpus_per_node


def test_with_low_affinity_each_part_is_within_a_node() -> None:
    low = _apart(Machine(nodes=2, affinity="low"))
    assert all(p.num_gpus <= 4 * p.crossing and p.is_within for p in low)
    crossing = [p for p in low if p.crossing == 2]
    assert crossing
    assert all(group.pipeline % 2 == 0 for p in crossing for group in p.groups)
    high = _apart(Machine(nodes=2))
    assert any(p.num_gpus > 4 and not p.is_within for p in high)
    assert all(p.crossing == 1 for p in high)


def test_the_wire_is_that_of_where_instances_are() -> None:
    machine = Machine(nodes=2)
    near = cluster_of(PUBLISHED, machine, TABLE, SEARCH)
    far = cluster_of(msgspec.structs.replace(PUBLISHED, is_within=False), machine, TABLE, SEARCH)
    assert near.transfer.bytes_per_s == machine.within.bytes_per_s
    assert far.transfer.bytes_per_s == machine.network.bytes_per_s
    assert [m.role for m in near.members] == ["prefill", "decode"]
    wide = Placement(groups=(Group(role="both", tensor=2, pipeline=4),), is_within=False)
    (member,) = cluster_of(wide, machine, TABLE, SEARCH).members
    assert member.config.cost.stages == 4
    assert member.config.cost.hop_s == machine.network.latency_s
    assert policy_of(wide).name == "least_loaded"


# -- the search ----------------------------------------------------------------------------------


def test_the_published_placement_is_found() -> None:
    """LLMServe/DistServe, simdistserve/README.md: tensor 2 for prompts, the rest 1."""
    found = search(_apart(Machine()), Machine(), TABLE, SEARCH, _sharegpt(200))
    assert found[0].placement == PUBLISHED
    assert [rated.rate for rated in found] == sorted((r.rate for r in found), reverse=True)


def test_the_published_rate_is_found() -> None:
    """1.56 requests/s/GPU. Of the requests only the quantiles are known here; so many that their
    number makes no difference, which 300, as published, do (1.4 to 2.3 over six seeds)."""
    config = msgspec.structs.replace(SEARCH, most_rate=2.5, tolerance=0.17)
    rated = rate(PUBLISHED, Machine(), TABLE, config, _sharegpt(3000))
    assert rated.rate == pytest.approx(1.56, abs=0.1)
    assert rated.kept is not None
    assert rated.kept.meets(SLO)
    assert rated.missed_rate == pytest.approx(rated.rate + 2.5 / 16)


@pytest.mark.parametrize("per_second", sorted(MEASURED))
def test_the_simulator_agrees_with_measured_runs(per_second: str) -> None:
    """The same requests at the same times as DistServe itself had on three A100, placed so: medians
    and P90 of first tokens, further ones and answers are within 10 %."""
    rows = MEASURED[per_second]
    trace = [
        TraceRequest(arrival_s=at, prompt_tokens=prompt, output_tokens=output)
        for at, prompt, output, *_ in rows
    ]
    cluster = cluster_of(PUBLISHED, Machine(), TABLE, SEARCH)
    found = simulate(cluster, policy_of(PUBLISHED), trace).percentiles(50, 90)
    for column, name in ((3, "ttft"), (4, "tpot"), (5, "e2e")):
        measured = np.percentile([row[column] for row in rows], (50, 90)) / 1e3
        assert found[name] == pytest.approx(list(measured), rel=0.1), name


def test_a_placement_that_never_keeps_its_promise_has_no_rate() -> None:
    slo = Slo(ttft_s=0.001, tpot_s=0.1)
    config = msgspec.structs.replace(SEARCH, slo=slo, tolerance=2.0)
    rated = rate(PUBLISHED, Machine(), TABLE, config, _sharegpt(20))
    assert (rated.rate, rated.kept) == (0.0, None)
    assert rated.missed is not None
    assert rated.limit == "first tokens"


def test_a_placement_that_is_never_too_slow_has_no_limit() -> None:
    slo = Slo(ttft_s=1e6, tpot_s=1e6)
    config = msgspec.structs.replace(SEARCH, slo=slo, tolerance=2.0)
    rated = rate(PUBLISHED, Machine(), TABLE, config, _sharegpt(20))
    assert (rated.rate, rated.missed, rated.limit) == (3.75, None, "none found")


def test_a_model_that_fits_nowhere_is_refused() -> None:
    table = read_table("opt-66b-a100-distserve")
    machine = Machine(gpus_per_node=2)
    candidates = placements(machine, table, together=False)
    with pytest.raises(InvalidConfig, match="fits no placement on 2 devices"):
        search(candidates, machine, table, SEARCH, _sharegpt(5))


def test_a_slow_network_costs_what_it_takes() -> None:
    """The term that DistServe's own simulator lacks."""
    trace = _sharegpt(100)(3.0)
    gaps = []
    for wire in (Wire(latency_s=1e-5, bytes_per_s=2e11), Wire(latency_s=1e-3, bytes_per_s=1e9)):
        cluster = cluster_of(PUBLISHED, Machine(within=wire), TABLE, SEARCH)
        gaps.append(simulate(cluster, policy_of(PUBLISHED), trace).percentiles(90)["gap"][0])
    assert gaps[1] > 3 * gaps[0]
