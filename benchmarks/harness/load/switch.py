"""`vkv bench switch`: what it takes to have requests give way to each other and come back.

The same conversations and changes of priority run through each system: computing again what gave
way, copying it block by block while all wait (as vLLM 0.3.3 did), and copying it in one stretch a
range, at once or beside the steps, with and without keeping the copies.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ...runtime.engine.stats import EngineStats
from ...runtime.frontend.llm import LLM
from ...runtime.frontend.progress import counted
from ..driver import Driver
from ..limits import LimitsProbe
from ..models.shapes import build_model
from ..record import Findings, Record, Table, record_name
from .client import Trace
from .conversations import Conversation, conversations, converse, priority_changes
from .options import SwitchOptions

_SHARES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}


@dataclass(frozen=True)
class Way:
    """How requests that give way come back.

    Attributes:
        swaps: by copies; else they are computed again.
        kv: where keys and values are.
        asynchronous, reuses: as of `Swapping`.
        always: copy, whatever computing would take.
    """

    swaps: bool = True
    kv: str = "virtual"
    asynchronous: bool = False
    reuses: bool = True
    always: bool = True


WAYS: Mapping[str, Way] = {
    "recompute": Way(swaps=False),
    "blocks": Way(kv="paged", reuses=False),
    "whole": Way(reuses=False),
    "whole-reuse": Way(),
    "beside": Way(asynchronous=True, reuses=False),
    "beside-reuse": Way(asynchronous=True),
    "vkv": Way(asynchronous=True, always=False),
}


@dataclass(frozen=True)
class Cell:
    """One run of one system."""

    way: str
    changes: str
    trace: Trace
    metrics: Mapping[str, float]


def run(options: SwitchOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    name = record_name("switch", options.shape, options.label)
    record = Record(folder, name, device=options.device, config=asdict(options), command=command)
    model = build_model(options.shape, dtype=options.dtype, device=options.device)
    work = conversations(
        options.num_conversations,
        rate=options.rate,
        mean_turns=options.mean_turns,
        pause_s=options.pause_s,
        scale=options.scale,
        max_len=options.max_len,
        vocab_size=model.config.vocab_size,
        seed=options.seed,
    )
    plan = [
        (way, changes)
        for _ in range(options.repeats)
        for changes in options.changes
        for way in options.ways
    ]
    cells: list[Cell] = []
    probe = LimitsProbe(options.device, options.dtype)

    def steps() -> Generator[None, None, None]:
        num_turns = sum(len(one.turns) for one in work)
        with counted("turns", len(plan) * num_turns) as advance:
            for way, changes in plan:
                probe.measure()
                cells.append(_run(model, work, options, way, changes, advance))
                yield

    def findings() -> Findings:
        return Findings(
            results={"runs": [_as_record(cell) for cell in cells]},
            tables=[_latency_table(cells), _moves_table(cells)],
            draw=partial(_plot, cells),
        )

    return record.grow(steps(), findings, probe)


def _run(
    model: PreTrainedModel,
    work: Sequence[Conversation],
    options: SwitchOptions,
    name: str,
    changes: str,
    advance: Any,
) -> Cell:
    """One run on an engine of its own, warmed up by a short request."""
    way = WAYS[name]
    with LLM(
        model,
        dtype=options.dtype,
        device=options.device,
        max_seqs=options.max_seqs,
        max_len=options.max_len,
        kv_memory=options.kv_memory,
        swap_memory=options.swap_memory if way.swaps else None,
        kv=way.kv,
        scheduling_policy="priority",
        priority_aging_s=None,
        pack_weights=True,  # as for a checkpoint
    ) as llm:
        driver = Driver(llm)
        driver.submit("warm up", work[0].turns[0].tokens[:16], 2)
        driver.finish_all()
        if way.swaps:
            driver.swap(asynchronous=way.asynchronous, always=way.always, reuses=way.reuses)
        before, computed = driver.stats(), driver.num_computed_tokens
        trace = converse(
            driver,
            work,
            priority_changes(changes, len(work), seed=options.seed),
            steps_between=round(1 / options.frequency),
            on_turn=advance,
        )
        stats = driver.stats()
    num_computed = driver.num_computed_tokens - computed
    return Cell(name, changes, trace, _metrics(trace, before, stats, num_computed))


def _metrics(
    trace: Trace, before: EngineStats, stats: EngineStats, num_computed: int
) -> dict[str, float]:
    num_output = sum(len(request.token_times_s) for request in trace.requests)
    found: dict[str, float] = {
        "duration_s": trace.duration_s,
        "num_turns": len(trace.requests),
        "output_throughput": num_output / trace.duration_s,
        "num_preemptions": stats.num_preemptions - before.num_preemptions,
        "num_computed_tokens": num_computed,
    }
    times = {
        "ttft": [request.ttft_s for request in trace.requests],
        "tbt": [gap for request in trace.requests for gap in request.gaps_s],
    }
    for name, seconds in times.items():
        for share, percent in _SHARES.items():
            found[f"{share}_{name}_ms"] = float(np.percentile(seconds, percent)) * 1e3
    if stats.swap is not None and before.swap is not None:
        found["stall_share"] = (stats.swap.stall_s - before.swap.stall_s) / trace.duration_s
        for kind in ("stored", "fetched"):
            moved = getattr(stats.swap, kind)
            for field in ("num_moves", "num_copies", "num_bytes", "num_tokens", "time_s"):
                found[f"{kind}_{field}"] = getattr(moved, field)
    return found


# -- results -----------------------------------------------------------------------------------


def _as_record(cell: Cell) -> dict[str, Any]:
    requests = cell.trace.requests
    return {
        "way": cell.way,
        "changes": cell.changes,
        **cell.metrics,
        "prompt_tokens": [request.num_prompt_tokens for request in requests],
        "arrivals_s": [request.arrival_s for request in requests],
        "ttfts_s": [request.ttft_s for request in requests],
        "gaps_s": [request.gaps_s for request in requests],
    }


def _latency_table(cells: Sequence[Cell]) -> Table:
    columns = [
        *(f"{share}_ttft_ms" for share in _SHARES),
        *(f"{share}_tbt_ms" for share in ("p99", "p99.9")),
    ]
    return Table(
        title="Latency, ms, and tokens a second",
        columns=["priorities", "system"]
        + [name.removesuffix("_ms").replace("_", " ").replace("t t", "t T") for name in columns]
        + ["output tokens/s", "preemptions", "tokens computed"],
        rows=[
            [cell.changes, cell.way]
            + [f"{cell.metrics[name]:.0f}" for name in columns]
            + [
                f"{cell.metrics['output_throughput']:.1f}",
                f"{cell.metrics['num_preemptions']:.0f}",
                f"{cell.metrics['num_computed_tokens']:.0f}",
            ]
            for cell in cells
        ],
    )


def _moves_table(cells: Sequence[Cell]) -> Table:
    rows = []
    for cell in cells:
        row = [cell.changes, cell.way]
        for kind in ("stored", "fetched"):
            num_moves = cell.metrics.get(f"{kind}_num_moves", 0)
            row.append(f"{num_moves:.0f}")
            for field, unit in (("num_copies", 1.0), ("num_bytes", 2.0**20)):
                total = cell.metrics.get(f"{kind}_{field}", 0)
                row.append(f"{total / num_moves / unit:.1f}" if num_moves else "–")
        row.append(f"{cell.metrics.get('stall_share', 0):.2%}")
        rows.append(row)
    return Table(
        title="What was copied",
        columns=[
            *("priorities", "system", "there", "copies each", "MiB each"),
            *("back", "copies each", "MiB each", "share of time that steps waited"),
        ],
        rows=rows,
    )


def _plot(cells: Sequence[Cell], path: Path) -> None:
    """How many first tokens, and how many gaps, took longer than so much."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8))
    first, gaps = figure.subplots(1, 2)
    for cell in cells:
        samples = (
            (first, [request.ttft_s for request in cell.trace.requests]),
            (gaps, [gap for request in cell.trace.requests for gap in request.gaps_s]),
        )
        for axes, seconds in samples:
            ms = sorted(s * 1e3 for s in seconds)
            shares = [1 - index / len(ms) for index in range(len(ms))]
            axes.loglog(ms, shares, label=f"{cell.way}, {cell.changes}")
    first.set_xlabel("time to the first token, ms")
    gaps.set_xlabel("time between tokens, ms")
    first.set_ylabel("share that is longer")
    first.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
