"""What steps take, and costs that are found again from steps that were measured."""

import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vkv.runtime.cluster.simulator.costs import (
    DecodeCost,
    DecodeRun,
    PromptCost,
    StepCost,
    StepWork,
    TransferCost,
    pairs,
)
from vkv.runtime.cluster.simulator.fitting import (
    StepRecord,
    fit_beside,
    fit_step_cost,
    non_negative_least_squares,
    read_steps,
    write_steps,
)
from vkv.vmem.errors import InvalidConfig

COST = StepCost(
    prompt=PromptCost(step_s=1.0, token_s=0.1, pair_s=0.01),
    decode=(
        DecodeCost(step_s=2.0, request_s=0.2, context_s=0.001),
        DecodeCost(least=3, step_s=1.0, request_s=0.5, context_s=0.002),
    ),
)


def test_a_step_takes_what_is_in_it() -> None:
    assert COST.step_s(StepWork(10, 55)) == pytest.approx(1 + 1 + 0.55)
    assert COST.step_s(StepWork(num_decodes=2, context_tokens=100)) == pytest.approx(2.5)
    assert COST.step_s(StepWork(num_decodes=3, context_tokens=100)) == pytest.approx(2.7)
    both = StepWork(10, 55, 2, 100)  # the weights are read once
    assert COST.step_s(both) == pytest.approx(2.55 + 0.5)
    assert pairs(0, 10) == 55
    assert pairs(0, 10) + pairs(10, 5) == pairs(0, 15)  # a prompt in parts


def test_stages_share_a_step_and_not_what_the_host_does() -> None:
    cost = msgspec.structs.replace(COST, host_s=0.5, host_token_s=0.01)
    piped = cost.in_stages(2, hop_s=0.1, hop_token_s=0.001)
    first_s, other_s = piped.stage_times(StepWork(10, 55))
    assert other_s == pytest.approx(2.55 / 2 + 0.1 + 0.01)
    assert first_s == pytest.approx(other_s + 0.5 + 0.1)
    assert piped.step_s(StepWork(10, 55)) == pytest.approx(first_s + other_s)


@given(
    st.floats(1e-4, 1),
    st.floats(0, 1e-2),
    st.integers(1, 500),
    st.floats(-0.5, 1.5),
)
def test_runs_of_decodes_are_the_sum_of_their_steps(
    first_s: float, more_s: float, num_steps: int, share: float
) -> None:
    run = DecodeRun(first_s, more_s)
    slow = [first_s + more_s * step for step in range(num_steps)]
    assert run.time_s(num_steps) == pytest.approx(sum(slow))
    elapsed = share * sum(slow)
    done = run.num_done(elapsed, num_steps)
    assert 0 <= done <= num_steps
    assert done == 0 or run.time_s(done) <= elapsed
    assert done == num_steps or run.time_s(done + 1) > elapsed


def test_a_run_grows_as_contexts_do() -> None:
    run = COST.decode_run(StepWork(num_decodes=3, context_tokens=300))
    for step in range(4):
        took = run.time_s(step + 1) - run.time_s(step)
        work = StepWork(num_decodes=3, context_tokens=300 + 3 * step)
        assert took == pytest.approx(COST.step_s(work))


def test_moving_takes_latency_and_bytes() -> None:
    copy = TransferCost(latency_s=0.5, bytes_per_s=100.0, token_bytes=10)
    assert (copy.time_s(20), copy.num_bytes(20)) == (2.5, 200)
    handed_over = TransferCost(latency_s=0.5, token_bytes=10)
    assert (handed_over.time_s(20), handed_over.num_bytes(20)) == (0.5, 0)
    with pytest.raises(InvalidConfig, match="positive rate"):
        TransferCost(bytes_per_s=0.0)


def test_costs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="1 first"):
        StepCost(prompt=COST.prompt, decode=(DecodeCost(least=2, step_s=1, request_s=0),))
    with pytest.raises(InvalidConfig, match="stages is 0"):
        COST.in_stages(0, hop_s=0, hop_token_s=0)


# -- fitting -------------------------------------------------------------------------------------


def _steps(cost: StepCost, noise: float) -> list[StepRecord]:
    rng = random.Random(1)
    found = []
    for _ in range(300):
        tokens = rng.choice([0, 0, rng.randrange(1, 512)])
        decodes = rng.randrange(0 if tokens else 1, 20)
        work = StepWork(
            tokens, pairs(rng.randrange(900), tokens), decodes, decodes * rng.randrange(1, 999)
        )
        found.append(StepRecord(work, cost.step_s(work) * rng.uniform(1 - noise, 1 + noise)))
    return found


def test_a_fit_finds_the_costs_that_steps_were_made_with() -> None:
    cost = StepCost(
        prompt=PromptCost(step_s=0.01, token_s=1e-4, pair_s=2e-8),
        decode=(DecodeCost(step_s=0.02, request_s=3e-4, context_s=1e-6),),
    )
    fit = fit_step_cost(_steps(cost, noise=0))
    assert fit.mean_error < 1e-6
    assert fit.cost.prompt.token_s == pytest.approx(1e-4)
    assert fit.cost.decode[0].context_s == pytest.approx(1e-6)
    noisy = fit_step_cost(_steps(cost, noise=0.1))
    assert noisy.num_steps == 300
    assert noisy.mean_error < 0.1
    assert abs(noisy.total_error) < 0.02
    assert noisy.cost.prompt.token_s == pytest.approx(1e-4, rel=0.1)


def test_no_cost_is_negative() -> None:
    """A term that would best be below 0 is 0, and the others make up for it."""
    steps = [
        StepRecord(StepWork(tokens, tokens**2, 0, 0), 0.1 + tokens * 1e-3 - tokens**2 * 1e-7)
        for tokens in range(1, 400)
    ]
    cost = fit_step_cost(steps).cost
    assert cost.prompt.pair_s == 0
    assert cost.prompt.token_s > 0


@given(st.integers(1, 5), st.integers(0, 2**31))
def test_least_squares_meet_the_conditions_of_an_optimum(columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(12, columns)), rng.normal(size=12)
    x = non_negative_least_squares(a, b)
    gradient = a.T @ (a @ x - b)
    assert (x >= 0).all()
    assert (gradient >= -1e-6).all()  # no cost at 0 would better be larger
    assert np.abs(gradient * x).max() < 1e-6  # and those above 0 are where it is flat


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="1 steps cannot be fitted"):
        fit_step_cost([StepRecord(StepWork(1), 0.1)])


def test_steps_are_lines_of_json(tmp_path: Path) -> None:
    steps = _steps(COST, noise=0)[:5]
    write_steps(tmp_path / "steps.jsonl", steps)
    assert read_steps(tmp_path / "steps.jsonl") == steps
    (tmp_path / "bad.jsonl").write_text('{"time_s": 1}\n')
    with pytest.raises(InvalidConfig, match=r"line 1 is no step.*work"):
        read_steps(tmp_path / "bad.jsonl")


def test_what_others_slow_is_found_beside_the_costs() -> None:
    rng = np.random.default_rng(3)
    factors = (1.0, 1.3, 2.0)
    steps, beside = [], []
    for _ in range(600):
        prompt = int(rng.integers(1, 300)) if rng.random() < 0.3 else 0
        decodes = int(rng.integers(1, 20))
        work = StepWork(prompt, pairs(0, prompt), decodes, decodes * int(rng.integers(10, 400)))
        count = int(rng.integers(1, 4))
        steps.append(StepRecord(work, COST.step_s(work) * factors[count - 1]))
        beside.append(count + rng.uniform(-0.3, 0.3))
    fit, found = fit_beside(steps, beside)
    assert found == pytest.approx(factors, rel=0.02)
    assert fit.mean_error < 0.05  # of costs that are not linear
    assert fit_step_cost(steps).mean_error > 0.1
