"""`vkv bench first-token`: from the start of a process to the first token, model and all.

Every start is a fresh process, and the systems take turns. Each is started once unseen before: the
model's file is in the system's cache then, and whatever a system makes of it once is made. Of
llama.cpp it is its server, since that is what its users start; it answers over HTTP, which takes
milliseconds. What Python's imports take is measured beside, in processes that do nothing else.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ...vmem.errors import InvalidConfig
from ..limits import LimitsProbe
from ..load.http_servers import as_gguf
from ..options import torch_dtype
from ..peers.peer import Worker, WorkerFailed
from ..record import Findings, Record, Table, record_name
from .checkpoints import Checkpoints, parse_format, save_checkpoints
from .options import FirstTokenOptions
from .systems import READ_INT4, Command, commands

_PROGRAM = "llama-server"
_UNWARMED = f"{_PROGRAM}, no warm-up"
_WAIT_S, _POLL_S = 120.0, 0.002
_ROOM = 256  # tokens that each has room for behind the prompt
_END = "; import os; os._exit(0)"  # what Python does at its end is not waited for
IMPORTS: Mapping[str, str] = {
    "Python alone": "pass",
    "import torch": "import torch",
    "transformers' models too": "import torch; from transformers import PreTrainedModel",
    "all that vkv.LLM imports": "import vkv; vkv.LLM",
}


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds from the start of each process, by system.

    Attributes:
        ready: until it takes requests.
        first_token: until the first request's first token is there.
        imports: of processes that only import, until they end.
        failures: why a system has none.
    """

    ready: dict[str, list[float]] = field(default_factory=dict)
    first_token: dict[str, list[float]] = field(default_factory=dict)
    imports: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)


Start = Callable[[], tuple[float, float]]  # seconds until ready, and until the first token


def run(options: FirstTokenOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    dtype, cpu = torch_dtype(options.dtype), torch.device("cpu")
    peers = dict(options.peers)
    program = peers.pop(_PROGRAM, None)
    if program is not None and not Path(program).is_file():
        raise InvalidConfig(f"peer {_PROGRAM} has no program at {program}")
    quant = parse_format(options.quant) is not None
    workers = commands(options.systems, peers, quant=quant, rounds_inputs=dtype == torch.bfloat16)
    model = options.shape if options.model is None else Path(options.model).name
    name = record_name("first-token", model, options.quant, options.label)
    record = Record(folder, name, device=cpu, config=asdict(options), command=command)
    probe, times = LimitsProbe(cpu, dtype, threads=options.threads), Times()

    def steps() -> Generator[None, None, None]:
        probe.measure()
        with tempfile.TemporaryDirectory(prefix="vkv-bench-") as home:
            scratch = Path(home)
            saved = save_checkpoints(options.shape, options.model, dtype, options.quant, scratch)
            starts = _starts(options, workers, program, saved, scratch, times)
            yield from _all_repeats(options, starts, times)

    def findings() -> Findings:
        found = _tables(times, program is not None)
        return Findings(results=asdict(times), tables=found, draw=partial(_plot, times))

    return record.grow(steps(), findings, probe)


def _starts(
    options: FirstTokenOptions,
    workers: Mapping[str, Command],
    program: str | None,
    saved: Checkpoints,
    scratch: Path,
    times: Times,
) -> dict[str, Start]:
    """How each system is started. Raises WorkerFailed if a model cannot be written for one."""
    prompt = [1 + i % (saved.vocab_size - 1) for i in range(options.prompt_len)]
    total = options.prompt_len + _ROOM
    common = {
        "scratch": str(scratch),
        "device": "cpu",
        "dtype": options.dtype,
        "threads": options.threads,
        "batch": 1,
        "max_seqs": 1,
        "max_len": total,
        "total_tokens": total,
    }
    starts: dict[str, Start] = {}
    for name, command in workers.items():
        model = saved.int4 if name in READ_INT4 else saved.dense
        given = common | {"model": str(model)} | command.own
        log = scratch / f"{name}.log"
        starts[name] = partial(_start_worker, name, command.words, given, log, prompt, times)
    if program is not None:
        gguf = as_gguf(saved.dense, scratch, torch_dtype(options.dtype))
        words = [program, "--model", str(gguf), "--threads", str(options.threads)]
        words += ["--parallel", "1", "--ctx-size", str(total)]
        log = scratch / "llama-server.log"
        starts[_PROGRAM] = partial(_start_server, words, log, prompt)
        starts[_UNWARMED] = partial(_start_server, [*words, "--no-warmup"], log, prompt)
    return starts


def _all_repeats(
    options: FirstTokenOptions, starts: Mapping[str, Start], times: Times
) -> Generator[None, None, None]:
    """Fill `times`, all systems and imports in turns; every other repeat in the other order."""
    console = Console(stderr=True)
    imports = {name: partial(_import, code) for name, code in IMPORTS.items()}
    for name, start in starts.items():
        try:
            start()
        except WorkerFailed as error:
            times.failures[name] = str(error)
            console.print(f"{name}: {error}", markup=False)
    working = {name: start for name, start in starts.items() if name not in times.failures}
    for repeat in range(options.repeats):
        names = list(working)
        for name in names if repeat % 2 == 0 else reversed(names):
            ready_s, first_token_s = working[name]()
            times.ready.setdefault(name, []).append(ready_s)
            times.first_token.setdefault(name, []).append(first_token_s)
            console.print(f"  {repeat + 1}/{options.repeats} {name}: {first_token_s:.2f} s")
        for name, seconds in imports.items():
            times.imports.setdefault(name, []).append(seconds())
        yield


# -- one start -----------------------------------------------------------------------------------


def _start_worker(
    name: str,
    words: Sequence[str],
    given: Mapping[str, object],
    log: Path,
    prompt: Sequence[int],
    times: Times,
) -> tuple[float, float]:
    begun_s = time.perf_counter()
    worker = Worker(words, given, log)
    try:
        ready_s = time.perf_counter() - begun_s
        worker.run([prompt], [1])
        first_token_s = time.perf_counter() - begun_s
    finally:
        worker.close()
    times.versions[name] = worker.versions
    return ready_s, first_token_s


def _start_server(words: Sequence[str], log: Path, prompt: Sequence[int]) -> tuple[float, float]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    begun_s = time.perf_counter()
    with _process([*words, "--host", "127.0.0.1", "--port", str(port)], log) as process:
        url = f"http://127.0.0.1:{port}"
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.perf_counter() - begun_s > _WAIT_S:
                said = log.read_text(errors="replace")[-300:]
                raise WorkerFailed(f"{words[0]} did not come up: {said}")
            time.sleep(_POLL_S)
        ready_s = time.perf_counter() - begun_s
        asked = {"prompt": list(prompt), "n_predict": 1, "temperature": 0}
        if not _answers(f"{url}/completion", json.dumps(asked).encode()):
            raise WorkerFailed(f"{words[0]} takes no prompt of token ids")
        return ready_s, time.perf_counter() - begun_s


@contextmanager
def _process(words: Sequence[str], log: Path) -> Generator[subprocess.Popen[bytes], None, None]:
    with ExitStack() as stack:
        file = stack.enter_context(log.open("ab"))
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _answers(url: str, body: bytes | None = None) -> bool:
    """Whether a server takes a request: while it loads, it refuses."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_WAIT_S) as answer:
            answer.read()
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _import(code: str) -> float:
    begun_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code + _END], check=True, env=os.environ)
    return time.perf_counter() - begun_s


# -- what was found ------------------------------------------------------------------------------


def _tables(times: Times, has_server: bool) -> list[Table]:
    reference = _UNWARMED if has_server and _UNWARMED in times.first_token else None
    over = [] if reference is None else [f"over {reference}"]
    rows = []
    for name, seconds in times.first_token.items():
        pairs = zip(seconds, times.first_token.get(reference or name, seconds), strict=False)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        figures = (statistics.median(times.ready[name]), statistics.median(seconds))
        spread = (min(seconds), max(seconds))
        cells = [f"{figure:.2f}" for figure in (*figures, *spread)]
        rows.append([name, *cells, *(f"{ratio:.2f}" for _ in over)])
    found = [
        Table(
            title="Seconds from the start of a process",
            columns=["system", "ready", "first token", "shortest", "longest", *over],
            rows=rows,
        ),
        Table(
            title="Seconds that imports take of it, in processes of their own",
            columns=["process", "median", "shortest", "longest"],
            rows=[
                [name, *(f"{f:.2f}" for f in (statistics.median(s), min(s), max(s)))]
                for name, s in times.imports.items()
            ],
        ),
    ]
    if times.failures:
        failed = [[name, text] for name, text in times.failures.items()]
        found.append(Table(title="Not measured", columns=["system", "reason"], rows=failed))
    return found


def _plot(times: Times, path: Path) -> None:
    from matplotlib.figure import Figure

    bars = {**times.imports, **times.first_token}
    figure = Figure(figsize=(7, 1 + 0.3 * len(bars)))
    axes = figure.subplots()
    colours = ["#89a"] * len(times.imports) + ["#0a7"] * len(times.first_token)
    axes.barh(list(bars), [statistics.median(seconds) for seconds in bars.values()], color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("seconds (median)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
