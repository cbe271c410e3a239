"""`vkv bench chains`: fine-tunes that share most blocks, in one engine and in one process each.

The same requests arrive at the same times for a base and its fine-tunes: at one engine that runs
all of them together, at an engine a model, all of which share the machine, and, all for the base,
at one engine that has the base alone. The ways take turns, and none is open beside another.

Source: BlockLLM, arXiv:2404.18322, section 7, whose P95 latency is 33.5 % below that of one
deployment a model.
"""

import shutil
import statistics
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ...runtime.blocks.zoo import BlockZoo
from ...runtime.frontend.progress import counted
from ..limits import LimitsProbe
from ..models.shapes import build_model
from ..options import torch_dtype
from ..record import Findings, Record, Table, record_name
from .chain_workers import Answer, Load, Order, Workers, workers
from .client import RequestTrace
from .options import ChainsOptions
from .workloads import WorkItem, gamma_arrivals, ragged

BASE = "base"
TOGETHER, APART, ALONE = "one engine", "a process a model", "the base alone"
_WAYS = (TOGETHER, APART, ALONE)
_PAPERS = -0.335  # of P95 latency


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of all requests, in one way.

    Attributes:
        e2es_s: from arrival to the last token, of each request.
        time_s: from the first arrival to the last token of all.
        pss_bytes: of all processes of the way.
        block_bytes, rows_per_call: of the fine-tunes' own blocks, as of `Answer`.
    """

    way: str
    repeat: int
    e2es_s: list[float]
    ttfts_s: list[float]
    time_s: float
    num_tokens: int
    pss_bytes: int
    block_bytes: int
    rows_per_call: float


def run(options: ChainsOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path.

    Raises InvalidConfig if an option is out of range.
    """
    cpu = torch.device("cpu")
    name = record_name("chains", options.shape, options.label)
    record = Record(folder, name, device=cpu, config=asdict(options), command=command)
    probe = LimitsProbe(cpu, torch.float32)
    cells: list[Cell] = []
    sizes: dict[str, int] = {}

    def steps() -> Generator[None, None, None]:
        with tempfile.TemporaryDirectory() as scratch:
            zoo = _save_zoo(options, Path(scratch))
            size = zoo.size()
            sizes.update(models=size.model_bytes, kept=size.kept_bytes)
            work, arrivals = _requests(options, zoo)
            with counted("runs", options.repeats * len(_WAYS)) as advance:
                for repeat in range(options.repeats):
                    probe.measure()
                    for way in _WAYS if repeat % 2 == 0 else _WAYS[::-1]:
                        cells.append(_run(options, zoo, way, repeat, work, arrivals))
                        advance()
                        yield

    def findings() -> Findings:
        return Findings(
            results={"cells": [asdict(cell) for cell in cells], "bytes": sizes},
            tables=[_table(options, cells, sizes)],
            draw=partial(_plot, cells),
        )

    return record.grow(steps(), findings, probe)


# -- the models ----------------------------------------------------------------------------------


def _save_zoo(options: ChainsOptions, scratch: Path) -> BlockZoo:
    """A base of random weights, and fine-tunes whose own layers are spread over it."""
    dtype = torch_dtype(options.dtype)
    model = build_model(
        options.shape, dtype=dtype, device=torch.device("cpu"), tie_word_embeddings=False
    )
    zoo = BlockZoo.create(scratch / "zoo")
    _add(zoo, model, BASE, scratch)
    for number in range(options.tenants):
        with _tuned(model, options, number):
            _add(zoo, model, f"tenant-{number}", scratch)
    return zoo


def _add(zoo: BlockZoo, model: PreTrainedModel, name: str, scratch: Path) -> None:
    folder = scratch / "one"
    model.save_pretrained(folder)
    zoo.add(folder, name)
    shutil.rmtree(folder)


@contextmanager
def _tuned(model: PreTrainedModel, options: ChainsOptions, number: int) -> Iterator[None]:
    """Weights of a fine-tune for a while."""
    layers: Any = next(one for one in model.modules() if isinstance(one, nn.ModuleList))
    count, own = len(layers), min(options.layers, len(layers))
    chosen = sorted({(number + index * count // max(1, own)) % count for index in range(own)})
    head: Any = model.get_output_embeddings()
    changed = [p for one in (*(layers[i] for i in chosen), head) for p in one.parameters()]
    before = [parameter.data.clone() for parameter in changed]
    generator = torch.Generator().manual_seed(options.seed + number + 1)
    for parameter in changed:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += (noise * 0.02).to(parameter.dtype)
    try:
        yield
    finally:
        for parameter, old in zip(changed, before, strict=True):
            parameter.data.copy_(old)


# -- the runs ------------------------------------------------------------------------------------


def _requests(options: ChainsOptions, zoo: BlockZoo) -> tuple[list[WorkItem], list[float]]:
    """All requests in the order of arrival, for the models in turn."""
    names = zoo.models
    lengths = (options.prompt_len, options.prompt_len), (options.output_len, options.output_len)
    work = ragged(
        options.requests,
        prompt_lens=lengths[0],
        output_lens=lengths[1],
        vocab_size=zoo.chain(BASE).config["vocab_size"],
        seed=options.seed,
    )
    arrivals = gamma_arrivals(options.requests, rate=options.rate, seed=options.seed)
    named = [replace(one, model=names[i % len(names)]) for i, one in enumerate(work)]
    return named, list(arrivals)


def _run(
    options: ChainsOptions,
    zoo: BlockZoo,
    way: str,
    repeat: int,
    work: list[WorkItem],
    arrivals: list[float],
) -> Cell:
    names = list(zoo.models)
    engine = {
        "device": "cpu",
        "dtype": options.dtype,
        "max_len": options.prompt_len + options.output_len + 1,
        "prefix_reuse": False,
        "max_parked": 0,
    }
    if way == APART:
        orders = [Order(source=str(zoo.chain(n).folder), model=None, options=engine) for n in names]
        loads = [_those_of(name, work, arrivals) for name in names]
    else:
        one = zoo.chain(BASE).folder if way == ALONE else zoo.path
        model = None if way == ALONE else BASE
        orders = [Order(source=str(one), model=model, options=engine)]
        given = [replace(item, model=None) for item in work] if way == ALONE else work
        loads = [Load(given, arrivals)]
    with workers(orders) as running:
        _warm_up(running, loads)
        answers = running.run(loads)
    return _cell(way, repeat, answers)


def _those_of(name: str, work: Sequence[WorkItem], arrivals: Sequence[float]) -> Load:
    chosen = [(item, at_s) for item, at_s in zip(work, arrivals, strict=True) if item.model == name]
    return Load([replace(item, model=None) for item, _ in chosen], [at_s for _, at_s in chosen])


def _warm_up(running: Workers, loads: Sequence[Load]) -> None:
    """Read blocks, and record the commonest steps."""
    few = []
    for load in loads:
        by_model = {item.model: item for item in load.work}
        items = [WorkItem(item.prompt[:16], 6, model=item.model) for item in by_model.values()]
        few.append(Load(items, [0.0] * len(items)))
    running.run(few)
    running.run([Load(load.work[:1], [0.0] * len(load.work[:1])) for load in loads])


def _cell(way: str, repeat: int, answers: Sequence[Answer]) -> Cell:
    requests: list[RequestTrace] = [one for answer in answers for one in answer.requests]
    first = min(one.arrival_s for one in requests)
    return Cell(
        way=way,
        repeat=repeat,
        e2es_s=[one.e2e_s for one in requests],
        ttfts_s=[one.ttft_s for one in requests],
        time_s=max(one.token_times_s[-1] for one in requests) - first,
        num_tokens=sum(one.num_prompt_tokens + len(one.token_times_s) for one in requests),
        pss_bytes=sum(answer.pss_bytes for answer in answers),
        block_bytes=sum(answer.block_bytes for answer in answers),
        rows_per_call=max(answer.rows_per_call for answer in answers),
    )


# -- results -------------------------------------------------------------------------------------


def _table(options: ChainsOptions, cells: Sequence[Cell], sizes: dict[str, int]) -> Table:
    rows = []
    p95s = {way: _median([_percentile(cell, 95) for cell in _of(cells, way)]) for way in _WAYS}
    for way in _WAYS:
        found = _of(cells, way)
        if not found:
            continue
        against = p95s[way] / p95s[APART] - 1 if p95s[APART] else 0.0
        rows.append(
            [
                way,
                f"{_median([cell.num_tokens / cell.time_s for cell in found]):.1f}",
                f"{_median([_percentile(cell, 50) for cell in found]):.2f}",
                f"{p95s[way]:.2f}",
                "–" if way == APART or not p95s[APART] else f"{against:+.1%}",
                f"{_median([cell.pss_bytes for cell in found]) / 2**20:,.0f}",
            ]
        )
    notes = [
        f"{options.tenants} fine-tunes and their base, {options.shape} in {options.dtype}, with "
        f"{options.layers} layers and a head of their own. {options.requests} requests of "
        f"{options.prompt_len} and {options.output_len} tokens, {options.rate:g} a second. "
        f"The paper's P95 latency is {_PAPERS:+.1%} of one deployment a model (A100s)."
    ]
    if sizes:
        notes.append(
            f"The zoo keeps {sizes['kept'] / 2**20:,.0f} MiB of {sizes['models'] / 2**20:,.0f}."
        )
    together = _of(cells, TOGETHER)
    if together:
        notes.append(
            f"Fine-tunes' own blocks take {together[-1].block_bytes / 2**20:,.0f} MiB, and a call "
            f"of one has {together[-1].rows_per_call:.1f} rows."
        )
    return Table(
        title="Fine-tunes that share blocks",
        columns=[
            *("way", "tokens/s", "latency p50, s", "p95, s", "p95 over a process a model"),
            "PSS, MiB",
        ],
        rows=rows,
        notes=notes,
    )


def _of(cells: Sequence[Cell], way: str) -> list[Cell]:
    return [cell for cell in cells if cell.way == way]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _percentile(cell: Cell, percent: float) -> float:
    return float(np.percentile(cell.e2es_s, percent))


def _plot(cells: Sequence[Cell], path: Path) -> None:
    """How many requests took longer than so much."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8))
    axes = figure.subplots()
    for way in _WAYS:
        seconds = sorted(s for cell in _of(cells, way) for s in cell.e2es_s)
        shares = [1 - index / len(seconds) for index in range(len(seconds))]
        axes.semilogy(seconds, shares, label=way)
    axes.set_xlabel("latency, s")
    axes.set_ylabel("share that is longer")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
