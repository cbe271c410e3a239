"""`vkv simulate` and `vkv place`: traces, steps of records, and what is shown."""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from vkv.bench.cluster.options import Load, PlaceOptions, SimulateOptions
from vkv.bench.cluster.traces import recorded_steps, recorded_trace, trace_of
from vkv.bench.load.workloads import lengths, traffic
from vkv.runtime.cli import main as cli
from vkv.runtime.cluster.policies import LeastLoaded
from vkv.runtime.cluster.simulator.cluster import ClusterConfig, Member, simulate
from vkv.runtime.cluster.simulator.costs import DecodeCost, PromptCost, StepCost, StepWork
from vkv.runtime.cluster.simulator.fitting import StepRecord, fit_step_cost, write_steps
from vkv.runtime.cluster.simulator.instance import InstanceConfig, SimulatedInstance
from vkv.runtime.cluster.simulator.pipeline import Pipeline
from vkv.runtime.cluster.simulator.trace import TraceRequest
from vkv.vmem.errors import InvalidConfig

COST = StepCost(
    prompt=PromptCost(step_s=0.01, token_s=1e-4, pair_s=1e-8),
    decode=(DecodeCost(step_s=0.02, request_s=1e-3, context_s=1e-6),),
)


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.stdout


# -- traces --------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_traffic() -> None:
    work = traffic("sharegpt", 50, vocab_size=9, seed=3)
    expected = [(len(item.prompt), item.num_output_tokens) for item in work]
    assert lengths("sharegpt", 50, seed=3) == expected


def test_another_rate_has_the_same_requests() -> None:
    load = Load(workload="sharegpt-turns", num_requests=200, most_tokens=2047)
    slow, fast = trace_of(load, 1.0), trace_of(load, 4.0)
    assert [r.prompt_tokens for r in slow] == [r.prompt_tokens for r in fast]
    assert [r.arrival_s for r in slow] == pytest.approx([4 * r.arrival_s for r in fast])
    assert max(r.prompt_tokens + r.output_tokens for r in slow) <= 2047
    mean = sum(r.prompt_tokens for r in slow) / 200
    assert mean == pytest.approx(756, rel=0.02)


# -- records -------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[StepWork]]:
    """A run as `vkv bench serve` records it, of an instance whose steps are known."""
    works: list[StepWork] = []
    run: dict[str, Any] = {"step_tokens": [], "step_ends": []}
    begin, note = Pipeline.begin, SimulatedInstance._note_token
    token_times: dict[int, list[float]] = {}

    def noting(self: Pipeline, items: object, work: StepWork, now_s: float) -> None:
        begin(self, items, work, now_s)  # type: ignore[arg-type]
        works.append(work)
        run["step_tokens"].append(work.prompt_tokens + work.num_decodes)
        run["step_ends"].append(now_s + COST.step_s(work))

    def token(self: SimulatedInstance, request: Any, at_s: float) -> None:
        token_times.setdefault(int(request.key[0]), []).append(at_s)
        note(self, request, at_s)

    monkeypatch.setattr(Pipeline, "begin", noting)
    monkeypatch.setattr(SimulatedInstance, "_note_token", token)
    rng, now, trace = random.Random(4), 0.0, []
    for _ in range(40):
        now += rng.expovariate(2.0)
        trace.append(
            TraceRequest(
                arrival_s=now, prompt_tokens=rng.randint(2, 300), output_tokens=rng.randint(1, 60)
            )
        )
    config = InstanceConfig(cost=COST, capacity_tokens=50_000, max_batch_tokens=100)
    simulate(ClusterConfig(members=(Member(config=config),), foresees=False), LeastLoaded(), trace)
    times = [token_times[n] for n in range(40)]
    run |= {
        "workload": "made up",
        "load": "2/s",
        "policy": "splitfuse",
        "max_batch_tokens": 100.0,
        "arrivals": [r.arrival_s for r in trace],
        "input_lens": [r.prompt_tokens for r in trace],
        "output_lens": [r.output_tokens for r in trace],
        "ttfts": [t[0] - r.arrival_s for t, r in zip(times, trace, strict=True)],
        "itls": [[b - a for a, b in itertools.pairwise(t)] for t in times],
    }
    return run, works


def test_steps_are_found_again_in_a_record(
    recorded: tuple[dict[str, Any], list[StepWork]],
) -> None:
    run, works = recorded
    steps = recorded_steps(run)
    assert len(steps) == len(works)
    for step, work in zip(steps, works, strict=True):
        assert step.work.num_decodes + step.work.prompt_tokens == (
            work.num_decodes + work.prompt_tokens
        )
        assert step.time_s == pytest.approx(COST.step_s(work), rel=1e-3)
    same = [s.work == w for s, w in zip(steps, works, strict=True)]
    assert sum(same) / len(same) > 0.95  # a prompt's last token counts as one of it, or a decode
    fit = fit_step_cost(steps)
    assert fit.mean_error < 0.02
    assert fit.cost.prompt.token_s == pytest.approx(1e-4, rel=0.1)


def test_a_record_is_simulated_again(
    recorded: tuple[dict[str, Any], list[StepWork]], tmp_path: Path
) -> None:
    run, _ = recorded
    path = tmp_path / "serve.json"
    path.write_text(json.dumps({"config": {"max_seqs": 256}, "results": {"runs": [run]}}))
    shown = _run("simulate", "--record", str(path))
    errors = [float(text) for text in re.findall(r"([+-][\d.]+)% ", shown)]
    assert len(errors) >= 6
    assert max(map(abs, errors)) < 5
    assert [r.output_tokens for r in recorded_trace(run)] == run["output_lens"]
    path.write_text("{}")
    with pytest.raises(InvalidConfig, match="give a record of `vkv bench serve`"):
        CliRunner().invoke(cli.app, ["simulate", "--record", str(path)], catch_exceptions=False)
    other = [{"way": "vkv", "num_preemptions": 0}]  # of a bench that notes no steps
    path.write_text(json.dumps({"config": {}, "results": {"runs": other}}))
    with pytest.raises(InvalidConfig, match="give a record of `vkv bench serve`"):
        CliRunner().invoke(cli.app, ["simulate", "--record", str(path)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("simulate", "--record"), "nowhere is no record"),
        (("simulate", "--num-requests", "5", "--lending", "--loan-record"), "nowhere is no record"),
        (("simulate", "--steps"), "cannot read the steps of .*nowhere"),
        (("place", "--machine"), "nowhere describes no machine"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidConfig, match=said):
        CliRunner().invoke(cli.app, [*words, str(tmp_path / "nowhere")], catch_exceptions=False)


def test_a_plot_that_could_not_be_kept_is_refused_before_the_search(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    words = ("place", "--plot", str(tmp_path / "file" / "plot.png"))
    with pytest.raises(InvalidConfig, match="nothing can be written to"):
        CliRunner().invoke(cli.app, [*words], catch_exceptions=False)


# -- commands ------------------------------------------------------------------------------------


def test_policies_are_compared(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shown = _run(
        *("simulate", "--num-requests", "40", "--rate", "4", "--instances", "2"),
        *("--policy", "round_robin,llumnix", "--out", str(tmp_path)),
    )
    for word in ("round_robin", "llumnix", "TTFT p99", "goodput/s", "instance-hours", "DistServe"):
        assert word in shown
    (path,) = tmp_path.glob("simulate_*.json")
    found = json.loads(path.read_text())
    assert found["is_complete"]
    assert len(found["results"]["4/s, llumnix"][0]["percentiles"]["ttft"]) == 101
    assert path.with_suffix(".png").is_file()


def test_roles_and_scaling(tmp_path: Path) -> None:
    load = ("--num-requests", "30", "--rate", "3")
    shown = _run(
        *("simulate", *load, "--roles", "prefill,decode", "--policy", "disaggregated"),
        *("--link-gbit", "0"),
    )
    assert "disaggregated" in shown
    shown = _run(
        *("simulate", *load, "--instances", "1", "--most-instances", "3", "--startup-s", "1"),
        *("--policy", "llumnix", "--capacity-tokens", "4000"),
    )
    assert "llumnix" in shown


def test_costs_come_from_measured_steps(tmp_path: Path) -> None:
    steps = [
        StepRecord(work, COST.step_s(work))
        for n in range(1, 40)
        for work in (StepWork(n, n * n), StepWork(num_decodes=n, context_tokens=n * n * 10))
    ]
    write_steps(tmp_path / "steps.jsonl", steps)
    shown = _run("simulate", "--num-requests", "5", "--steps", str(tmp_path / "steps.jsonl"))
    assert "Costs fitted to 78 steps" in shown


def test_a_placement_is_explained(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "places.png"
    shown = _run(
        *("place", "--workload", "sharegpt-turns", "--most-tokens", "2047"),
        *("--num-requests", "40", "--gpus-per-node", "2", "--tolerance", "1", "--plot", str(plot)),
    )
    assert "Best: " in shown
    assert "1 prefill (tp 1) + 1 decode (tp 1)" in shown
    assert "too slow first" in shown
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policies": ("fifo",)}, "policy is 'fifo'"),
        ({"policies": ()}, "policies is empty"),
        ({"roles": ("cook",)}, "roles has 'cook'"),
        ({"roles": ("prefill", "decode")}, "moves no computed prompt"),
        ({"rates": (0.0,)}, "none that is 0"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        SimulateOptions(**options)


def test_mistakes_of_a_search_are_named() -> None:
    with pytest.raises(InvalidConfig, match="kinds is 'none'"):
        PlaceOptions(kinds="none")
    with pytest.raises(InvalidConfig, match="affinity is 'medium'"):
        PlaceOptions(affinity="medium")
    with pytest.raises(InvalidConfig, match="cv 0"):
        Load(cv=0.0)
