"""`vkv bench long`: each part with tiny settings, and what is made of what it found."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from vkv.bench.cluster.long import context, decode, lending, simulated
from vkv.bench.cluster.long.costs import Costs, recorded_loan_cost, recorded_step_cost
from vkv.bench.cluster.long.decode import FILE, HOME, HOST, LENDERS, Cell, Decoded
from vkv.bench.cluster.long.lending import Pairs, Served
from vkv.bench.cluster.long.options import LongOptions
from vkv.bench.load.workloads import lengths
from vkv.bench.models.checkpoints import Checkpoints, save_checkpoints
from vkv.runtime.cluster.simulator.costs import (
    DecodeCost,
    LoanCost,
    PromptCost,
    StepCost,
    StepWork,
)
from vkv.vmem.errors import InvalidConfig


def _options(**changes: Any) -> LongOptions:
    tiny: dict[str, Any] = {
        "shape": "llama-tiny",
        "pool_tokens": 2048,
        "counts": (2,),
        "creditors": (1, 2),
        "segments": (2, 1),
        "batches": (1, 2),
        "links": ("unix", "tcp"),
        "elsewhere_tokens": 2048,
        "at_home_tokens": 32,
        "num_steps": 4,
        "output_tokens": 4,
    }
    return LongOptions(**(tiny | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("model")
    most = context.most_positions(_options())
    return save_checkpoints(
        "llama-tiny", None, torch.float32, None, folder, max_position_embeddings=most
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parts": ("contexts",)}, "'contexts'; use some of context"),
        ({"links": ("carrier",)}, "use some of unix, tcp"),
        ({"segments": (3, 1)}, "use equal ones of a multiple of 512"),
        ({"creditors": (1, 2), "segments": (1,)}, "1 segments do not go evenly to 2"),
        ({"batches": (0,)}, "1 or more"),
        ({"links": ()}, "need one each"),
        ({"parts": ("simulated", "decode")}, "takes what lending measures"),
        ({"link": "carrier"}, "use one of unix, tcp"),
        ({"most_tokens": 4096}, "without lending none of these could run"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        _options(**changes)


# -- the longest context -------------------------------------------------------------------------


@pytest.mark.usefixtures("one_ray")
def test_two_instances_run_what_one_cannot(saved: Checkpoints) -> None:
    options, found = _options(), {}
    for _ in context.measure(options, saved, found):
        pass
    assert found[2].same_tokens
    assert found[2].logprob_difference == 0
    assert found[2].num_tokens > options.pool_tokens + 256
    assert found[2].lent_tokens >= found[2].num_tokens - 1024 - 512
    assert not found[2].refused
    alone = dataclasses.replace(found[2], num_tokens=2049, lent_tokens=0)
    table = context.table({1: alone, **found}, options)
    assert [row[2] for row in table.rows] == ["1.00", f"{found[2].num_tokens / 2049:.2f}"]


# -- decodes -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_processes")
def test_queries_and_results_travel_and_never_a_key(saved: Checkpoints) -> None:
    options, found = _options(creditors=(2,), segments=(4,), batches=(2,)), {}
    for _ in decode.measure(options, saved, found):
        pass
    assert list(found) == decode.cells(options)
    for cell, one in found.items():
        assert len(one.step_s) == options.num_steps
        assert one.segments == cell.segments * cell.batch
        assert one.elsewhere_tokens == (0 if cell.where == HOME else 2048 * cell.batch)
        if cell.where != LENDERS:
            assert one.link_bytes == one.moved_bytes == 0
            continue
        # A query of 4 layers of 4 heads of 16 floats to each segment.
        assert one.sent_bytes == one.segments * 4 * 4 * 16 * 4
        assert one.sent_bytes < one.received_bytes < 2 * one.sent_bytes
        assert one.moved_bytes == one.elsewhere_tokens * saved.kv_bytes_per_token
    assert {cell.where for cell in found} == {HOME, LENDERS, HOST, FILE}
    assert len(decode.table(found, saved).rows) == len(found)
    assert decode.fitted(found) is not None


def test_costs_of_a_link_are_found_again() -> None:
    found = {Cell(HOME, batch=batch): Decoded(step_s=[0.010]) for batch in (1, 4)}
    for batch in (1, 4):
        for creditors in (1, 2, 3):
            num_bytes = 6 * batch * 1000.0
            step_s = 0.010 + 2e-4 + 3e-4 * creditors + 5e-8 * num_bytes
            found[Cell(LENDERS, "unix", creditors, 6, batch)] = Decoded(
                step_s=[step_s] * 3,
                segments=6 * batch,
                sent_bytes=num_bytes / 2,
                received_bytes=num_bytes / 2,
                moved_bytes=1 << 20,
                moved_s=1e-3,
            )
    fit = decode.link_cost(found, "unix")
    assert fit is not None
    cost, error = fit
    assert (cost.step_s, cost.holder_s, cost.byte_s) == pytest.approx((2e-4, 3e-4, 5e-8))
    assert cost.query_bytes == pytest.approx(1000.0)
    assert cost.move_bytes_per_s == pytest.approx((1 << 20) / 1e-3)
    assert error < 1e-9
    assert decode.link_cost(found, "tcp") is None
    assert cost.asking_s(0, 5) == 0
    assert cost.asking_s(2, 6) == pytest.approx(2e-4 + 6e-4 + 6000 * 5e-8)


# -- lending -------------------------------------------------------------------------------------


def _served(tokens_per_s: float, num_whole: int = 96) -> Served:
    return Served(
        tokens_per_s=tokens_per_s,
        duration_s=10.0,
        num_whole=num_whole,
        num_preemptions=2,
        lent_tokens=512,
        ttft_s=0.5,
        e2e_s=2.0,
    )


def test_runs_are_compared_in_pairs() -> None:
    pairs = Pairs(
        without=[_served(100), _served(200), _served(100, num_whole=95)],
        lending=[_served(150), _served(200), _served(120)],
    )
    assert pairs.ratios == [1.5, 1.0, 1.2]
    options = _options()
    table = lending.real_table(lending.Lent(runs={"least_loaded": pairs}), options)
    assert table.rows[0][-1] == "1.20 (1.00–1.50)"
    assert table.notes[-1] == "least_loaded, without: 95 of 96 requests were whole."


def test_a_few_are_long_and_many_short() -> None:
    found = lengths("skewed", 160, seed=1)
    long = [prompt for prompt, _ in found if prompt > 3388]
    assert len(long) == 10
    tokens = sum(prompt + output for prompt, output in found)
    assert sum(long) / tokens == pytest.approx(0.49, abs=0.05)
    assert len(lengths("skewed", 7)) == 7


@pytest.mark.usefixtures("one_ray")
def test_a_cluster_serves_the_same_requests_with_lending_and_without(saved: Checkpoints) -> None:
    options = _options(lenders=2, num_requests=16, pairs=1, rate=1000.0, max_batch_tokens=256)
    found = lending.Lent()
    for _ in lending.measure(options, saved, found):
        pass
    (pairs,) = found.runs.values()
    assert [run.num_whole for run in (*pairs.without, *pairs.lending)] == [16, 16]
    assert pairs.without[0].lent_tokens == 0
    assert found.step_cost is not None
    assert found.step_cost.step_s(StepWork(prompt_tokens=100, prompt_pairs=5000.0)) > 0
    assert lending.results(found)["step_cost"]["decode"]


# -- simulated instances -------------------------------------------------------------------------


def _costs() -> Costs:
    step = StepCost(
        prompt=PromptCost(step_s=0.01, token_s=1e-4, pair_s=1e-8),
        decode=(DecodeCost(step_s=0.01, request_s=1e-4, context_s=1e-7),),
    )
    loan = LoanCost(holder_s=1e-4, byte_s=1e-10, query_bytes=1000, move_bytes_per_s=1e9)
    return Costs(step, loan, token_bytes=1024)


def test_simulated_instances_serve_the_same_requests_both_ways(tmp_path: Path) -> None:
    options = _options(num_requests=24, simulated=8, lenders=4, seeds=(0, 1))
    runs: dict[str, Pairs] = {}
    for _ in simulated.measure(options, _costs(), runs):
        pass
    (pairs,) = runs.values()
    assert [run.num_whole for run in (*pairs.without, *pairs.lending)] == [48] * 4
    assert all(run.lent_tokens == 0 for run in pairs.without)
    assert len(pairs.ratios) == 2
    assert simulated.table(runs, options).rows[0][0] == "least_loaded"


def test_costs_are_those_of_a_record(tmp_path: Path) -> None:
    costs, path = _costs(), tmp_path / "long.json"
    results = {
        "loan_costs": {"unix": {**msgspec.to_builtins(costs.loan), "error": 0.1}},
        "lending": {"step_cost": msgspec.to_builtins(costs.step)},
    }
    path.write_text(json.dumps({"results": results}))
    assert recorded_step_cost(path) == costs.step
    assert recorded_loan_cost(path) == costs.loan
    with pytest.raises(InvalidConfig, match="no costs of tcp"):
        recorded_loan_cost(path, "tcp")
    path.write_text(json.dumps({"results": {}}))
    with pytest.raises(InvalidConfig, match="part lending"):
        recorded_step_cost(path)
