"""`vkv bench throughput`: tokens a second, offline, against what a user would pick instead.

Every system runs in a process of its own (`workers/`), on the same checkpoint, prompts, output
lengths and threads, greedy and without an end token. Within a repeat the systems take turns cell
by cell, and each repeat starts them anew: where a process happens to lie in memory can cost a
fifth of its speed for as long as it lives.

Systems are called as users call them. `prefill` is a call for the first token of every prompt, and
`ragged` a call with requests of all lengths, both timed from outside. `decode` is timed by the time
stamps of tokens: from when the last request of a batch has its first token to when the first has
its last. A decode that is faster than memory allows, as measured just before, is measured again;
if it stays so, its figure is marked. On a GPU a system has run the very same call once before:
graphs are captured and kernels chosen when a batch of a new size comes. So has, anywhere, one that
compiles for every shape.

With a `quant` format, the same weights are also rounded to 4 bits, into a checkpoint that vkv runs
beside the dense one, with the output layer dense and (`-head`) in 4 bits too. llama.cpp then runs
its own Q4_0 as well, with embeddings and output layer in Q8_0 (its own tool makes them Q6_K), and
Q4_K_M as that tool makes it; OpenVINO its int4, with these in 8 bits.

Who computes with the same weights should say the same: each system's first tokens are compared with
those of the first. A few differ, where rounding decides between two that are alike.
"""

import random
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ..limits import Limits, LimitsProbe
from ..options import torch_dtype
from ..peers.peer import Timing, Worker, WorkerFailed, import_bytes
from ..record import Findings, Record, Table, record_name
from .cells import Cell
from .checkpoints import Checkpoints, parse_format, save_checkpoints
from .options import ThroughputOptions
from .shapes import build_model
from .systems import INT4_SYSTEMS, READ_INT4, Command, commands, compiles_by_shape
from .throughput_results import Results, as_record, draw, tables

_AGAIN = 2  # measurements more of a figure that cannot be
_DOUBT = 1.1  # beyond the limit by which it cannot: limits are measured too


def run(options: ThroughputOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path.

    Interrupted (Ctrl-C), it writes what it has measured, and the record says what is missing.
    """
    quant = parse_format(options.quant) is not None
    dtype = torch_dtype(options.dtype)
    workers = commands(
        options.systems,
        options.peers,
        quant=quant,
        eager=options.eager_peers,
        rounds_inputs=options.device.type == "cpu" and dtype == torch.bfloat16,
    )
    model = options.shape if options.model is None else Path(options.model).name
    name = record_name("throughput", model, options.quant, options.label)
    record = Record(folder, name, device=options.device, config=asdict(options), command=command)
    probe = LimitsProbe(options.device, dtype, threads=options.threads)
    constant = import_bytes()
    results = Results.of(workers, [cell.name for cell in options.cells])
    with tempfile.TemporaryDirectory(prefix="vkv-bench-") as home:
        scratch = Path(home)
        source = options.model or _drawn_on_a_gpu(options, dtype, scratch)
        saved = save_checkpoints(options.shape, source, dtype, options.quant, scratch=scratch)

        def findings() -> Findings:
            return Findings(
                results=as_record(results, saved, options.repeats, constant),
                tables=_tables(options, workers, saved, results, constant, probe.limits()),
                draw=partial(draw, results.samples),
            )

        steps = _all_repeats(workers, options, saved, scratch, results, probe)
        return record.grow(steps, findings, probe)


def _tables(
    options: ThroughputOptions,
    workers: Iterable[str],
    checkpoints: Checkpoints,
    results: Results,
    constant: int,
    limits: Limits,
) -> list[Table]:
    return tables(
        results,
        checkpoints,
        repeats=options.repeats,
        baseline=next(iter(workers)),
        int4=[name for name in INT4_SYSTEMS if name in workers],
        decodes={cell.name: cell.decode_step for cell in options.cells if cell.kind == "decode"},
        held_tokens=max(cell.held_tokens for cell in options.cells),
        import_bytes=constant,
        limits=limits,
    )


# -- running -------------------------------------------------------------------------------------


def _drawn_on_a_gpu(options: ThroughputOptions, dtype: torch.dtype, scratch: Path) -> str | None:
    """A checkpoint of the shape, whose random weights take a CPU minutes; None without a GPU."""
    if options.device.type != "cuda":
        return None
    folder = scratch / "drawn"
    build_model(options.shape, dtype=dtype, device=options.device).save_pretrained(folder)
    torch.cuda.empty_cache()  # all of the GPU is the systems'
    return str(folder)


@contextmanager
def _started(
    workers: Mapping[str, Command],
    options: ThroughputOptions,
    checkpoints: Checkpoints,
    scratch: Path,
    results: Results,
) -> Iterator[dict[str, Worker]]:
    """All systems, loaded; one that does not load fails in every cell."""
    common = {
        "scratch": str(scratch),
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
            model = checkpoints.int4 if name in READ_INT4 else checkpoints.dense
            given = common | own | {"model": str(model)}
            try:
                running[name] = Worker(command, given, scratch / f"{name}.log")
                stack.callback(running[name].close)
                results.versions[name] = running[name].versions
            except WorkerFailed as error:
                results.fail(name, error)
        yield running


def _all_repeats(
    workers: Mapping[str, Command],
    options: ThroughputOptions,
    checkpoints: Checkpoints,
    scratch: Path,
    results: Results,
    probe: LimitsProbe,
) -> Generator[None, None, None]:
    """Fill `results`, a system and cell at a time; every other repeat in the other order."""
    console = Console(stderr=True)
    for repeat in range(options.repeats):
        console.print(f"repeat {repeat + 1} of {options.repeats}")
        probe.measure()
        with _started(workers, options, checkpoints, scratch, results) as running:
            _warm_up(running, options, results)
            rng = random.Random(options.seed)
            for cell in options.cells:
                if options.device.type == "cpu":  # a GPU's memory is the systems' now
                    probe.measure()
                prompts = [
                    [rng.randrange(checkpoints.vocab_size) for _ in range(n)]
                    for n in cell.prompt_lens
                ]
                # Whoever comes first finds another machine: caches, pages, clock.
                for name in running if repeat % 2 == 0 else reversed(running):
                    if cell.name not in results.failures[name]:
                        twice = options.device.type == "cuda" or compiles_by_shape(workers[name])
                        said = _time(
                            running[name], name, cell, prompts, checkpoints, results, probe, twice
                        )
                        console.print(f"  {cell.name:10} {name}: {said}", markup=False)
                        yield


def _warm_up(running: Mapping[str, Worker], options: ThroughputOptions, results: Results) -> None:
    first = options.cells[0]
    for name, worker in running.items():
        try:
            worker.run([[1] * first.prompt_lens[0]], [min(8, first.output_lens[0])])
        except WorkerFailed as error:
            results.fail(name, error)


def _time(
    worker: Worker,
    name: str,
    cell: Cell,
    prompts: Sequence[Sequence[int]],
    checkpoints: Checkpoints,
    results: Results,
    probe: LimitsProbe,
    twice: bool,
) -> str:
    """Add what a system took for a cell, or why it failed; returns that in words.

    With `twice` it has run the very same call once before.
    """
    try:
        if twice:
            worker.run(prompts, cell.output_lens)
        rate, timing, is_beyond = _measure_again(worker, cell, prompts, checkpoints, probe)
    except WorkerFailed as error:
        results.failures[name][cell.name] = str(error)
        return str(error)
    results.samples[name][cell.name].append(rate)
    results.first_tokens[name][cell.name] = list(timing.first_tokens)
    results.peaks[name] = timing.peak_rss_bytes
    results.weights[name] = timing.weight_bytes or checkpoints.weight_bytes
    results.reads[name] = timing.read_bytes or checkpoints.read_bytes
    if is_beyond:
        results.beyond[name].setdefault(cell.name, []).append(len(results.samples[name][cell.name]))
        return f"{rate:.1f} tokens/s, beyond what memory allows"
    return f"{rate:.1f} tokens/s"


def _measure_again(
    worker: Worker,
    cell: Cell,
    prompts: Sequence[Sequence[int]],
    checkpoints: Checkpoints,
    probe: LimitsProbe,
) -> tuple[float, Timing, bool]:
    """Tokens a second, what the worker says, and whether that is more than memory allows.

    Then it is measured again, with the limit.
    """

    def is_beyond(rate: float, timing: Timing) -> bool:
        if cell.kind != "decode":
            return False
        step = cell.decode_step
        weights = timing.read_bytes or checkpoints.read_bytes
        step_bytes = weights + step.kv_tokens * checkpoints.kv_bytes_per_token
        return rate > _DOUBT * probe.latest_read * step.num_tokens / step_bytes

    rate, timing = _measure(worker, cell, prompts)
    for _ in range(_AGAIN):
        if not is_beyond(rate, timing):
            break
        if probe.can_measure:
            probe.measure()
        rate, timing = _measure(worker, cell, prompts)
    return rate, timing, is_beyond(rate, timing)


def _measure(worker: Worker, cell: Cell, prompts: Sequence[Sequence[int]]) -> tuple[float, Timing]:
    """Tokens a second, and what the worker says."""
    if cell.kind == "prefill":
        timing = worker.run(prompts, [1] * len(prompts))
        return cell.num_tokens / timing.seconds, timing
    timing = worker.run(prompts, cell.output_lens)
    if cell.kind == "total":
        return cell.num_tokens / timing.seconds, timing
    if not timing.decode_tokens:
        raise WorkerFailed("there was no time at which all of its requests decoded")
    return timing.decode_tokens / timing.decode_seconds, timing
