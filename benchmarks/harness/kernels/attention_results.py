"""What `vkv bench attention` measured: its table and plot."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..limits import Limits
from ..record import Table
from .attention_shapes import Shape


def attention_table(
    results: Sequence[Mapping[str, Any]],
    left_out: Sequence[Mapping[str, Any]],
    dtype: torch.dtype,
    limits: Limits,
) -> Table:
    """Times and ratios of each problem, and under them what was not measured, and why."""
    names = list(results[0]["layer_s"]) if results else []
    rows = []
    for cell in results:
        shape, times = Shape(**cell["shape"]), cell["layer_s"]
        ours = times[names[0]]
        seconds = statistics.median(ours)
        if shape.queries == 1:
            rate = shape.kv_bytes(dtype) / seconds
            reached = f"{rate / 1e9:.1f} GB/s, {rate / limits.read_bytes_per_s:.0%}"
        else:
            rate = shape.flops / seconds
            reached = f"{rate / 1e9:.0f} GFLOP/s, {rate / limits.flops_per_s:.0%}"
        others = [
            f"{statistics.median(b / a for a, b in zip(ours, times[name], strict=True)):.2f}"
            for name in names[1:]
        ]
        rows.append([str(shape), f"{seconds * 1e6:,.0f}", reached, *others])
    first = names[0] if names else "first"
    return Table(
        title=f"Attention of one layer in {str(dtype).removeprefix('torch.')}",
        columns=[
            "problem",
            f"{first}, µs",
            "reached, of the limit",
            *(f"{name}: times as long" for name in names[1:]),
        ],
        rows=rows,
        notes=[f"Left out: {Shape(**one['shape'])}: {one['why']}." for one in left_out],
    )


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars: each contestant's time over the first one's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.5 * len(results) + 2))
    axes = figure.subplots()
    names = list(results[0]["layer_s"]) if results else []
    for place, name in enumerate(names):
        axes.barh(
            [index + 0.8 * place / len(names) for index in range(len(results))],
            [
                statistics.median(cell["layer_s"][name])
                / statistics.median(cell["layer_s"][names[0]])
                for cell in results
            ],
            height=0.8 / len(names),
            label=name,
        )
    axes.set_yticks(
        [index + 0.4 for index in range(len(results))],
        [str(Shape(**cell["shape"])) for cell in results],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set_xlabel(f"time over that of {names[0]}" if names else "")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
