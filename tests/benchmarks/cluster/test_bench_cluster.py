"""`vkv bench cluster`: policies as they are typed, steps from when tokens came, what is shown."""

import random
from itertools import accumulate

import pytest
from vkv.bench.cluster.bench import compared, parse_load
from vkv.bench.cluster.comparison import against_first, by_urgency
from vkv.bench.cluster.contenders import URGENT, contender
from vkv.bench.cluster.goodput import kept
from vkv.bench.cluster.options import ClusterOptions, Load
from vkv.bench.cluster.real import Client, Exchange, Run, observed_steps, serve
from vkv.bench.cluster.traces import trace_of
from vkv.bench.load.workloads import lengths
from vkv.runtime.cluster.cluster import Cluster
from vkv.runtime.cluster.policies import (
    Disaggregated,
    LeastLoaded,
    Llumnix,
    RoundRobin,
    Scaling,
)
from vkv.runtime.cluster.simulator.cluster import ClusterConfig, Member, simulate
from vkv.runtime.cluster.simulator.costs import DecodeCost, PromptCost, StepCost
from vkv.runtime.cluster.simulator.instance import InstanceConfig
from vkv.runtime.cluster.simulator.trace import Report, Slo, TraceRequest
from vkv.runtime.request.sampling_params import SamplingParams
from vkv.runtime.request.spec import RequestSpec
from vkv.vmem.errors import InvalidConfig

COST = StepCost(
    prompt=PromptCost(step_s=0.01, token_s=1e-4, pair_s=1e-8),
    decode=(DecodeCost(step_s=0.02, request_s=1e-3, context_s=1e-6),),
)


def _simulated(trace: list[TraceRequest], policy: object, count: int = 2) -> Report:
    config = InstanceConfig(cost=COST, capacity_tokens=4000)
    members = (Member(config=config),) * count
    return simulate(ClusterConfig(members=members), policy, trace)  # type: ignore[arg-type]


# -- policies as they are typed ------------------------------------------------------------------


def test_a_policy_is_made_of_what_is_typed() -> None:
    assert isinstance(contender("round-robin").policy(), RoundRobin)
    policy = contender("llumnix:source_below=48:target_above=60.5:moves=2:headroom=900").policy()
    assert isinstance(policy, Llumnix)
    assert (policy.source_below, policy.target_above, policy.moves) == (48, 60.5, 2)
    assert policy.freeness.headroom_tokens == {URGENT: 900}
    apart = contender("disaggregated:kept=0.2").policy()
    assert isinstance(apart, Disaggregated)
    assert apart.kept == 0.2
    scaled = contender("least_loaded:least=2:most=8:below=10:above=20").policy()
    assert isinstance(scaled, LeastLoaded)
    assert isinstance(scaled.scaling, Scaling)
    assert (scaled.scaling.least, scaled.scaling.most, scaled.scaling.above) == (2, 8, 20)
    one = contender("llumnix:order=priority:instances=7")
    assert (one.order, one.instances) == ("priority", 7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("random", "use one of round_robin"),
        ("llumnix:moves", "KEY=VALUE"),
        ("llumnix:moves=many", "give a number"),
        ("llumnix:kept=0.1", "use some of source_below"),
        ("round_robin:headroom=3", "use some of least"),
        ("llumnix:order=last", "fcfs, priority"),
        ("llumnix:below=3", "the least and the most"),
        ("llumnix:instances=0", "from 1 on"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_remedy(text: str, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        contender(text)


def test_what_is_no_load_is_refused() -> None:
    assert parse_load("sharegpt@4.5") == ("sharegpt", 4.5)
    for text in ("sharegpt", "sharegpt@", "sharegpt@0"):
        with pytest.raises(InvalidConfig, match="NAME@RATE"):
            parse_load(text)
    with pytest.raises(InvalidConfig, match="prefill, decode, both"):
        ClusterOptions(roles=("encode",))


# -- lengths -------------------------------------------------------------------------------------


def test_power_laws_have_the_quantiles_that_were_published() -> None:
    # arXiv:2406.03243, table 1: mean, P50, P80, P95 and P99 of what its authors drew.
    for mean, quantiles in (
        (128, (38, 113, 413, 1464)),
        (256, (32, 173, 1288, 4208)),
        (512, (55, 582, 3113, 5166)),
    ):
        found = sorted(prompt for prompt, _ in lengths(f"powerlaw-{mean}-{mean}", 20_000))
        assert sum(found) / len(found) == pytest.approx(mean, rel=0.08)
        for share, published in zip((0.5, 0.8, 0.95, 0.99), quantiles, strict=True):
            assert found[int(share * len(found))] == pytest.approx(published, rel=0.25)
        assert 6000 < max(found) <= 6144


def test_urgent_requests_are_a_share_of_the_same_requests() -> None:
    plain = trace_of(Load(num_requests=400), 1.0)
    some = trace_of(Load(num_requests=400, urgent=0.2), 1.0)
    assert [r.prompt_tokens for r in plain] == [r.prompt_tokens for r in some]
    assert sum(r.priority == URGENT for r in some) == pytest.approx(80, abs=25)
    assert not any(r.priority for r in plain)


# -- steps from when tokens came -----------------------------------------------------------------


def test_steps_are_seen_from_when_tokens_were_made() -> None:
    """Of two instances with known costs, whose requests begin with whole prompts."""
    rng = random.Random(1)
    clients, first, expected = [], {}, []
    for instance in (0, 1):
        now, context = 10.0, 0
        for number in range(30):  # one request after the other, alone
            prompt, output = rng.randint(5, 50), rng.randint(2, 20)
            spec = RequestSpec(
                request_id=f"{instance}-{number}",
                prompt_token_ids=[0] * prompt,
                params=SamplingParams(),
                arrival_time_s=now + 0.5,
            )
            durations = [0.01 + 1e-4 * prompt]
            for token in range(1, output):
                context = prompt + token
                durations.append(0.02 + 1e-3 + 1e-6 * context)
            made = list(accumulate(durations, initial=now + 0.5))[1:]
            clients.append(Client(spec, made_s=made, seen_s=made, is_finished=True))
            first[spec.request_id] = instance
            expected += durations if number else durations[1:]
            now = made[-1]
    report = _simulated([TraceRequest(arrival_s=0.0, prompt_tokens=1, output_tokens=1)], Llumnix())
    steps, beside = observed_steps(Run(report, clients, first), budget=1000)
    assert [step.time_s for step in steps] == pytest.approx(expected)
    assert sum(step.work.prompt_tokens for step in steps) > 0
    assert len(observed_steps(Run(report, clients, first), budget=20)[0]) < len(steps)
    assert min(beside) >= 1
    assert max(beside) <= 2 + 1e-9
    assert 1 < sum(beside) / len(beside) < 2  # each rests half a second before each request


# -- what is shown -------------------------------------------------------------------------------


def test_the_first_policy_is_what_others_are_compared_with() -> None:
    trace = trace_of(Load(num_requests=60, urgent=0.3, scale=0.2), 20.0)
    one = _simulated(trace, RoundRobin())
    runs = {("20/s", "round_robin"): [one], ("20/s", "same"): [one]}
    table = against_first(runs)
    assert table is not None
    assert table.rows == [["same", *["1.00"] * 6]]
    assert against_first({("20/s", "alone"): [one]}) is None
    urgent = by_urgency(runs)
    assert urgent is not None
    assert [row[0] for row in urgent.rows][:2] == ["round_robin: urgent", "round_robin: others"]
    plain = _simulated(trace_of(Load(num_requests=5), 1.0), RoundRobin())
    assert by_urgency({("1/s", "a"): [plain]}) is None
    same = compared(runs, runs)
    assert same.rows[0][1:] == ["1.00"] * 12
    assert "100% are within" in same.notes[0]


def test_goodput_is_the_highest_rate_at_which_promises_are_kept() -> None:
    load = Load(num_requests=80, scale=0.2)
    runs = {
        (f"{rate:g}/s", "both"): [_simulated(trace_of(load, rate), LeastLoaded())]
        for rate in (1.0, 4.0, 400.0)
    }
    slos = [Slo(ttft_s=0.5, tpot_s=0.04), Slo(ttft_s=0.001, tpot_s=1.0)]
    table = kept(runs, slos, "Simulated")
    assert table.rows[-1] == ["goodput: both", "4/s", "0/s"]


# -- real instances ------------------------------------------------------------------------------


def test_a_trace_is_served_by_one_policy_after_the_other_on_one_cluster() -> None:
    trace = [
        TraceRequest(arrival_s=0.02 * n, prompt_tokens=4 + n, output_tokens=3 + n, priority=-1)
        for n in range(6)
    ]
    exchange = Exchange()
    with Cluster(
        instances=2, policy=exchange, threads=1, device="cpu", max_seqs=4, kv_memory="8MiB"
    ) as cluster:
        vocab_size = cluster.face.admission.vocab_size
        for seed, policy in enumerate((RoundRobin(), Llumnix())):
            run = serve(cluster, exchange, policy, trace, vocab_size=vocab_size, seed=seed)
            assert [one.num_tokens for one in run.report.served] == [3 + n for n in range(6)]
            assert len(run.report.whole) == 6
            assert all(0 < one.ttft_s <= one.e2e_s for one in run.report.served)
            assert set(run.first.values()) <= {0, 1}
            assert len(run.first) == 6
            assert run.report.num_steps > 0
            assert observed_steps(run, 1000)[0]
        assert exchange.policy is policy
