"""Simulated instances that lend each other memory: what runs then, what it takes, what is left."""

import random
from itertools import pairwise

import msgspec
import pytest
from vkv.runtime.cluster.policies import LeastLoaded, Ledger, Llumnix, RoundRobin
from vkv.runtime.cluster.simulator.cluster import ClusterConfig, Member, simulate
from vkv.runtime.cluster.simulator.costs import DecodeCost, LoanCost, PromptCost, StepCost
from vkv.runtime.cluster.simulator.instance import InstanceConfig, SimulatedInstance
from vkv.runtime.cluster.simulator.loans import LoanConfig, Loans
from vkv.runtime.cluster.simulator.trace import Report, TraceRequest
from vkv.vmem.errors import InvalidConfig

COST = StepCost(
    prompt=PromptCost(step_s=0.018, token_s=1e-4, pair_s=1.4e-8),
    decode=(DecodeCost(step_s=0.02, request_s=4e-5, context_s=6e-7),),
)
LOANS = LoanConfig(
    most_tokens=8000,
    cost=LoanCost(holder_s=1e-3, byte_s=1e-9, query_bytes=1000, move_bytes_per_s=1e9),
    token_bytes=1000,
    part_tokens=64,
    spare_tokens=64,
)


def _cluster(count: int = 4, capacity: int = 1024, **more: object) -> ClusterConfig:
    options = {"cost": COST, "capacity_tokens": capacity, "max_batch_tokens": 256, "loans": LOANS}
    config = InstanceConfig(**(options | more))  # type: ignore[arg-type]
    return ClusterConfig(members=(Member(config=config),) * count, round_s=0.1)


def _request(prompt: int, output: int = 20, arrival_s: float = 0.0) -> TraceRequest:
    return TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)


def _ledger() -> Ledger:
    return Ledger(part_tokens=LOANS.part_tokens)


def _skewed(count: int, seed: int, rate: float = 20.0) -> list[TraceRequest]:
    """A few that are longer than an instance's memory, or nearly, among short ones."""
    draw, now_s, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now_s += draw.expovariate(rate)
        is_long = draw.random() < 0.15
        prompt = draw.randint(600, 1800) if is_long else draw.randint(5, 120)
        found.append(_request(prompt, draw.randint(5, 60), now_s))
    return found


def _times(report: Report) -> list[tuple[float, float, float]]:
    return [(one.first_s, one.last_s, one.longest_gap_s) for one in report.served]


@pytest.fixture
def born(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedInstance]:
    """The instances of simulations that run from now on."""
    found: list[SimulatedInstance] = []
    make = SimulatedInstance.__init__

    def noting(self: SimulatedInstance, *args: object, **options: object) -> None:
        make(self, *args, **options)  # type: ignore[arg-type]
        found.append(self)

    monkeypatch.setattr(SimulatedInstance, "__init__", noting)
    return found


def _check_nothing_left(born: list[SimulatedInstance]) -> None:
    for instance in born:
        instance.cache.check_invariants()
        assert instance.cache.live_tokens == 0
        assert isinstance(instance.loans, Loans)
        assert instance.loans.num_lent_here == 0
        loans = instance.loans.segments.loans
        assert [loans.num_lent(name) for name in loans.creditors] == [0] * len(loans.creditors)


def test_a_request_longer_than_an_instances_memory_runs_on_the_others(
    born: list[SimulatedInstance],
) -> None:
    trace = [_request(2600), _request(50)]
    alone = simulate(_cluster(loans=None), RoundRobin(), trace)
    assert "never fit" in alone.served[0].failure
    report = simulate(_cluster(), RoundRobin(), trace, _ledger())
    assert len(report.whole) == 2
    assert report.lent_tokens >= 2600 - 512 - 64
    assert report.num_loans_lost == 0
    _check_nothing_left(born[4:])


def test_what_all_together_do_not_hold_is_refused() -> None:
    report = simulate(_cluster(), RoundRobin(), [_request(4 * 1024), _request(9)], _ledger())
    assert "never fit" in report.served[0].failure
    assert not report.served[1].failure


def test_tokens_elsewhere_cost_their_owner_queries_and_their_holder_attention() -> None:
    """Of one request at several creditors, the last steps."""

    def step_s(**costs: float) -> float:
        loans = msgspec.structs.replace(LOANS, cost=LoanCost(**costs))
        report = simulate(_cluster(loans=loans), RoundRobin(), [_request(2600)], _ledger())
        (one,) = report.served
        assert one.tpot_s is not None
        return one.tpot_s

    free = step_s()
    assert step_s(step_s=2e-3) - free == pytest.approx(2e-3)
    holders = (step_s(holder_s=1e-3) - free) / 1e-3
    assert holders in (pytest.approx(2), pytest.approx(3))
    queries = (step_s(byte_s=1e-6, query_bytes=100) - free) / 1e-4
    assert queries >= holders
    # An instance that only lends pays with time of its own steps.
    trace = [_request(2600, 200), *(_request(40, 60, 1.0) for _ in range(3))]
    busy, lent = (
        simulate(_cluster(cost=cost), RoundRobin(), trace, _ledger())
        for cost in (COST, _without_context(COST))
    )
    for one, other in zip(busy.served[1:], lent.served[1:], strict=True):
        assert one.e2e_s > other.e2e_s


def _without_context(cost: StepCost) -> StepCost:
    pieces = tuple(msgspec.structs.replace(piece, context_s=0.0) for piece in cost.decode)
    return msgspec.structs.replace(cost, decode=pieces)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", [RoundRobin(), LeastLoaded(), Llumnix(source_below=60)])
def test_every_request_ends_once_and_nothing_is_left(
    seed: int, policy: LeastLoaded, born: list[SimulatedInstance]
) -> None:
    trace = _skewed(60, seed)
    report = simulate(_cluster(), policy, trace, _ledger())
    assert [one.failure for one in report.served] == [""] * len(trace)
    assert [one.num_tokens for one in report.served] == [one.output_tokens for one in trace]
    assert report.lent_tokens > 0
    _check_nothing_left(born)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_foreseen_is_what_the_scheduler_would_have_done(seed: int) -> None:
    trace = _skewed(40, seed)
    each, summed = (
        simulate(
            msgspec.structs.replace(_cluster(), foresees=foresees), RoundRobin(), trace, _ledger()
        )
        for foresees in (False, True)
    )
    assert each.num_scheduled > summed.num_scheduled
    for found, expected in zip(_times(summed), _times(each), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    assert (summed.lent_tokens, summed.num_preemptions) == (each.lent_tokens, each.num_preemptions)


def test_the_same_comes_out_again() -> None:
    trace = _skewed(50, seed=9)
    first, second = (simulate(_cluster(), LeastLoaded(), trace, _ledger()) for _ in range(2))
    assert _times(first) == _times(second)


def test_a_ledger_without_a_need_changes_nothing() -> None:
    trace = [_request(60, 30, 0.05 * n) for n in range(40)]
    plain = simulate(_cluster(loans=None), LeastLoaded(), trace)
    ledger = simulate(_cluster(), LeastLoaded(), trace, _ledger())
    assert _times(plain) == _times(ledger)
    assert ledger.lent_tokens == 0
    assert all(a.arrived_s <= b.arrived_s for a, b in pairwise(ledger.served))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"part_tokens": 0}, "use a token at least"),
        ({"share": 0.0}, "above 0"),
        ({"wait_s": -1}, "not negative"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        LoanConfig(**({"most_tokens": 100} | changes))  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="not negative"):
        LoanCost(holder_s=-1.0)
