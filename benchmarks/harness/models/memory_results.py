"""What `vkv bench memory` sampled: its summary, tables and plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..record import Table

_COLOURS = {"virtual": "#0a7", "paged": "#57c", "static": "#c33", "dynamic": "#d90"}


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """Memory at one step, in bytes.

    Attributes:
        output_tokens: tokens generated so far.
        live_requests: requests that run.
        token_bytes: KV of their tokens.
        kv_bytes: memory that backs it, used or not.
        ahead_bytes: memory mapped ahead of their growth.
        parked_bytes: memory of finished requests, kept for the next.
        physical_bytes: all memory that exists for KV.
        virtual_bytes: address space reserved for it.
        rss_bytes: memory of the process, model and libraries included.
        driver_calls: system or driver calls so far, of all kinds.
        time_s: since the first request; 0 where no model runs.
    """

    output_tokens: int
    live_requests: int
    token_bytes: int
    kv_bytes: int
    ahead_bytes: int = 0
    parked_bytes: int = 0
    physical_bytes: int = 0
    virtual_bytes: int = 0
    rss_bytes: int = 0
    driver_calls: int = 0
    time_s: float = 0.0


@dataclass
class FinalUse:
    """What requests ended with, summed: bytes of their tokens, and the bytes that backed them."""

    token_bytes: int = 0
    kv_bytes: int = 0


Samples = Mapping[str, Sequence[MemorySample]]
"""Samples in the order of time, by kind of cache."""


def summarise(samples: Sequence[MemorySample], ends: FinalUse) -> dict[str, float]:
    live = [s for s in samples if s.live_requests]
    peak = max(samples, key=lambda s: s.kv_bytes)
    fullest = max(live, key=lambda s: s.token_bytes)
    return {
        "peak_kv_bytes": peak.kv_bytes,
        "peak_physical_bytes": max(s.physical_bytes for s in samples),
        "mean_kv_bytes": sum(s.kv_bytes for s in live) / len(live),
        "mean_waste": 1 - sum(s.token_bytes for s in live) / sum(s.kv_bytes for s in live),
        "waste_when_fullest": 1 - fullest.token_bytes / fullest.kv_bytes,
        "waste_at_the_end": 1 - ends.token_bytes / ends.kv_bytes,
    }


def steady_calls_per_token(samples: Sequence[MemorySample]) -> float:
    """Driver calls for each output token, once half of the tokens have come."""
    last = samples[-1]
    half = next(s for s in samples if 2 * s.output_tokens >= last.output_tokens)
    if half is last:  # a single step
        return 0.0
    num_tokens = last.output_tokens - half.output_tokens
    return (last.driver_calls - half.driver_calls) / max(1, num_tokens)


def return_time_s(last: MemorySample, rest: Sequence[MemorySample]) -> float | None:
    """Seconds from the last step of the work until memory was back; None if none came back."""
    least = rest[-1].physical_bytes
    if least >= last.physical_bytes:
        return None
    return next(s for s in rest if s.physical_bytes <= least).time_s - last.time_s


def columns(samples: Sequence[MemorySample]) -> dict[str, list[float]]:
    """A list for each field, one number a step."""
    names = [field.name for field in fields(MemorySample)]
    return {name: [getattr(sample, name) for sample in samples] for name in names}


def memory_table(summary: dict[str, dict[str, float]]) -> Table:
    rows = []
    for kind, row in summary.items():
        rows.append(
            [
                kind,
                f"{row['peak_kv_bytes'] / 2**20:.1f}",
                f"{row['mean_kv_bytes'] / 2**20:.1f}",
                f"{row['peak_physical_bytes'] / 2**20:.1f}",
                f"{row['mean_waste']:.1%}",
                f"{row['waste_when_fullest']:.1%}",
                f"{row['waste_at_the_end']:.1%}",
            ]
        )
    return Table(
        title="KV memory",
        columns=[
            "cache",
            "peak KV, MiB",
            "mean KV, MiB",
            "peak physical, MiB",
            "mean waste",
            "waste when fullest",
            "never used",
        ],
        rows=rows,
    )


def engine_table(engines: dict[str, dict[str, Any]]) -> Table:
    return Table(
        title="The engine",
        columns=[
            "cache",
            "row, tokens",
            "worst waste, rows a request",
            "steps",
            "step time, s",
            "mapping, share of step",
            "mapped in background, s",
            "driver calls a token, steady",
            "MiB before rest",
            "MiB after rest",
            "s to memory returned (waited)",
        ],
        rows=[
            [
                kind,
                str(e["growth_tokens"]),
                f"{e['worst_waste_rows_per_request']:.2f}",
                str(e["num_steps"]),
                f"{e['step_time_s']:.1f}",
                f"{e['mapping_share']:.2%}",
                f"{e['background_time_s']:.2f}",
                f"{e['steady_driver_calls_per_token']:.3f}",
                f"{e['physical_bytes_before_rest'] / 2**20:.1f}",
                f"{e['physical_bytes_after_rest'] / 2**20:.1f}",
                "stays"
                if e["return_time_s"] is None
                else f"{e['return_time_s']:.3f} ({e['idle_s']:g})",
            ]
            for kind, e in engines.items()
        ],
    )


def draw(samples: Samples, rest: Samples, *, title: str, path: Path) -> None:
    """Memory against output tokens for every kind, and against time where a model ran."""
    from matplotlib.figure import Figure

    timed = [kind for kind in samples if kind in rest]
    figure = Figure(figsize=(10, 9 if timed else 4.5))
    panels = figure.subplots(2 if timed else 1, squeeze=False)[:, 0]
    _draw_against_tokens(panels[0], samples)
    panels[0].set_title(title)
    if timed:
        _draw_against_time(panels[1], {kind: samples[kind] for kind in timed}, rest)
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _draw_against_tokens(axes: Any, samples: Samples) -> None:
    for kind, rows in samples.items():
        x = [row.output_tokens for row in rows]
        axes.plot(x, [_mib(r.kv_bytes) for r in rows], label=kind, color=_COLOURS[kind])
        if kind == "virtual":
            held = [_mib(r.token_bytes) for r in rows]
            axes.fill_between(x, held, color="#0a7", alpha=0.2, label="tokens held (virtual)")
    axes.set_xlabel("output tokens so far")
    axes.set_ylabel("KV memory of live requests, MiB")


def _draw_against_time(axes: Any, samples: Samples, rest: Samples) -> None:
    """Address space, physical memory and its tokens, and what the process grew by."""
    for kind, work in samples.items():
        rows = [*work, *rest[kind]]
        x, colour = [row.time_s for row in rows], _COLOURS[kind]
        physical = [_mib(row.physical_bytes) for row in rows]
        axes.plot(x, physical, color=colour, label=f"{kind}: physical")
        axes.axvline(work[-1].time_s, color=colour, linewidth=0.7, linestyle="--")
        if kind == "virtual":
            space = [_mib(row.virtual_bytes) for row in rows]
            grown = [_mib(row.rss_bytes - rows[0].rss_bytes) for row in rows]
            held = [_mib(row.token_bytes) for row in rows]
            axes.plot(x, space, color="#888", label="virtual: address space")
            axes.plot(x, grown, color="#555", linestyle=":", label="virtual: process growth")
            axes.fill_between(x, held, color=colour, alpha=0.2, label="virtual: tokens held")
    axes.set_xlabel("seconds; dashed: the last request ends, and the engine rests")
    axes.set_ylabel("MiB")


def _mib(num_bytes: int) -> float:
    return num_bytes / 2**20
