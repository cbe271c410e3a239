"""`vkv bench migrate`: the pause that a client sees while its request moves to another process.

One stream of a long prompt, on two instances of one processor each. It moves back and forth while
it is read: by handing its pages over, by copying in stages while it goes on, and by one copy while
it stands still. Last its instance is killed, so that all is computed again.

Source: Llumnix, arXiv:2406.03243, section 6.2.
"""

import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...runtime.cluster.cluster import Cluster
from ...runtime.engine.migration.handshake import Stages
from ...runtime.frontend.progress import counted
from ...runtime.request.sampling_params import SamplingParams
from ...vmem.errors import InvalidOperation
from ..limits import LimitsProbe
from ..models.checkpoints import save_checkpoints
from ..record import Findings, Record, Table, record_name
from .options import MigrateOptions

PAGES, STAGES, STOP, AGAIN = "pages handed over", "copied in stages", "copied at rest", "computed"
WAYS = (PAGES, STAGES, STOP, AGAIN)
_BETWEEN = 12  # tokens between two moves


@dataclass
class Found:
    """Samples of one way and context.

    Attributes:
        pauses_s: the longest time between two tokens while it moved, of each move.
        usual_s: the median time between two tokens at other times.
        copied_bytes: by all moves together.
    """

    pauses_s: list[float] = field(default_factory=list)
    usual_s: float = 0.0
    copied_bytes: int = 0


def run(options: MigrateOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    name = record_name("migrate", options.shape, options.label)
    device, config = torch.device("cpu"), asdict(options)
    record = Record(folder, name, device=device, config=config, command=command)
    found: dict[tuple[str, int], Found] = {}
    probe = LimitsProbe(torch.device("cpu"), options.dtype)

    def steps() -> Generator[None, None, None]:
        with (
            tempfile.TemporaryDirectory(prefix="vkv-bench-") as scratch,
            counted("streams", len(WAYS) * len(options.contexts)) as advance,
        ):
            saved = save_checkpoints(options.shape, None, options.dtype, None, Path(scratch))
            for way in WAYS:
                probe.measure()
                with _cluster(options, saved.dense, way) as cluster:
                    for context in options.contexts:
                        found[way, context] = _measure(cluster, options, way, context, saved)
                        advance()
                        yield

    def findings() -> Findings:
        return Findings(
            results={f"{way}, {context}": asdict(one) for (way, context), one in found.items()},
            tables=[_table(found, options)],
            draw=partial(_plot, found, options),
        )

    return record.grow(steps(), findings, probe)


def _cluster(options: MigrateOptions, model: Path, way: str) -> Cluster:
    return Cluster(
        model,
        instances=2,
        policy="round_robin",
        threads=1,
        stages=Stages(most=0 if way == STOP else 3, lease_s=60.0),
        device="cpu",
        dtype=str(options.dtype).removeprefix("torch."),
        max_seqs=2,
        max_len=max(options.contexts) + _BETWEEN * (options.moves + 2),
        movable=way == PAGES,
        liveness_s=120.0,  # a long prompt's step is no sign of death
    )


def _measure(
    cluster: Cluster, options: MigrateOptions, way: str, context: int, saved: Any
) -> Found:
    cluster.scale(2)
    generator = np.random.default_rng([options.seed, context])
    prompt = generator.integers(0, saved.vocab_size, context).tolist()
    num_moves = 1 if way == AGAIN else options.moves
    params = SamplingParams(
        temperature=0, max_tokens=_BETWEEN * (num_moves + 2), ignore_eos=True, detokenize=False
    )
    found, before = Found(), _copied(cluster)
    times: list[float] = []
    moves: list[tuple[float, list[float]]] = []
    for _ in _tokens(cluster, prompt, params):
        times.append(time.perf_counter())
        is_due = len(times) % _BETWEEN == 0
        if is_due and len(moves) < num_moves:
            moves.append(_in_background(cluster, way))
    gaps = [(start, stop - start) for start, stop in pairwise(times)]
    spans = [(began, ended[0]) for began, ended in moves]
    usual = []
    for start, gap in gaps:
        if not any(began <= start + gap and start <= ended for began, ended in spans):
            usual.append(gap)
    found.usual_s = statistics.median(usual)
    for began, ended in spans:
        found.pauses_s.append(
            max(gap for start, gap in gaps if start + gap >= began and start <= ended)
        )
    found.copied_bytes = _copied(cluster) - before
    return found


def _tokens(cluster: Cluster, prompt: list[int], params: SamplingParams) -> Iterator[int]:
    for delta in cluster.stream({"prompt_token_ids": prompt}, params):
        yield from delta.token_ids


def _in_background(cluster: Cluster, way: str) -> tuple[float, list[float]]:
    """Begin a move; when it began, and a list that gets when it was over."""
    ended: list[float] = [float("inf")]
    act = _kill if way == AGAIN else _move

    def work() -> None:
        act(cluster)
        ended[0] = time.perf_counter()

    began = time.perf_counter()
    threading.Thread(target=work, daemon=True).start()
    return began, ended


def _move(cluster: Cluster) -> None:
    stats = cluster.stats()
    for (request_id, index), owner in stats.requests.items():
        other = next(m.id for m in stats.instances if m.id != owner)
        try:
            cluster.migrate(request_id, other, index=index)
        except InvalidOperation:  # it has just ended
            return


def _kill(cluster: Cluster) -> None:
    stats = cluster.stats()
    owner = next(iter(stats.requests.values()))
    pid = next(m.pid for m in stats.instances if m.id == owner)
    os.kill(pid, signal.SIGKILL)
    time.sleep(1e9)  # its pause ends with the stream


def _copied(cluster: Cluster) -> int:
    return sum(member.carried_bytes for member in cluster.stats().instances)


# -- results -----------------------------------------------------------------------------------


def _table(found: dict[tuple[str, int], Found], options: MigrateOptions) -> Table:
    def cells(way: str, cell: Callable[[Found], str]) -> list[str]:
        return [cell(found[way, c]) if (way, c) in found else "–" for c in options.contexts]

    rows = []
    for way in WAYS:
        rows.append([way, "pause, ms", *cells(way, lambda f: f"{_median_ms(f.pauses_s):.0f}")])
        rows.append(["", "a token else, ms", *cells(way, lambda f: f"{f.usual_s * 1e3:.0f}")])
        rows.append(["", "copied, MiB", *cells(way, lambda f: f"{f.copied_bytes / 2**20:.1f}")])
    return Table(
        title="The longest time between two tokens while a request moves (median of its moves)",
        columns=["way", "", *(f"{context} tokens" for context in options.contexts)],
        rows=rows,
    )


def _median_ms(values: list[float]) -> float:
    return statistics.median(values) * 1e3 if values else float("nan")


def _plot(found: dict[tuple[str, int], Found], options: MigrateOptions, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8))
    axes = figure.subplots()
    for way in WAYS:
        there = [context for context in options.contexts if (way, context) in found]
        points = [(context, _median_ms(found[way, context].pauses_s)) for context in there]
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", label=way)
    axes.set_xlabel("tokens of the request")
    axes.set_ylabel("longest pause, ms")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
