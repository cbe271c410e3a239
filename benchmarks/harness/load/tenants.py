"""`vkv bench tenants`: what a light tenant gets beside a heavy one, by who is admitted first.

The light tenant's requests arrive alone, then beside another's, many times as many, in order of
arrival and fairly. All runs have the same requests at the same times.

Source: virtual token counters, arXiv:2401.00588, section 5.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ...runtime.frontend.llm import LLM
from ...runtime.frontend.progress import counted
from ..driver import Driver
from ..limits import LimitsProbe
from ..models.shapes import build_model
from ..record import Findings, Record, Table, record_name
from .client import RequestTrace, drive
from .options import TenantsOptions
from .workloads import WorkItem, gamma_arrivals, traffic

LIGHT, HEAVY = "light", "heavy"
_OUTPUT_WEIGHT = 2  # of a token in service, where one of a prompt counts 1


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        service: of each tenant in the time in which both had requests waiting or running.
    """

    way: str
    traces: dict[str, list[RequestTrace]]
    service: dict[str, float]


def run(options: TenantsOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    name = record_name("tenants", options.shape, options.label)
    record = Record(folder, name, device=options.device, config=asdict(options), command=command)
    model = build_model(options.shape, dtype=options.dtype, device=options.device)
    light, heavy = _loads(options, model.config.vocab_size)
    plan = [("alone", "fcfs", light)]
    plan += [(policy, policy, sorted([*light, *heavy])) for policy in ("fcfs", "fair")]
    cells: list[Cell] = []
    probe = LimitsProbe(options.device, options.dtype)

    def steps() -> Generator[None, None, None]:
        with counted("requests", sum(len(load) for _, _, load in plan)) as advance:
            for way, policy, load in plan:
                probe.measure()
                cells.append(_run(model, options, way, policy, load, advance))
                yield

    def findings() -> Findings:
        return Findings(
            results={"runs": [_as_record(cell) for cell in cells]},
            tables=[_table(cells)],
            draw=partial(_plot, cells),
        )

    return record.grow(steps(), findings, probe)


_Load = list[tuple[float, int, WorkItem]]  # when, which, what


def _loads(options: TenantsOptions, vocab_size: int) -> tuple[_Load, _Load]:
    """The requests of the light tenant and of the heavy one."""
    found = []
    for tenant, times in ((LIGHT, 1), (HEAVY, options.times)):
        count = options.num_requests * times
        seed = options.seed + times
        work = traffic(
            options.workload, count, scale=options.scale, vocab_size=vocab_size, seed=seed
        )
        arrivals = gamma_arrivals(count, rate=options.rate * times, seed=seed)
        pairs = zip(arrivals, work, strict=True)
        found.append([(at_s, times, replace(item, tenant=tenant)) for at_s, item in pairs])
    return found[0], found[1]


def _run(
    model: PreTrainedModel,
    options: TenantsOptions,
    way: str,
    policy: str,
    load: _Load,
    advance: Any,
) -> Cell:
    work = [item for _, _, item in load]
    with LLM(
        model,
        dtype=options.dtype,
        device=options.device,
        max_seqs=options.max_seqs,
        max_batch_tokens=options.max_batch_tokens,
        max_len=max(item.num_tokens for item in work),
        prefix_reuse=False,  # the prompts are random
        scheduling_policy=policy,
        pack_weights=True,  # as for a checkpoint
    ) as llm:
        driver = Driver(llm)
        drive(driver, [WorkItem(work[0].prompt[:16], 1)], [0.0])
        trace = drive(driver, work, [at_s for at_s, _, _ in load], on_finish=advance)
    traces: dict[str, list[RequestTrace]] = {}
    for item, request in zip(work, trace.requests, strict=True):
        traces.setdefault(item.tenant, []).append(request)
    return Cell(way, traces, _service(traces))


def _service(traces: dict[str, list[RequestTrace]]) -> dict[str, float]:
    """Weighted tokens of each tenant while all had requests that were not answered yet."""
    spans = [
        (min(r.arrival_s for r in some), max(r.token_times_s[-1] for r in some))
        for some in traces.values()
    ]
    start, stop = max(first for first, _ in spans), min(last for _, last in spans)
    return {
        tenant: sum(
            r.num_prompt_tokens * (start <= r.token_times_s[0] <= stop)
            + _OUTPUT_WEIGHT * sum(start <= at_s <= stop for at_s in r.token_times_s)
            for r in some
        )
        for tenant, some in traces.items()
    }


# -- results -----------------------------------------------------------------------------------


def _as_record(cell: Cell) -> dict[str, Any]:
    return {
        "way": cell.way,
        "service": cell.service,
        "ttfts_s": {tenant: [r.ttft_s for r in some] for tenant, some in cell.traces.items()},
        "e2es_s": {tenant: [r.e2e_s for r in some] for tenant, some in cell.traces.items()},
    }


def _table(cells: Sequence[Cell]) -> Table:
    alone = _percentile(cells[0].traces[LIGHT], 99)
    rows = []
    for cell in cells:
        for tenant, some in sorted(cell.traces.items()):
            median, last = _percentile(some, 50), _percentile(some, 99)
            of_alone = f"{last / alone:.2f}" if tenant == LIGHT else "–"
            total = sum(cell.service.values())
            share = f"{cell.service[tenant] / total:.0%}"
            row = [cell.way, tenant, f"{len(some)}", f"{median:.0f}", f"{last:.0f}"]
            rows.append([*row, of_alone, share])
    return Table(
        title="A light tenant beside a heavy one",
        columns=[
            *("admitted", "tenant", "requests", "TTFT p50, ms", "TTFT p99, ms"),
            *("of alone", "part of service while both have requests"),
        ],
        rows=rows,
    )


def _percentile(requests: Sequence[RequestTrace], percent: float) -> float:
    return float(np.percentile([request.ttft_s for request in requests], percent)) * 1e3


def _plot(cells: Sequence[Cell], path: Path) -> None:
    """How many first tokens took longer than so much."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8))
    axes = figure.subplots()
    for cell in cells:
        for tenant, some in cell.traces.items():
            ms = sorted(request.ttft_s * 1e3 for request in some)
            shares = [1 - index / len(ms) for index in range(len(ms))]
            axes.loglog(ms, shares, label=f"{tenant}, {cell.way}")
    axes.set_xlabel("time to the first token, ms")
    axes.set_ylabel("share that is longer")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
