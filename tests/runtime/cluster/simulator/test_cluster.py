"""Whole simulated clusters: every request ends once, nothing leaks, the same comes out again."""

import random
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vkv.runtime.cluster.policies import (
    ClusterPolicy,
    Disaggregated,
    Freeness,
    LeastLoaded,
    Llumnix,
    RoundRobin,
    Scaling,
    Switching,
)
from vkv.runtime.cluster.simulator.cluster import ClusterConfig, Member, simulate
from vkv.runtime.cluster.simulator.costs import (
    DecodeCost,
    PromptCost,
    StepCost,
    StepWork,
    TransferCost,
    pairs,
)
from vkv.runtime.cluster.simulator.instance import InstanceConfig, SimulatedInstance
from vkv.runtime.cluster.simulator.trace import Report, Slo, TraceRequest
from vkv.runtime.cluster.snapshot import ClusterSnapshot, Newcomer, Role
from vkv.vmem.errors import InvalidConfig

COST = StepCost(
    prompt=PromptCost(step_s=0.018, token_s=1e-4, pair_s=1.4e-8),
    decode=(
        DecodeCost(step_s=0.02, request_s=4e-5, context_s=6e-7),
        DecodeCost(least=8, step_s=0.015, request_s=6e-4, context_s=5e-7),
    ),
    host_s=1e-3,
)
COPY = TransferCost(latency_s=0.002, bytes_per_s=2e9, token_bytes=100_000)


def _member(capacity: int = 2000, role: Role = "both", **more: object) -> Member:
    config = InstanceConfig(**{"cost": COST, "capacity_tokens": capacity, **more})  # type: ignore[arg-type]
    return Member(config=config, role=role)


def _trace(
    count: int, rate: float, seed: int = 0, longest: int = 300, **more: object
) -> list[TraceRequest]:
    rng, now = random.Random(seed), 0.0
    found = []
    for _ in range(count):
        now += rng.expovariate(rate)
        found.append(
            TraceRequest(
                arrival_s=now,
                prompt_tokens=rng.randint(1, longest),
                output_tokens=rng.randint(1, longest),
                priority=rng.randint(-1, 1),
                tenant=str(rng.randint(0, 2)),
                **more,  # type: ignore[arg-type]
            )
        )
    return found


def _times(report: Report) -> list[tuple[float, float, float]]:
    return [(one.first_s, one.last_s, one.longest_gap_s) for one in report.served]


def _check(report: Report, trace: Sequence[TraceRequest]) -> None:
    assert [one.request for one in report.served] == list(trace)
    for one in report.whole:
        assert one.num_tokens == one.request.output_tokens
        assert one.request.arrival_s < one.first_s <= one.last_s
    for one in report.served:
        assert bool(one.failure) == (one.num_tokens < one.request.output_tokens)


# -- one instance --------------------------------------------------------------------------------


def test_a_request_alone_takes_what_its_steps_cost() -> None:
    trace = [TraceRequest(arrival_s=1.0, prompt_tokens=100, output_tokens=5)]
    (one,) = simulate(ClusterConfig(members=(_member(),)), RoundRobin(), trace).served
    assert one.ttft_s == pytest.approx(COST.step_s(StepWork(100, pairs(0, 100))))
    steps = [COST.step_s(StepWork(num_decodes=1, context_tokens=100 + n)) for n in range(1, 5)]
    assert one.e2e_s - one.ttft_s == pytest.approx(sum(steps))
    assert one.tpot_s == pytest.approx(sum(steps) / 4)
    assert one.longest_gap_s == pytest.approx(max(steps))


def test_long_prompts_are_cut_as_the_policy_cuts_them() -> None:
    trace = [TraceRequest(arrival_s=0.0, prompt_tokens=100, output_tokens=1)]
    config = ClusterConfig(members=(_member(max_batch_tokens=40),))
    (one,) = simulate(config, RoundRobin(), trace).served
    parts = [(0, 40), (40, 40), (80, 20)]
    expected = sum(COST.step_s(StepWork(n, pairs(start, n))) for start, n in parts)
    assert one.ttft_s == pytest.approx(expected)


def test_stages_work_on_several_steps_at_once() -> None:
    """Two parts of a prompt: the second begins while the first is in the next stage."""
    piped = COST.in_stages(2, hop_s=1e-4, hop_token_s=0)
    trace = [TraceRequest(arrival_s=0.0, prompt_tokens=80, output_tokens=1)]
    config = ClusterConfig(members=(_member(cost=piped, max_batch_tokens=40),))
    (one,) = simulate(config, RoundRobin(), trace).served
    first = piped.stage_times(StepWork(40, pairs(0, 40)))
    second = piped.stage_times(StepWork(40, pairs(40, 40)))
    assert one.ttft_s == pytest.approx(first[0] + max(second[0], first[1]) + second[1])


def test_what_could_never_fit_fails_and_harms_nobody() -> None:
    trace = [
        TraceRequest(arrival_s=0.0, prompt_tokens=900, output_tokens=200),
        TraceRequest(arrival_s=0.0, prompt_tokens=50, output_tokens=20),
    ]
    report = simulate(ClusterConfig(members=(_member(1000),)), RoundRobin(), trace)
    assert "never fit" in report.served[0].failure
    assert not report.served[1].failure
    slo = Slo(ttft_s=9.0, tpot_s=9.0)
    assert report.attainment(slo).both == 0.5


def test_a_prompt_of_nearly_all_memory_holds_nobody_back_for_good() -> None:
    trace = [
        TraceRequest(arrival_s=0.0, prompt_tokens=1900, output_tokens=20),
        TraceRequest(arrival_s=1.0, prompt_tokens=50, output_tokens=20),
    ]
    report = simulate(_config(("prefill", "decode")), Disaggregated(), trace)
    assert len(report.whole) == 2


# -- clusters ------------------------------------------------------------------------------------

_POLICIES: dict[str, tuple[ClusterPolicy, tuple[Role, ...]]] = {
    "round robin": (RoundRobin(), ("both", "both", "both")),
    "least loaded": (LeastLoaded(), ("both", "both")),
    "Llumnix": (Llumnix(source_below=60, target_above=120, moves=2), ("both", "both", "both")),
    "headroom": (
        Llumnix(source_below=60, target_above=60, freeness=Freeness({-1: 500})),
        ("both", "both"),
    ),
    "apart": (Disaggregated(), ("prefill", "decode", "decode")),
    "switching": (
        Disaggregated(switching=Switching(queue_tokens=400, pause_s=2)),
        ("prefill", "prefill", "decode", "decode"),
    ),
    "mixed": (Disaggregated(), ("prefill", "decode", "both")),
    "scaling": (
        Llumnix(
            source_below=60,
            target_above=100,
            scaling=Scaling(least=1, most=4, below=50, above=150, pause_s=1),
        ),
        ("both", "both"),
    ),
}


def _config(roles: Sequence[Role], capacity: int = 2000, **more: object) -> ClusterConfig:
    of_member = {k: more.pop(k) for k in list(more) if k in InstanceConfig.__struct_fields__}
    members = tuple(_member(capacity, role, **of_member) for role in roles)
    return ClusterConfig(**{"members": members, "transfer": COPY, "startup_s": 2.0, **more})  # type: ignore[arg-type]


def test_instances_that_share_processors_slow_each_other() -> None:
    """One request alone takes as long as ever; two at once, on two instances, twice as long."""
    alone = [TraceRequest(arrival_s=0.0, prompt_tokens=9, output_tokens=30)]
    own, shared = _config(["both"] * 2), _config(["both"] * 2, slowdown=(1.0, 2.0))
    policy = LeastLoaded()
    once = simulate(own, policy, alone).served[0].e2e_s
    assert simulate(shared, policy, alone).served[0].e2e_s == pytest.approx(once)
    both = [one.e2e_s for one in simulate(shared, policy, alone * 2).served]
    assert both == pytest.approx([2 * once] * 2, rel=0.1)  # the first step began alone
    with pytest.raises(InvalidConfig, match="slowdown"):
        _config(["both"], slowdown=(1.0, 0.0))


@pytest.fixture
def instances(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedInstance]:
    """All that a simulation makes."""
    found: list[SimulatedInstance] = []
    make = SimulatedInstance.__init__

    def note(self: SimulatedInstance, *args: object, **options: object) -> None:
        make(self, *args, **options)  # type: ignore[arg-type]
        found.append(self)

    monkeypatch.setattr(SimulatedInstance, "__init__", note)
    return found


@pytest.mark.parametrize("name", _POLICIES)
@pytest.mark.parametrize("rate", [2.0, 12.0])
def test_every_request_ends_once_and_all_pages_come_back(
    name: str, rate: float, instances: list[SimulatedInstance]
) -> None:
    policy, roles = _POLICIES[name]
    trace = _trace(120, rate, seed=3)
    report = simulate(_config(roles), policy, trace)
    _check(report, trace)
    assert len(report.whole) == len(trace)
    assert len(instances) >= len(roles)
    for instance in instances:
        assert not instance.has_work
        assert not instance.served
        assert not instance.moving
        instance.cache.check_invariants()
        assert instance.cache.live_tokens == 0
    assert report.num_steps >= report.num_scheduled > 0
    assert all(0 <= share <= 1 for share in (*report.busy.values(), *report.most_used.values()))
    if roles[0] == "prefill":
        later = [one for one in report.served if one.num_tokens > 1]
        assert report.num_moves > 0
        if name == "apart":
            assert all(one.num_moves == 1 for one in later)


@settings(max_examples=25)
@example("mixed", 239679, 1.0, 700, "splitfuse", "fair", 4)  # counters of who comes while they run
@example("least loaded", 726333, 5.0, 700, "prefill_first", "fcfs", 4)  # whose prompt is found
@given(
    st.sampled_from(sorted(_POLICIES)),
    st.integers(0, 10**6),
    st.sampled_from([1.0, 5.0, 20.0]),
    st.sampled_from([700, 1500, 6000]),
    st.sampled_from(["splitfuse", "prefill_first"]),
    st.sampled_from(["fcfs", "priority", "fair"]),
    st.sampled_from([4, 64]),
)
def test_what_is_foreseen_is_what_the_scheduler_would_have_done(
    name: str, seed: int, rate: float, capacity: int, policy: str, order: str, max_seqs: int
) -> None:
    """The same tokens at the same times as where it is asked for every step."""
    cluster, roles = _POLICIES[name]
    trace = _trace(40, rate, seed=seed)
    reports = [
        simulate(
            _config(
                roles,
                capacity,
                foresees=foresees,
                policy=policy,
                scheduling_policy=order,
                max_seqs=max_seqs,
                max_batch_tokens=128,
            ),
            cluster,
            trace,
        )
        for foresees in (True, False)
    ]
    quick, slow = reports
    _check(quick, trace)
    for a, b in zip(_times(quick), _times(slow), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert quick.num_moves == slow.num_moves
    assert quick.num_preemptions == slow.num_preemptions
    assert quick.num_scheduled <= slow.num_scheduled


def test_the_same_comes_out_again() -> None:
    policy, roles = _POLICIES["Llumnix"]
    trace = _trace(100, 8.0)
    assert simulate(_config(roles), policy, trace) == simulate(_config(roles), policy, trace)


def test_clients_wait_for_their_answers() -> None:
    trace = [msgspec.structs.replace(request, arrival_s=0.0) for request in _trace(20, 1.0, seed=5)]
    report = simulate(_config(("both", "both"), 8000, clients=3), LeastLoaded(), trace)
    assert len(report.whole) == 20
    ends = sorted(one.last_s for one in report.served)
    arrivals = [one.arrived_s for one in report.served]
    assert arrivals[:3] == [0.0] * 3
    assert arrivals[3:] == pytest.approx(ends[:17])  # each when another had its answer
    with pytest.raises(InvalidConfig, match="clients is 0"):
        _config(("both",), clients=0)


def test_links_and_hand_over_differ_in_bytes_and_time() -> None:
    policy, roles = _POLICIES["apart"]
    trace = _trace(60, 2.0)
    reports = {
        name: simulate(_config(roles, 8000, transfer=transfer), policy, trace)
        for name, transfer in {
            "slow": TransferCost(latency_s=0.002, bytes_per_s=1e8, token_bytes=100_000),
            "copy": COPY,
            "pages": TransferCost(latency_s=0.002, token_bytes=100_000),
        }.items()
    }
    assert reports["pages"].bytes_moved == 0
    assert reports["copy"].bytes_moved == reports["slow"].bytes_moved > 0
    gaps = {name: report.percentiles(50)["gap"][0] for name, report in reports.items()}
    assert gaps["pages"] < gaps["copy"] < gaps["slow"]


def test_the_gap_of_a_live_migration_does_not_grow_with_the_context() -> None:
    """All but the last stage is copied while it goes on."""

    class MovesOne(RoundRobin):
        def migrations(self, snapshot: ClusterSnapshot) -> list[object]:  # type: ignore[override]
            from vkv.runtime.cluster.policies import Move

            here = snapshot.instances[0]
            if snapshot.time_s < 2 or not here.requests:
                return []
            return [Move(r.key, 0, 1, "balance") for r in here.requests if r.is_migratable]

    gaps = []
    for prompt_tokens in (256, 8000):
        trace = [TraceRequest(arrival_s=0.0, prompt_tokens=prompt_tokens, output_tokens=200)]
        report = simulate(_config(("both", "both"), 20_000), MovesOne(), trace)
        (one,) = report.served
        assert one.num_moves == 1
        step_s = COST.step_s(StepWork(num_decodes=1, context_tokens=prompt_tokens))
        gaps.append(one.longest_gap_s - step_s)
    assert 0 < gaps[1] < 2 * gaps[0]


def test_shared_prefixes_are_computed_once_and_dispatched_to() -> None:
    trace = [
        TraceRequest(
            arrival_s=2.0 * n, prompt_tokens=220, output_tokens=4, prefix="story", prefix_tokens=200
        )
        for n in range(6)
    ]
    config = _config(("both", "both", "both"), 6000)
    by_prefix = simulate(config, Llumnix(prefix_tokens=32), trace)
    without = simulate(config, RoundRobin(), trace)
    assert by_prefix.served[1].ttft_s < by_prefix.served[0].ttft_s
    found = [one.ttft_s for one in by_prefix.served[1:]]
    assert sum(found) < sum(one.ttft_s for one in without.served[1:])


def test_scaling_adds_instances_under_load_and_ends_them_after() -> None:
    policy, roles = _POLICIES["scaling"]
    busy = _trace(80, 20.0)
    calm = [
        msgspec.structs.replace(r, arrival_s=busy[-1].arrival_s + 20 + r.arrival_s)
        for r in _trace(10, 0.2)
    ]
    report = simulate(_config(roles), policy, [*busy, *calm])
    _check(report, [*busy, *calm])
    assert 2 < report.most_instances <= 5  # one may drain while another starts
    assert report.instance_s < report.most_instances * report.duration_s * 0.9


def test_llumnix_has_shorter_tails_than_round_robin() -> None:
    """Of first tokens, where lengths vary much and memory is short: its kind of result."""
    rng, now = random.Random(2), 0.0
    trace = []
    for _ in range(300):
        now += rng.expovariate(3.6)
        is_long = rng.random() < 0.1
        trace.append(
            TraceRequest(
                arrival_s=now,
                prompt_tokens=rng.randint(500, 1500) if is_long else rng.randint(10, 200),
                output_tokens=rng.randint(200, 400) if is_long else rng.randint(10, 150),
            )
        )
    config = _config(("both",) * 4, 3000)
    tails = {
        policy.name: simulate(config, policy, trace).percentiles(99)["ttft"][0]
        for policy in (RoundRobin(), Llumnix(source_below=60, target_above=150))
    }
    assert tails["llumnix"] < tails["round_robin"]


def test_a_cluster_that_takes_nothing_gives_up() -> None:
    class Nobody(RoundRobin):
        def dispatch(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> int | None:
            return None

    report = simulate(_config(("both",)), Nobody(), _trace(3, 1.0))
    assert [one.failure for one in report.served] == ["no instance took it"] * 3
    assert report.goodput(Slo(ttft_s=1.0, tpot_s=1.0)) == 0


def test_a_thousand_instances() -> None:
    """The full size, and a few of its requests; `vkv simulate` says how long all take."""
    trace = _trace(3000, 700.0, longest=400)
    config = _config(("both",) * 1000, 66_000, report_s=1.0, react_s=0.01)
    report = simulate(config, Llumnix(), trace)
    assert len(report.whole) == 3000
    assert report.num_steps > 20 * report.num_scheduled


def test_reports_count() -> None:
    trace = _trace(50, 3.0)
    report = simulate(_config(("both", "both"), 8000), LeastLoaded(), trace)
    p50, p99 = report.percentiles(50, 99)["ttft"]
    assert 0 < p50 < p99
    loose, tight = Slo(ttft_s=60.0, tpot_s=60.0), Slo(ttft_s=p50, tpot_s=60.0)
    assert report.attainment(loose).both == 1
    assert report.attainment(loose).meets(loose)
    assert report.attainment(tight).both == pytest.approx(0.5, abs=0.03)
    assert not report.attainment(tight).meets(tight)
    assert report.goodput(loose) == pytest.approx(50 / report.duration_s)
    assert report.instance_s == pytest.approx(2 * report.duration_s, rel=0.05)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="no members"):
        ClusterConfig(members=())
    with pytest.raises(InvalidConfig, match="policy 'fifo'"):
        _member(policy="fifo")
    with pytest.raises(InvalidConfig, match="in order"):
        simulate(_config(("both",)), RoundRobin(), _trace(2, 1.0)[::-1])
    with pytest.raises(InvalidConfig, match="a token at least"):
        TraceRequest(arrival_s=0.0, prompt_tokens=0, output_tokens=1)
    with pytest.raises(InvalidConfig, match="share"):
        Slo(ttft_s=1.0, tpot_s=1.0, share=0.0)


def test_traces_of_tests_are_in_order() -> None:
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(_trace(9, 1.0)))
