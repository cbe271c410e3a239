"""`vkv bench serve`: latency and throughput while requests arrive, in this process.

With servers to drive it is `http_serve` that runs.

The lengths of published traces, arriving at a rate or from clients that wait for their answers,
run through the engine once for each scheduling policy, SplitFuse and prefill-first to compare
with, and for each budget of tokens a step. All get the same requests at the same times.
"""

import itertools
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...runtime.frontend.llm import LLM
from ...runtime.frontend.progress import counted
from ...vmem.errors import InvalidConfig
from ..driver import Driver
from ..limits import LimitsProbe
from ..models.shapes import build_model
from ..record import Findings, Record, Table, record_name
from .client import Trace, drive
from .options import ServeOptions, Targets
from .serve_metrics import fastgen_metrics, vllm_metrics
from .workloads import FASTGEN, WorkItem, gamma_arrivals, traffic

_RATIOS = {  # of one run to another
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "median TTFT",
    "p99_ttft_ms": "p99 TTFT",
    "p95_itl_ms": "p95 ITL",
    "p99_itl_ms": "p99 ITL",
    "std_step_tokens": "sd of step size",
}


@dataclass(frozen=True)
class Cell:
    """One run: a workload under a load, by a policy with so many tokens a step."""

    workload: str
    load: str
    policy: str
    budget: int
    trace: Trace
    metrics: Mapping[str, float]

    @property
    def way(self) -> str:
        """How it was scheduled, in words."""
        return f"{self.policy}, {self.budget}"


def run(options: ServeOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    if options.servers or options.peers:
        from .http_serve import run as run_over_http

        return run_over_http(options, folder, command)
    name = record_name("serve", options.shape, options.label)
    record = Record(folder, name, device=options.device, config=asdict(options), command=command)
    model = build_model(options.shape, dtype=options.dtype, device=options.device)
    works = works_of(options, model.config.vocab_size, model.config.max_position_embeddings)
    loads = loads_of(options)
    plan = list(itertools.product(works, loads, options.policies, options.budgets or (None,)))
    cells: list[Cell] = []
    probe = LimitsProbe(options.device, options.dtype)

    def steps() -> Generator[None, None, None]:
        with counted("requests", len(plan) * options.num_requests) as advance:
            for workload, load, policy, budget in plan:
                probe.measure()
                trace, more = _serve(
                    model, works[workload], loads[load], options, policy, budget, advance
                )
                metrics = vllm_metrics(trace, options.targets)
                metrics |= fastgen_metrics(trace, options.targets) | more
                tokens = int(more["max_batch_tokens"])
                cells.append(Cell(workload, load, policy, tokens, trace, metrics))
                yield

    def findings() -> Findings:
        return Findings(
            results={"runs": [_as_record(cell) for cell in cells]},
            tables=_tables(cells, options),
            draw=partial(_plot, cells),
        )

    return record.grow(steps(), findings, probe)


def works_of(
    options: ServeOptions, vocab_size: int, max_positions: int
) -> dict[str, list[WorkItem]]:
    """The requests of each workload. Raises InvalidConfig for one that is too long."""
    works = {
        name: traffic(
            name,
            options.num_requests,
            scale=options.scale,
            vocab_size=vocab_size,
            seed=options.seed,
        )
        for name in _expanded(options.workloads)
    }
    for name, work in works.items():
        _check_lengths(name, work, max_positions)
    return works


def _expanded(workloads: Sequence[str]) -> list[str]:
    return [
        name
        for workload in workloads
        for name in (FASTGEN if workload == "fastgen" else [workload])
    ]


def _check_lengths(name: str, work: Sequence[WorkItem], max_positions: int) -> None:
    longest = max(item.num_tokens for item in work)
    if longest > max_positions:
        raise InvalidConfig(
            f"a request of {name} has {longest} tokens, and the shape takes {max_positions}; "
            f"lower --scale to {max_positions / longest:.2g} of what it is"
        )


def loads_of(options: ServeOptions) -> dict[str, list[float]]:
    """When requests arrive, by the name of the load; see `drive` for those that follow."""
    if not options.rates:
        return {f"{clients} clients": [0.0] * clients for clients in options.clients}
    kind = "Poisson" if options.cv == 1 else f"Gamma, CV {options.cv:g}"
    return {
        f"{rate:g}/s {kind}": gamma_arrivals(
            options.num_requests, rate=rate, cv=options.cv, seed=options.seed
        )
        for rate in options.rates
    }


def _serve(
    model: PreTrainedModel,
    work: Sequence[WorkItem],
    arrivals_s: Sequence[float],
    options: ServeOptions,
    policy: str,
    budget: int | None,
    advance: Any,
) -> tuple[Trace, dict[str, float]]:
    """One run on an engine of its own, warmed up by a short request."""
    with LLM(
        model,
        dtype=options.dtype,
        device=options.device,
        max_seqs=options.max_seqs,
        max_len=max(item.num_tokens for item in work),
        max_batch_tokens=budget,
        prefix_reuse=False,  # the prompts are random
        policy=policy,
        pack_weights=True,  # as for a checkpoint
    ) as llm:
        driver = Driver(llm)
        drive(driver, [WorkItem(work[0].prompt[:16], 1)], [0.0])
        before = llm.stats()
        trace = drive(driver, work, arrivals_s, on_finish=advance)
        stats = llm.stats()
        resolved = driver.max_batch_tokens
    return trace, {
        "max_batch_tokens": resolved,
        "num_preemptions": stats.num_preemptions,
        "mapping_share": (stats.mapping_time_s - before.mapping_time_s)
        / (stats.step_time_s - before.step_time_s),
    }


# -- results -----------------------------------------------------------------------------------


def _as_record(cell: Cell) -> dict[str, Any]:
    """Metrics, and the raw samples in seconds, under the names that vLLM gives them."""
    requests = cell.trace.requests
    return {
        "workload": cell.workload,
        "load": cell.load,
        "policy": cell.policy,
        **cell.metrics,
        "input_lens": [request.num_prompt_tokens for request in requests],
        "output_lens": [len(request.token_times_s) for request in requests],
        "arrivals": [request.arrival_s for request in requests],
        "ttfts": [request.ttft_s for request in requests],
        "itls": [request.gaps_s for request in requests],
        "step_tokens": cell.trace.step_tokens,
        "step_ends": cell.trace.step_ends_s,
    }


def _tables(cells: Sequence[Cell], options: ServeOptions) -> list[Table]:
    tables = [_latency_table(cells), _throughput_table(cells, options.targets)]
    first = cells[0].budget
    return [
        *tables,
        *_ratio_table(
            "SplitFuse to prefill-first, ratios of the same run",
            cells,
            is_baseline=lambda cell: cell.policy == "prefill_first",
            alike=lambda cell: (cell.workload, cell.load, cell.budget),
        ),
        *_ratio_table(
            f"Other budgets to {first} tokens a step, ratios of the same run",
            cells,
            is_baseline=lambda cell: cell.budget == first,
            alike=lambda cell: (cell.workload, cell.load, cell.policy),
        ),
    ]


def _latency_table(cells: Sequence[Cell]) -> Table:
    shown = {
        "TTFT": ("median_ttft_ms", "p99_ttft_ms"),
        "TPOT": ("median_tpot_ms", "p99_tpot_ms"),
        "ITL": ("median_itl_ms", "p95_itl_ms", "p99_itl_ms"),
    }
    return Table(
        title="Latency, ms",
        columns=["workload", "load", "policy, budget"]
        + [f"{what} {field.split('_')[0]}" for what, fields in shown.items() for field in fields],
        rows=[
            [cell.workload, cell.load, cell.way]
            + [
                f"{cell.metrics[field]:.1f}" if field in cell.metrics else "–"
                for fields in shown.values()
                for field in fields
            ]
            for cell in cells
        ],
    )


def _throughput_table(cells: Sequence[Cell], targets: Targets) -> Table:
    columns = {
        "request_throughput": "requests/s",
        "request_goodput": "goodput, requests/s",
        "output_throughput": "output tokens/s",
        "total_token_throughput": "all tokens/s",
        **{f"effective_throughput_{r:g}": f"effective at {r:g}/s" for r in targets.output_rates},
        "mean_step_tokens": "tokens a step",
        "std_step_tokens": "their sd",
        "max_step_tokens": "their most",
    }
    if targets.slo_ttft_ms is targets.slo_tpot_ms is None:
        del columns["request_goodput"]
    return Table(
        title="Throughput and size of steps",
        columns=["workload", "load", "policy, budget", *columns.values()],
        rows=[
            [cell.workload, cell.load, cell.way]
            + [_rounded(cell.metrics[name]) for name in columns]
            for cell in cells
        ],
    )


def _rounded(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _ratio_table(
    title: str,
    cells: Sequence[Cell],
    *,
    is_baseline: Callable[[Cell], bool],
    alike: Callable[[Cell], Hashable],
) -> list[Table]:
    """Figures over those of the baseline that is `alike`; no table where none is."""
    baseline = {alike(cell): cell.metrics for cell in cells if is_baseline(cell)}
    rows = []
    for cell in cells:
        other = baseline.get(alike(cell))
        if other is not None and not is_baseline(cell):
            ratios = [
                f"{cell.metrics[name] / other[name]:.2f}" if other.get(name) else "–"
                for name in _RATIOS
            ]
            rows.append([cell.workload, cell.load, cell.way, *ratios])
    columns = ["workload", "load", "policy, budget", *_RATIOS.values()]
    return [Table(title=title, columns=columns, rows=rows)] if rows else []


def _plot(cells: Sequence[Cell], path: Path) -> None:
    """For each workload: how many gaps are longer than so much, and the size of each step."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(cell.workload for cell in cells))
    figure = Figure(figsize=(max(6, 4.2 * len(workloads)), 7.5))
    panels = figure.subplots(2, len(workloads), squeeze=False)
    for column, workload in enumerate(workloads):
        gaps, steps = panels[0, column], panels[1, column]
        scale = "linear"  # of no gaps at all, where every output is one token
        for cell in (cell for cell in cells if cell.workload == workload):
            label = f"{cell.way}, {cell.load}"
            ms = sorted(gap * 1e3 for r in cell.trace.requests for gap in r.gaps_s)
            scale = "log" if ms else scale
            gaps.plot(ms, [1 - index / len(ms) for index in range(len(ms))], label=label)
            steps.plot(cell.trace.step_ends_s, cell.trace.step_tokens, ".", markersize=3)
        gaps.set_title(workload)
        gaps.set_xscale(scale)
        gaps.set_yscale(scale)
        gaps.set_xlabel("inter-token gap, ms")
        gaps.set_ylabel("share of gaps that are longer")
        steps.set_xlabel("s")
        steps.set_ylabel("tokens of a step")
    panels[0, 0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
