"""`vkv bench tiers`: what the tiers behind a cache cost while not needed, and beside steps.

Decode steps without a tier, with one whose worker is idle, and with the worker copying all the
time. Then many requests that share a long beginning: without tiers, with host memory, with a folder
that is empty at first, and with the same folder once it has the beginning.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ...allocator.transfer import Copier, CopyJob
from ...runtime.frontend.llm import LLM
from ...runtime.frontend.progress import counted
from ..driver import Driver
from ..limits import Limits, LimitsProbe
from ..models.shapes import build_model
from ..record import Findings, Record, Table, record_name
from .options import TiersOptions

NO_TIER, IDLE, BUSY = "no tier", "worker idle", "worker busy"
STEPS = (NO_TIER, IDLE, BUSY)
PLAIN, MEMORY, FIRST, AGAIN = "no tier", "swap_memory", "kv_dir, empty", "kv_dir, filled"
SHARED = (PLAIN, MEMORY, FIRST, AGAIN)
_COPIED_AT_ONCE = 16 << 20
_STEPS_AT_ONCE = 8
_LEAST_VOCABULARY = 500  # that every shape has


@dataclass
class Found:
    """All samples; the n-th of each list is of the n-th turn.

    Attributes:
        step_s: median times of a few decode steps.
        copied_per_s: bytes that the busy worker copied meanwhile.
        tokens_per_s: prompt and output tokens of all requests over the time until the last.
        first_s: time until the first of the requests had a token.
    """

    step_s: dict[str, list[float]] = field(default_factory=dict)
    copied_per_s: list[float] = field(default_factory=list)
    tokens_per_s: dict[str, list[float]] = field(default_factory=dict)
    first_s: dict[str, list[float]] = field(default_factory=dict)


def run(options: TiersOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    name = record_name("tiers", options.shape, options.label)
    record = Record(folder, name, device=options.device, config=asdict(options), command=command)
    found, probe = Found(), LimitsProbe(options.device, options.dtype)

    def steps() -> Generator[None, None, None]:
        num_runs = ("steps" in options.parts) + ("shared" in options.parts) * len(SHARED)
        with counted("runs", options.repeats * num_runs) as advance:
            for _ in range(options.repeats):
                probe.measure()
                if "steps" in options.parts:
                    _time_steps(options, found)
                    advance()
                    yield
                if "shared" not in options.parts:
                    continue
                model = build_model(options.shape, dtype=options.dtype, device=options.device)
                with tempfile.TemporaryDirectory(prefix="vkv-tiers-") as kv_dir:
                    for way in SHARED:
                        _time_shared(model, options, way, Path(kv_dir), found)
                        advance()
                        yield

    def findings() -> Findings:
        return Findings(
            results=asdict(found),
            tables=_tables(found, probe.limits(), options),
            draw=partial(_plot, found),
        )

    return record.grow(steps(), findings, probe)


def _llm(model: PreTrainedModel, options: TiersOptions, max_len: int, **more: Any) -> LLM:
    return LLM(
        model,
        dtype=options.dtype,
        device=options.device,
        max_len=max_len,
        pack_weights=True,  # as for a checkpoint
        **more,
    )


def _tokens(generator: np.random.Generator, model: PreTrainedModel, count: int) -> list[int]:
    return generator.integers(0, model.config.vocab_size, count).tolist()


# -- steps beside the worker -------------------------------------------------------------------


def _time_steps(options: TiersOptions, found: Found) -> None:
    """Steps of one engine, a few at a time: without its tier, with it, and beside copies."""
    model = build_model(options.shape, dtype=options.dtype, device=options.device)
    num_output = 3 * options.num_steps + _STEPS_AT_ONCE
    with _llm(
        model,
        options,
        options.context + num_output,
        max_seqs=options.batch,
        swap_memory=options.swap_memory,
    ) as llm:
        driver = Driver(llm)
        driver.submit("moved", list(range(2 * _STEPS_AT_ONCE)), 2)
        driver.finish_all()  # its slot is copied, so that the worker is there
        _begin_decoding(driver, options, num_output)
        for turn in range(options.num_steps // _STEPS_AT_ONCE):
            for way in STEPS if turn % 2 else STEPS[::-1]:
                with (
                    driver.without_tier() if way == NO_TIER else nullcontext(),
                    _copying(way == BUSY) as copied_per_s,
                ):
                    found.step_s.setdefault(way, []).append(_steps(driver))
                    if way == BUSY:
                        found.copied_per_s.append(copied_per_s())


def _begin_decoding(driver: Driver, options: TiersOptions, num_output: int) -> None:
    generator = np.random.default_rng(options.seed)
    for index in range(options.batch):
        prompt = generator.integers(0, _LEAST_VOCABULARY, options.context).tolist()
        driver.submit(str(index), prompt, num_output)
    decoding: set[str] = set()
    while len(decoding) < options.batch:
        decoding |= {token.request_id for token in driver.step()}


def _steps(driver: Driver) -> float:
    """The median of a few steps."""
    times = []
    for _ in range(_STEPS_AT_ONCE):
        start_s = time.perf_counter()
        driver.step()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


@contextmanager
def _copying(is_busy: bool) -> Iterator[Callable[[], float]]:
    """Keep the swap worker copying; what it yields says, at the end, how many bytes a second."""
    if not is_busy:
        yield lambda: 0.0
        return
    copier, stop = Copier(torch.device("cpu")), threading.Event()
    source, target = (torch.ones(_COPIED_AT_ONCE, dtype=torch.uint8) for _ in range(2))
    jobs: list[CopyJob] = []

    def feed() -> None:
        while not stop.is_set():
            job = CopyJob([[source]], [[target]], after=_Done())
            jobs.append(copier.submit(job))
            job.wait()

    feeder = threading.Thread(target=feed, daemon=True)
    start_s = time.perf_counter()
    feeder.start()
    try:
        yield lambda: sum(job.num_bytes for job in jobs) / (time.perf_counter() - start_s)
    finally:
        stop.set()
        feeder.join()
        copier.stop()


class _Done:
    """Nothing needs to be over before."""

    def wait(self) -> None:
        return


# -- a beginning that all share ----------------------------------------------------------------


def _time_shared(
    model: PreTrainedModel, options: TiersOptions, way: str, kv_dir: Path, found: Found
) -> None:
    generator = np.random.default_rng(options.seed)
    prefix = _tokens(generator, model, options.prefix)
    max_len = options.prefix + options.suffix + options.output
    tier: dict[str, Any] = {}
    if way == MEMORY:
        tier = {"swap_memory": options.swap_memory}
    elif way in (FIRST, AGAIN):
        tier = {"kv_dir": str(kv_dir)}
    with _llm(model, options, max_len, max_seqs=options.num_requests, **tier) as llm:
        driver = Driver(llm)
        driver.submit("warm", prefix[:16], 2)
        driver.finish_all()
        start_s = time.perf_counter()
        for index in range(options.num_requests):
            prompt = prefix + _tokens(generator, model, options.suffix)
            driver.submit(str(index), prompt, options.output)
        first_s = None
        while driver.has_work:
            if driver.step() and first_s is None:
                first_s = time.perf_counter() - start_s
        total_s = time.perf_counter() - start_s
    assert first_s is not None
    found.tokens_per_s.setdefault(way, []).append(options.num_requests * max_len / total_s)
    found.first_s.setdefault(way, []).append(first_s)


# -- results -----------------------------------------------------------------------------------


def _ratio(over: Sequence[float], under: Sequence[float]) -> str:
    pairs = list(zip(over, under, strict=False))
    return f"{statistics.median(a / b for a, b in pairs):.2f}" if pairs else "–"


def _tables(found: Found, limits: Limits, options: TiersOptions) -> list[Table]:
    rows = [
        [way, f"{statistics.median(times) * 1e3:.2f}", _ratio(found.step_s[NO_TIER], times)]
        for way in STEPS
        if (times := found.step_s.get(way))
    ]
    notes = []
    if found.copied_per_s:
        copied = statistics.median(found.copied_per_s)
        left = 1 - 2 * copied / limits.read_bytes_per_s
        notes = [
            f"The busy worker copied {copied / 1e9:.1f} GB/s. Read and written, that leaves "
            f"{left:.0%} of the memory's bandwidth; it also takes a processor that steps use."
        ]
    steps = Table(
        title=f"A decode step of {options.batch} requests of {options.context} tokens",
        columns=["tier", "ms (median)", "speed, of no tier"],
        rows=rows,
        notes=notes,
    )
    shared = Table(
        title=f"{options.num_requests} requests at once that share {options.prefix} tokens",
        columns=["tier", "tokens/s (median)", "of no tier", "first token, s"],
        rows=[
            [
                way,
                f"{statistics.median(rates):.0f}",
                _ratio(rates, found.tokens_per_s[PLAIN]),
                f"{statistics.median(found.first_s[way]):.2f}",
            ]
            for way, rates in found.tokens_per_s.items()
        ],
        notes=["Tokens of prompts and outputs, those of the shared beginning counted each time."],
    )
    return [table for table in (steps, shared) if table.rows]


def _plot(found: Found, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6))
    left, right = figure.subplots(1, 2)
    for axes, samples, scale, label in (
        (left, found.step_s, 1e3, "a decode step, ms"),
        (right, found.tokens_per_s, 1.0, "tokens a second"),
    ):
        names = list(samples)
        axes.bar(names, [statistics.median(samples[name]) * scale for name in names])
        axes.set_ylabel(label)
        axes.tick_params(axis="x", labelsize="small", rotation=15)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
