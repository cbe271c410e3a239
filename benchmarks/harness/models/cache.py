"""`vkv bench cache`: `VirtualCache` against the caches of `transformers`, under its own generate.

Every figure comes from a fresh process (`workers/cache_worker.py`), the caches taking turns. A
cache is filled with random keys and values through its `update`, as the model would, and then
`model.generate` decodes: a long prompt through the model would take minutes and leave the same
memory. Prompts up to `max_prefill` tokens do go through the model, and are timed.

Memory is what the process has resident beyond the loaded and warm model, at its highest.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...vmem.errors import InvalidConfig
from ..limits import LimitsProbe
from ..peers.peer import WORKERS
from ..record import Findings, Record, Table, record_name
from .checkpoints import cache_bytes_per_token
from .options import CacheOptions
from .shapes import build_model

KINDS = ("virtual", "virtual-vkv", "dynamic", "static")
"""`virtual-vkv`: with the model's attention named `vkv`; the others with `transformers`' own."""

_WORKER = WORKERS / "cache_worker.py"
_COLOURS = {"virtual": "#0a7", "virtual-vkv": "#06c", "dynamic": "#d90", "static": "#c33"}


Cell = dict[str, Any]
"""`batch`, `context`, `token_bytes`, and `runs`: the answers of the workers, by kind."""


def run(options: CacheOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path.

    Raises InvalidConfig for a kind that there is not, RuntimeError if a process fails.
    """
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        raise InvalidConfig(f"{', '.join(unknown)}: use some of {', '.join(KINDS)}")
    dtype, device = getattr(torch, options.dtype), torch.device("cpu")
    name = record_name("cache", options.shape)
    record = Record(folder, name, device=device, config=asdict(options), command=command)
    probe = LimitsProbe(device, dtype, threads=options.threads)
    cells: list[Cell] = []

    def steps() -> Generator[None, None, None]:
        with tempfile.TemporaryDirectory(prefix="vkv-bench-") as scratch:
            model = build_model(options.shape, dtype=dtype, device=device, seed=options.seed)
            token_bytes = cache_bytes_per_token(model, dtype)
            model.save_pretrained(scratch)
            del model
            yield from _measure(options, scratch, token_bytes, probe, cells)

    def findings() -> Findings:
        return Findings(
            results={"cells": cells},
            tables=[_time_table(cells, options.kinds), _memory_table(cells, options.kinds)],
            draw=partial(_plot, cells, options.kinds),
        )

    return record.grow(steps(), findings, probe)


def _measure(
    options: CacheOptions, model: str, token_bytes: int, probe: LimitsProbe, cells: list[Cell]
) -> Generator[None, None, None]:
    """Fill `cells`, a problem at a time, with an answer of each kind."""
    console = Console(stderr=True)
    for repeat in range(options.repeats):
        probe.measure()
        for index, (batch, context) in enumerate(options.problems):
            cell: Cell = {"batch": batch, "context": context, "token_bytes": token_bytes}
            answers = {kind: _ask(options, model, cell, kind) for kind in options.kinds}
            for kind, answer in answers.items():
                console.print(
                    f"{repeat + 1}/{options.repeats}  {_name(cell)}  {kind}: "
                    f"{statistics.median(answer['token_s']) * 1e3:.1f} ms a token, "
                    f"{answer['peak_bytes'] / 2**20:.0f} MiB",
                    highlight=False,
                )
            if repeat == 0:
                cells.append(cell | {"runs": {kind: [] for kind in options.kinds}})
            for kind, answer in answers.items():
                cells[index]["runs"][kind].append(answer)
            yield


def _ask(options: CacheOptions, model: str, cell: Cell, kind: str) -> dict[str, Any]:
    wanted = {
        "model": model,
        "kind": kind,
        "dtype": options.dtype,
        "threads": options.threads,
        "batch": cell["batch"],
        "context": cell["context"],
        "steps": options.steps,
        "prefill": cell["batch"] * cell["context"] <= options.max_prefill,
    }
    done = subprocess.run(
        [sys.executable, str(_WORKER), json.dumps(wanted)],
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise RuntimeError(f"the process of the {kind} cache ended: {last}")
    return json.loads(done.stdout.splitlines()[-1])


# -- results ---------------------------------------------------------------------------------


def _name(cell: Cell) -> str:
    return f"{cell['batch']} x {cell['context']:,}"


def _token_ms(cell: Cell, kind: str) -> float:
    return statistics.median(t for run in cell["runs"][kind] for t in run["token_s"]) * 1e3


def _peak_mib(cell: Cell, kind: str) -> float:
    return max(run["peak_bytes"] for run in cell["runs"][kind]) / 2**20


def _prefill_ms(cell: Cell, kind: str) -> float | None:
    times = [run["prefill_s"] for run in cell["runs"][kind] if "prefill_s" in run]
    return statistics.median(times) * 1e3 if times else None


def _time_table(cells: Sequence[Cell], kinds: Sequence[str]) -> Table:
    rows: list[list[str]] = []
    for cell in cells:
        row = [_name(cell)]
        row += [f"{_token_ms(cell, kind):.1f}" for kind in kinds]
        row += [f"{_token_ms(cell, kind) / _token_ms(cell, kinds[0]):.2f}" for kind in kinds[1:]]
        for kind in kinds:
            prefill = _prefill_ms(cell, kind)
            row.append("" if prefill is None else f"{prefill:,.0f}")
        rows.append(row)
    return Table(
        title="A decoded token, and a prompt (medians)",
        columns=[
            "batch x context",
            *(f"{kind}, ms a token" for kind in kinds),
            *(f"{kind}: times as long" for kind in kinds[1:]),
            *(f"{kind}, ms a prompt" for kind in kinds),
        ],
        rows=rows,
    )


def _memory_table(cells: Sequence[Cell], kinds: Sequence[str]) -> Table:
    def held(cell: Mapping[str, Any]) -> float:
        return cell["batch"] * cell["context"] * cell["token_bytes"] / 2**20

    return Table(
        title="Peak memory beyond the model, filled and decoding",
        columns=[
            "batch x context",
            "keys and values, MiB",
            *(f"{kind}, MiB" for kind in kinds),
        ],
        rows=[
            [_name(c), f"{held(c):.0f}", *(f"{_peak_mib(c, kind):.0f}" for kind in kinds)]
            for c in cells
        ],
    )


def _plot(cells: Sequence[Cell], kinds: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for axes, value, label in (
        (left, _token_ms, "ms a decoded token"),
        (right, _peak_mib, "peak memory beyond the model, MiB"),
    ):
        for place, kind in enumerate(kinds):
            axes.bar(
                [index + 0.8 * (place + 0.5) / len(kinds) for index in range(len(cells))],
                [value(cell, kind) for cell in cells],
                width=0.8 / len(kinds),
                label=kind,
                color=_COLOURS[kind],
            )
        axes.set_xticks(
            [index + 0.4 for index in range(len(cells))], [_name(cell) for cell in cells]
        )
        axes.set_ylabel(label)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
