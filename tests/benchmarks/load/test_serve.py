"""`vkv bench serve`: lengths, arrivals, the loop in (false) time, and the figures of a trace."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from vkv import LLM
from vkv.bench.driver import Driver, NewToken
from vkv.bench.load.client import RequestTrace, Trace, drive
from vkv.bench.load.options import Targets
from vkv.bench.load.serve import ServeOptions, run
from vkv.bench.load.serve_metrics import fastgen_metrics, vllm_metrics, worst_average_gap
from vkv.bench.load.workloads import TRAFFIC, WorkItem, gamma_arrivals, traffic
from vkv.vmem.errors import InvalidConfig

# -- lengths and arrivals ------------------------------------------------------------------------

_PUBLISHED = {  # mean, then P50/80/95/99, of prompts and of outputs
    "sharegpt": ((306, 74, 348, 1484, 3388), (500, 487, 781, 988, 1234)),
    "burstgpt": ((830, 582, 1427, 2345, 3549), (271, 243, 434, 669, 964)),
}


def _lengths(name: str, count: int, **options: Any) -> tuple[list[int], list[int]]:
    work = traffic(name, count, vocab_size=50, **options)
    return [len(item.prompt) for item in work], [item.num_output_tokens for item in work]


@pytest.mark.parametrize("name", _PUBLISHED)
@pytest.mark.parametrize("count", [400, 2000])
def test_lengths_have_the_published_mean_and_quantiles(name: str, count: int) -> None:
    for lengths, (mean, *quantiles) in zip(_lengths(name, count), _PUBLISHED[name], strict=True):
        assert statistics.fmean(lengths) == pytest.approx(mean, rel=0.02)
        assert np.percentile(lengths, [50, 80, 95, 99]) == pytest.approx(quantiles, rel=0.05)
        assert min(lengths) >= 1


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("fastgen-1200-60", (1200, 60)),
        ("fastgen-1200-128", (1200, 128)),
        ("fastgen-2600-60", (2600, 60)),
        ("fastgen-2600-128", (2600, 128)),
        ("arxiv", (29_600, 363)),
    ],
)
def test_other_lengths_are_normal_with_three_tenths_spread(
    name: str, means: tuple[int, int]
) -> None:
    for lengths, mean in zip(_lengths(name, 100), means, strict=True):
        assert statistics.fmean(lengths) == pytest.approx(mean, rel=0.02)
        assert statistics.pstdev(lengths) == pytest.approx(0.3 * mean, rel=0.05)


def test_scale_shrinks_lengths_and_nothing_else() -> None:
    whole, small = (_lengths("sharegpt", 300, scale=scale) for scale in (1.0, 0.25))
    for one, other in zip(whole, small, strict=True):
        assert [max(1, round(length / 4)) for length in one] == pytest.approx(other, abs=1)


def test_a_seed_gives_the_same_requests_and_another_does_not() -> None:
    first, again = (traffic("burstgpt", 20, vocab_size=50, seed=3) for _ in range(2))
    assert first == again
    assert first != traffic("burstgpt", 20, vocab_size=50, seed=4)
    assert len({item.num_tokens for item in first}) > 10
    # Prompts and outputs are shuffled apart: the longest prompt need not have the longest output.
    prompts, outputs = _lengths("burstgpt", 500)
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 0.2


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_arrivals_have_their_rate_and_variation(cv: float) -> None:
    arrivals = gamma_arrivals(20_000, rate=4.0, cv=cv, seed=1)
    gaps = np.diff([0.0, *arrivals])
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert arrivals == gamma_arrivals(20_000, rate=4.0, cv=cv, seed=1)


def test_poisson_arrivals_are_exponential() -> None:
    gaps = np.diff([0.0, *gamma_arrivals(20_000, rate=2.0)])
    assert np.mean(gaps > 0.5) == pytest.approx(np.exp(-1), abs=0.02)


# -- the loop ------------------------------------------------------------------------------------


class _Clock:
    """Time that goes on by sleeping, and by one second a step of the engine."""

    def __init__(self, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        step = driver.step

        def timed_step() -> list[NewToken]:
            self.now += 1.0
            return step()

        monkeypatch.setattr(driver, "step", timed_step)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def _work(*lengths: tuple[int, int]) -> list[WorkItem]:
    prompts = zoo.random_prompts([prompt for prompt, _ in lengths])
    return [
        WorkItem(tuple(prompt), output)
        for prompt, (_, output) in zip(prompts, lengths, strict=True)
    ]


def _drive(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, work: Sequence[WorkItem], arrivals: Sequence[float]
) -> tuple[Trace, _Clock]:
    driver = Driver(llm)
    clock = _Clock(driver, monkeypatch)
    finished: list[int] = []
    trace = drive(
        driver,
        work,
        arrivals,
        on_finish=lambda: finished.append(1),
        clock=clock,
        sleep=clock.sleep,
    )
    assert len(finished) == len(work)
    assert [len(r.token_times_s) for r in trace.requests] == [i.num_output_tokens for i in work]
    assert [r.num_prompt_tokens for r in trace.requests] == [len(item.prompt) for item in work]
    assert sum(trace.step_tokens) == sum(item.num_tokens - 1 for item in work)
    zoo.assert_idle(llm)
    return trace, clock


def test_requests_come_at_their_times_and_tokens_are_timed(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = _work((5, 3), (4, 1), (6, 2))
    trace, clock = _drive(llm, monkeypatch, work, [0.5, 1.0, 9.0])
    first, second, third = trace.requests
    assert [r.arrival_s for r in trace.requests] == [0.5, 1.0, 9.0]
    assert first.token_times_s == [1.5, 2.5, 3.5]
    assert second.token_times_s == [2.5]  # it came during the first step, and waited for its end
    assert third.token_times_s == [10.0, 11.0]
    assert clock.slept == [0.5, 5.5]
    assert trace.step_tokens == [5, 1 + 4, 1, 6, 1]
    assert trace.step_ends_s == [1.5, 2.5, 3.5, 10.0, 11.0]


def test_a_client_asks_again_when_it_has_its_answer(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = _work((5, 3), (4, 1), (6, 2), (3, 2))
    trace, clock = _drive(llm, monkeypatch, work, [0.0, 0.0])
    assert [r.arrival_s for r in trace.requests] == [0.0, 0.0, 1.0, 3.0]
    assert not clock.slept
    assert max(trace.step_tokens) == 9


def test_more_clients_than_requests_are_no_harm(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, _ = _drive(llm, monkeypatch, _work((5, 1), (4, 1)), [0.0] * 5)
    assert [r.arrival_s for r in trace.requests] == [0.0, 0.0]


# -- figures -------------------------------------------------------------------------------------


def _trace() -> Trace:
    return Trace(
        requests=[
            RequestTrace(512, 1.0, [1.5, 1.6, 1.8]),  # TTFT 500 ms, gaps 100 and 200 ms
            RequestTrace(100, 2.0, [2.3]),  # TTFT 300 ms, beyond 100/512 s
        ],
        step_tokens=[512, 1, 1, 100],
        step_ends_s=[1.5, 1.6, 1.8, 4.0],
    )


def test_the_figures_are_vllms() -> None:
    found = vllm_metrics(_trace(), Targets())
    assert found["completed"] == 2
    assert found["duration"] == 4.0
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (612, 4)
    assert found["request_throughput"] == found["request_goodput"] == 0.5
    assert found["output_throughput"] == 1.0
    assert found["total_token_throughput"] == 154.0
    expected = {"ttft": [500, 300], "tpot": [150], "itl": [100, 200], "e2el": [800, 300]}
    for name, ms in expected.items():
        assert found[f"mean_{name}_ms"] == pytest.approx(np.mean(ms))
        assert found[f"median_{name}_ms"] == pytest.approx(np.median(ms))
        assert found[f"std_{name}_ms"] == pytest.approx(np.std(ms))
        for percentile in (90, 95, 99):
            expected_ms = np.percentile(ms, percentile)
            assert found[f"p{percentile}_{name}_ms"] == pytest.approx(expected_ms)


@pytest.mark.parametrize(
    ("ttft", "tpot", "good"),
    [(500.1, None, 2), (400, None, 1), (None, 149, 1), (500.1, 150.1, 2), (200, 1000, 0)],
)
def test_goodput_counts_what_keeps_both_objectives(
    ttft: float | None, tpot: float | None, good: int
) -> None:
    found = vllm_metrics(_trace(), Targets(slo_ttft_ms=ttft, slo_tpot_ms=tpot))
    assert found["request_goodput"] == good / 4.0


def test_effective_throughput_needs_prompt_and_output_in_time() -> None:
    # The gaps' average is 100 ms, then 120: in time for 6 tokens a second, not for 9.
    found = fastgen_metrics(_trace(), Targets(prompt_rate=512, output_rates=(6, 9)))
    assert found["effective_throughput_6"] == 1 / 4.0
    assert found["effective_throughput_9"] == 0
    patient = fastgen_metrics(_trace(), Targets(prompt_rate=300, output_rates=(6,)))
    assert patient["effective_throughput_6"] == 2 / 4.0
    assert found["mean_step_tokens"] == 153.5
    assert found["std_step_tokens"] == pytest.approx(np.std([512, 1, 1, 100]))
    assert (found["steps"], found["max_step_tokens"]) == (4, 512)


def test_the_moving_average_forgives_a_single_pause_but_not_a_slow_stretch() -> None:
    assert worst_average_gap([]) == 0
    assert worst_average_gap([0.1, 0.6, 0.1]) == pytest.approx(0.2)
    assert worst_average_gap([0.1] + [0.6] * 20) == pytest.approx(0.6, abs=0.01)


# -- the command ---------------------------------------------------------------------------------


def _run(folder: Path, **options: Any) -> dict[str, Any]:
    path, tables = run(ServeOptions(**options), folder, "vkv bench serve")
    shown = path.with_suffix(".md").read_text()
    assert all(table.markdown() in shown for table in tables)
    assert path.with_suffix(".png").stat().st_size > 1000
    return json.loads(path.read_text())


def test_all_four_quadrants_by_both_policies(tmp_path: Path) -> None:
    record = _run(tmp_path, num_requests=5, clients=(3,), scale=0.05, budgets=(32,))
    runs = record["results"]["runs"]
    names = {(r["workload"], r["policy"]) for r in runs}
    assert len(names) == len(runs) == 8
    for one in runs:
        assert one["completed"] == 5
        assert sum(one["step_tokens"]) == sum(one["input_lens"]) + sum(one["output_lens"]) - 5
        assert 0 < one["median_ttft_ms"] <= one["p99_ttft_ms"]
        longest = max(one["input_lens"])
        if one["policy"] == "splitfuse":
            assert one["max_step_tokens"] <= 32 < longest
        else:
            assert one["max_step_tokens"] == longest
    for splitfuse, prefill_first in zip(runs[::2], runs[1::2], strict=True):
        assert splitfuse["workload"] == prefill_first["workload"]
        assert splitfuse["input_lens"] == prefill_first["input_lens"]
        assert splitfuse["output_lens"] == prefill_first["output_lens"]
    assert [table["title"] for table in record["tables"]][-1].startswith("SplitFuse to prefill")


def test_outputs_of_one_token_have_no_gaps(tmp_path: Path) -> None:
    record = _run(tmp_path, workloads=("fastgen-1200-60",), num_requests=2, scale=0.01)
    assert {n for run in record["results"]["runs"] for n in run["output_lens"]} == {1}


def test_rates_take_the_place_of_clients(tmp_path: Path) -> None:
    record = _run(
        tmp_path,
        workloads=("sharegpt",),
        rates=(200.0, 400.0),
        cv=2.0,
        num_requests=4,
        scale=0.02,
        policies=("splitfuse",),
    )
    slow, fast = record["results"]["runs"]
    assert (slow["load"], fast["load"]) == ("200/s Gamma, CV 2", "400/s Gamma, CV 2")
    assert slow["arrivals"] == pytest.approx([2 * second for second in fast["arrivals"]])
    assert len(record["tables"]) == 2


def test_budgets_are_compared_by_policy(tmp_path: Path) -> None:
    record = _run(
        tmp_path,
        workloads=("fastgen-2600-60",),
        clients=(3,),
        num_requests=4,
        scale=0.05,
        budgets=(32, 64),
    )
    runs = {(r["policy"], r["max_batch_tokens"]): r for r in record["results"]["runs"]}
    assert len(runs) == len(record["results"]["runs"]) == 4
    assert runs["splitfuse", 32]["max_step_tokens"] == 32
    assert runs["splitfuse", 64]["max_step_tokens"] == 64
    policies, budgets = record["tables"][2:]
    assert [row[2] for row in policies["rows"]] == ["splitfuse, 32", "splitfuse, 64"]
    assert budgets["title"].startswith("Other budgets to 32 tokens a step")
    assert [row[2] for row in budgets["rows"]] == ["splitfuse, 64", "prefill_first, 64"]
    small, large = runs["splitfuse", 32], runs["splitfuse", 64]
    ratio = large["p99_itl_ms"] / small["p99_itl_ms"]
    assert budgets["rows"][0][budgets["columns"].index("p99 ITL")] == f"{ratio:.2f}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workloads": ("wikipedia",)}, "'wikipedia'"),
        ({"workloads": ("arxiv",)}, "lower --scale"),
        ({"policies": ("fifo",)}, "'fifo'"),
        ({"workloads": ()}, "workloads is empty"),
        ({"policies": ()}, "policies is empty"),
        ({"clients": ()}, "clients is empty"),
        ({"num_requests": 0}, "must all be positive"),
        ({"rates": (0.0,)}, "must all be positive"),
        ({"budgets": (512, 0)}, "must all be positive"),
        ({"clients": (-1,)}, "must all be positive"),
    ],
)
def test_what_cannot_run_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=words):
        run(ServeOptions(**{"num_requests": 4, **options}), tmp_path, "")
    assert not list(tmp_path.iterdir())


def test_every_traffic_has_positive_lengths() -> None:
    for name in TRAFFIC:
        for lengths in _lengths(name, 30, scale=1e-6):
            assert min(lengths) == 1
