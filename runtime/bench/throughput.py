"""`vkv bench throughput`: tokens a second, offline, against what a user would pick instead.

Every system runs in a process of its own (`workers/`), on the same checkpoint, prompts, output
lengths and threads, greedy and without an end token. Within a repeat the systems take turns cell
by cell, and each repeat starts them anew: where a process happens to lie in memory can cost a
fifth of its speed for as long as it lives.

A system is timed from outside, by whole calls. `prefill` is the time to the first token of every
prompt; `decode` is a call with many output tokens less a call with one; `ragged` is a call with
requests of all lengths.
"""

import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedModel

from ...vmem.errors import InvalidConfig
from .limits import Limits, LimitsProbe
from .memory import cache_bytes_per_token
from .peer import WORKERS, Worker, WorkerFailed, import_bytes, interpreter_of
from .record import Table, require_matplotlib, write_record
from .shapes import build_model

Samples = dict[str, dict[str, list[float]]]

SYSTEMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "vkv": ("vkv_worker.py", {"kv": "virtual"}),
    "vkv-paged": ("vkv_worker.py", {"kv": "paged"}),
    "transformers": ("transformers_worker.py", {"cache": "dynamic"}),
    "transformers-static": ("transformers_worker.py", {"cache": "static"}),
    "transformers-continuous": ("transformers_worker.py", {"cache": "continuous"}),
}
PEERS: Mapping[str, str] = {"vllm": "vllm_worker.py", "llama-cpp": "llama_cpp_worker.py"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to time. `seconds` of it are divided into `num_tokens`."""

    name: str
    kind: Literal["prefill", "decode", "total"]
    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The tokens that are counted: of prompts, or of outputs."""
        if self.kind == "prefill":
            return sum(self.prompt_lens)
        return sum(self.output_lens) - (len(self.output_lens) if self.kind == "decode" else 0)

    @property
    def held_tokens(self) -> int:
        """The most tokens whose KV is held at once."""
        return sum(self.prompt_lens) + sum(self.output_lens)


def _ragged_cell(seed: int = 7) -> Cell:
    """32 requests of 8,769 prompt and 3,550 output tokens in all."""
    rng = random.Random(seed)
    prompts = _spread([rng.randint(16, 532) for _ in range(32)], 8769)
    outputs = _spread([rng.randint(16, 206) for _ in range(32)], 3550)
    return Cell(name="ragged", kind="total", prompt_lens=prompts, output_lens=outputs)


def _spread(lengths: Sequence[int], total: int) -> tuple[int, ...]:
    """The lengths, stretched to add up to `total`."""
    scaled = [max(1, n * total // sum(lengths)) for n in lengths]
    scaled[-1] += total - sum(scaled)
    return tuple(scaled)


def _uniform(name: str, kind: Any, batch: int, prompt: int, output: int) -> Cell:
    return Cell(name=name, kind=kind, prompt_lens=(prompt,) * batch, output_lens=(output,) * batch)


CELLS: Mapping[str, Cell] = {
    cell.name: cell
    for cell in (
        _uniform("prefill-1", "prefill", 1, 512, 1),
        _uniform("prefill-8", "prefill", 8, 256, 1),
        _uniform("decode-1", "decode", 1, 128, 65),
        _uniform("decode-8", "decode", 8, 128, 65),
        _uniform("decode-32", "decode", 32, 128, 49),
        _ragged_cell(),
    )
}


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions:
    """What to run; see `vkv bench throughput --help`."""

    shape: str = "llama-455m"
    model: str | None = None
    dtype: str = "bfloat16"
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    systems: tuple[str, ...] = tuple(SYSTEMS)
    peers: Mapping[str, str] = field(default_factory=dict)  # name to interpreter
    cells: tuple[Cell, ...] = tuple(CELLS.values())
    repeats: int = 3
    batch: int = 8  # of the padded batches of transformers, in `ragged`
    eager_peers: bool = False
    label: str = ""  # behind the record's name
    seed: int = 0


def run(options: ThroughputOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    require_matplotlib()
    workers = _commands(options)
    dtype = getattr(torch, options.dtype)
    probe = LimitsProbe(options.device, dtype, threads=options.threads)
    constant = import_bytes()
    console = Console(stderr=True)
    samples: Samples = {name: {cell.name: [] for cell in options.cells} for name in workers}
    failures: dict[str, dict[str, str]] = {name: {} for name in workers}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="vkv-bench-") as scratch:
        model_folder, facts = _save_model(options, Path(scratch), dtype)
        for repeat in range(options.repeats):
            console.print(f"repeat {repeat + 1} of {options.repeats}")
            probe.measure()
            with _started(workers, options, model_folder, failures) as running:
                _one_repeat(running, options, facts, samples, failures, peaks, probe, console)
        probe.measure()
    limits = probe.limits()
    name = options.shape if options.model is None else Path(options.model).name
    facts["import_bytes"] = constant
    tables = _tables(options, samples, failures, peaks, facts, limits)
    path = write_record(
        folder,
        f"throughput-{name}" + (f"-{options.label}" if options.label else ""),
        device=options.device,
        config=asdict(options) | {"device": str(options.device)},
        results={
            "model": facts,
            "tokens_per_s": samples,
            "failures": failures,
            "peak_rss_bytes": peaks,
        },
        tables=tables,
        limits=limits,
        command=command,
    )
    _plot(samples, path.with_suffix(".png"))
    return path, tables


# -- running -------------------------------------------------------------------------------------


def _commands(options: ThroughputOptions) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """For each system: how its worker is started, and the options that are its own."""
    commands: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name in options.systems:
        if name not in SYSTEMS:
            raise InvalidConfig(f"system {name!r} is unknown; use some of {', '.join(SYSTEMS)}")
        script, own = SYSTEMS[name]
        commands[name] = [sys.executable, str(WORKERS / script)], own
    for name, interpreter in options.peers.items():
        interpreter = interpreter_of(name, interpreter, PEERS)
        commands[name] = [interpreter, str(WORKERS / PEERS[name])], {"eager": options.eager_peers}
    return commands


def _save_model(
    options: ThroughputOptions, scratch: Path, dtype: torch.dtype
) -> tuple[Path, dict[str, int]]:
    """The checkpoint that all systems load, and what the tables need to know of it."""
    if options.model is not None:
        from transformers import AutoModelForCausalLM

        folder = Path(options.model)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        folder = scratch / "model"
        model = build_model(options.shape, dtype=dtype, device=torch.device("cpu"))
        model.save_pretrained(folder)
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    return folder, {
        "weight_bytes": sum(weights.values()),
        "kv_bytes_per_token": cache_bytes_per_token(model, dtype),
        "vocab_size": model.config.vocab_size,
    }


@contextmanager
def _started(
    workers: Mapping[str, tuple[list[str], dict[str, Any]]],
    options: ThroughputOptions,
    model_folder: Path,
    failures: dict[str, dict[str, str]],
) -> Iterator[dict[str, Worker]]:
    """All systems, loaded; one that does not load fails in every cell."""
    common = {
        "model": str(model_folder),
        "device": str(options.device),
        "dtype": options.dtype,
        "threads": options.threads,
        "batch": options.batch,
        "max_seqs": max(len(cell.prompt_lens) for cell in options.cells),
        "max_len": max(
            prompt + output
            for cell in options.cells
            for prompt, output in zip(cell.prompt_lens, cell.output_lens, strict=True)
        ),
        "total_tokens": max(cell.held_tokens for cell in options.cells),
    }
    with ExitStack() as stack:
        running: dict[str, Worker] = {}
        for name, (command, own) in workers.items():
            log = model_folder.parent / f"{name}.log"
            try:
                running[name] = Worker(command, common | own, log)
                stack.callback(running[name].close)
            except WorkerFailed as error:
                failures[name] |= {cell.name: str(error) for cell in options.cells}
        yield running


def _one_repeat(
    running: dict[str, Worker],
    options: ThroughputOptions,
    facts: Mapping[str, int],
    samples: Samples,
    failures: dict[str, dict[str, str]],
    peaks: dict[str, int],
    probe: LimitsProbe,
    console: Console,
) -> None:
    rng = random.Random(options.seed)
    first = options.cells[0]
    warm_up = [[1] * first.prompt_lens[0]], [min(8, first.output_lens[0])]
    for name, worker in running.items():
        try:
            worker.run(*warm_up)
        except WorkerFailed as error:
            failures[name] |= {cell.name: str(error) for cell in options.cells}
    for cell in options.cells:
        if options.device.type == "cpu":  # a GPU's memory is the systems' now
            probe.measure()
        prompts = [[rng.randrange(facts["vocab_size"]) for _ in range(n)] for n in cell.prompt_lens]
        for name, worker in running.items():
            if cell.name in failures[name]:
                continue
            try:
                rate, peaks[name] = _measure(worker, cell, prompts)
            except WorkerFailed as error:
                failures[name][cell.name] = str(error)
                console.print(f"  {cell.name:10} {name}: {error}", markup=False)
            else:
                samples[name][cell.name].append(rate)
                console.print(f"  {cell.name:10} {name}: {rate:.1f} tokens/s", markup=False)


def _measure(worker: Worker, cell: Cell, prompts: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Tokens a second, and the worker's peak memory."""
    ones = [1] * len(prompts)
    if cell.kind == "prefill":
        seconds, peak = worker.run(prompts, ones)
    else:
        seconds, peak = worker.run(prompts, cell.output_lens)
        if cell.kind == "decode":
            seconds -= worker.run(prompts, ones)[0]
    if seconds <= 0:
        raise WorkerFailed("a call for more tokens took less time: the machine is too busy")
    return cell.num_tokens / seconds, peak


# -- results -------------------------------------------------------------------------------------


def _tables(
    options: ThroughputOptions,
    samples: Samples,
    failures: Mapping[str, Mapping[str, str]],
    peaks: Mapping[str, int],
    facts: Mapping[str, int],
    limits: Limits,
) -> list[Table]:
    names = [cell.name for cell in options.cells]
    baseline = next(iter(samples))
    tables = [
        Table(
            title="Tokens a second (median)",
            columns=["system", *names],
            rows=[
                [system, *(_median(cells[name]) for name in names)]
                for system, cells in samples.items()
            ],
        ),
        Table(
            title=f"{baseline} over each (median of paired ratios)",
            columns=["system", *names],
            rows=[
                [system, *(_ratio(samples[baseline][name], cells[name]) for name in names)]
                for system, cells in samples.items()
                if system != baseline
            ],
        ),
        _memory_table(options, peaks, facts),
        Table(
            title="Limits of this machine, measured in this run",
            columns=["limit", "value"],
            rows=[
                ["reading memory, GB/s", f"{limits.read_bytes_per_s / 1e9:.1f}"],
                [f"matrix product in {options.dtype}, TFLOP/s", f"{limits.flops_per_s / 1e12:.2f}"],
                [
                    "steps a second if weights are read once",
                    f"{limits.read_bytes_per_s / facts['weight_bytes']:.1f}",
                ],
            ],
        ),
    ]
    failed = [
        [name, cell, text] for name, cells in failures.items() for cell, text in cells.items()
    ]
    if failed:
        tables.append(Table(title="Failed", columns=["system", "cell", "reason"], rows=failed))
    return tables


def _memory_table(
    options: ThroughputOptions, peaks: Mapping[str, int], facts: Mapping[str, int]
) -> Table:
    held = max(cell.held_tokens for cell in options.cells) * facts["kv_bytes_per_token"]
    needed = facts["weight_bytes"] + held
    constant = facts["import_bytes"]

    def row(name: str, peak: int) -> list[str]:
        over = peak - needed - constant
        mebibytes = (f"{number / 2**20:.0f}" for number in (peak, peak - needed, over))
        return [name, *mebibytes, f"{over / needed:+.0%}"]

    return Table(
        title="Peak resident memory",
        columns=[
            "system",
            "MiB",
            "beyond weights and the most KV, MiB",
            "beyond those and the imports, MiB",
            "of weights and the most KV",
        ],
        rows=[
            ["weights and the most KV", f"{needed / 2**20:.0f}", "", "", ""],
            ["a process that only imports vkv", f"{constant / 2**20:.0f}", "", "", ""],
            *(row(name, peak) for name, peak in peaks.items()),
        ],
    )


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else "failed"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    if not theirs or len(ours) != len(theirs):
        return ""
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}"


def _plot(samples: Samples, path: Path) -> None:
    from matplotlib.figure import Figure

    cells = list(next(iter(samples.values())))
    figure = Figure(figsize=(2.2 * len(cells), 4))
    for index, cell in enumerate(cells):
        axes = figure.add_subplot(1, len(cells), index + 1)
        names = [name for name, rates in samples.items() if rates[cell]]
        axes.bar(
            range(len(names)),
            [statistics.median(samples[name][cell]) for name in names],
            color=["#0a7" if name == "vkv" else "#89a" for name in names],
        )
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_title(cell, fontsize=9)
        axes.tick_params(axis="y", labelsize=7)
    figure.supylabel("tokens a second", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
