"""`vkv bench session`: the time to a first token from a session on disk, against computing it.

A process saves a session. Fresh ones then meet its prompt, with a few more tokens, in turns: with
nothing but the model; with the session opened, its file in the system's cache, and with the cache
dropped. At last several open it at once, and say how much of the file is theirs in memory.
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

from ..limits import LimitsProbe
from ..peers.peer import WORKERS
from ..record import Findings, Record, Table, record_name
from .options import SessionOptions
from .shapes import build_model

WAYS = ("compute", "open cold", "open warm")
_WORKER = WORKERS / "session_worker.py"
_WORDS = {
    "compute": "computed",
    "open cold": "opened, file not in the system's cache",
    "open warm": "opened, file in the system's cache",
}

Answer = dict[str, Any]


def run(options: SessionOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path.

    Raises RuntimeError if a process fails, or if the ways do not give the same token.
    """
    dtype, device = getattr(torch, options.dtype), torch.device("cpu")
    name = record_name("session", options.shape, options.label)
    record = Record(folder, name, device=device, config=asdict(options), command=command)
    probe = LimitsProbe(device, dtype, threads=options.threads)
    saved: Answer = {}
    answers: dict[str, list[Answer]] = {way: [] for way in WAYS}
    together: list[Answer] = []

    def steps() -> Generator[None, None, None]:
        with tempfile.TemporaryDirectory(prefix="vkv-bench-", dir=options.scratch) as scratch:
            wanted = _prepare(options, Path(scratch), dtype)
            yield from _measure(options, wanted, probe, saved, answers, together)

    def findings() -> Findings:
        return Findings(
            results={"saved": saved, "answers": answers, "together": together},
            tables=[_time_table(options, saved, answers), _memory_table(saved, together)],
            draw=partial(_plot, answers),
        )

    return record.grow(steps(), findings, probe)


def _prepare(options: SessionOptions, scratch: Path, dtype: torch.dtype) -> Answer:
    """A model in `scratch`, and what every process is told."""
    model = build_model(options.shape, dtype=dtype, device=torch.device("cpu"), seed=options.seed)
    model.save_pretrained(scratch / "model")
    return {
        "model": str(scratch / "model"),
        "path": str(scratch / "session.kv"),
        "dtype": options.dtype,
        "threads": options.threads,
        "tokens": options.tokens,
        "more_tokens": options.more_tokens,
        "vocab_size": model.config.vocab_size,
        "seed": options.seed,
    }


def _measure(
    options: SessionOptions,
    wanted: Answer,
    probe: LimitsProbe,
    saved: Answer,
    answers: Mapping[str, list[Answer]],
    together: list[Answer],
) -> Generator[None, None, None]:
    console = Console(stderr=True)
    probe.measure()
    (first,) = _ask(wanted, "save")
    saved.update(first)
    for repeat in range(options.repeats):
        for way in WAYS:
            (answer,) = _ask(wanted, way)
            answers[way].append(answer)
            console.print(
                f"{repeat + 1}/{options.repeats}  {way}: {answer['first_token_s']:.3f} s",
                highlight=False,
            )
            _check(options, way, answer, answers["compute"][0])
        yield
    together.extend(_ask(wanted, "open warm", options.processes))
    yield


def _check(options: SessionOptions, way: str, answer: Answer, computed: Answer) -> None:
    if answer["token"] != computed["token"]:
        raise RuntimeError(f"{way} gave token {answer['token']}, not {computed['token']}")
    if way != "compute" and answer["num_cached"] != options.tokens:
        raise RuntimeError(f"{way} found {answer['num_cached']} of {options.tokens} tokens")


def _ask(wanted: Answer, way: str, count: int = 1) -> list[Answer]:
    """What `count` processes answer that live at the same time."""
    told = json.dumps({**wanted, "does": way, "hold": count > 1})
    workers = [
        subprocess.Popen(
            [sys.executable, str(_WORKER), told],
            env=os.environ | {"OMP_NUM_THREADS": str(wanted["threads"])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    try:
        answers = [_line(worker, way) for worker in workers]
        if count > 1:
            for worker, answer in zip(workers, answers, strict=True):
                answer.update(_line(worker, way, "\n"))
        return answers
    finally:
        for worker in workers:
            worker.communicate("\n" if worker.poll() is None else None)


def _line(worker: "subprocess.Popen[str]", way: str, said: str = "") -> Answer:
    assert worker.stdin is not None
    assert worker.stdout is not None
    if said:
        worker.stdin.write(said)
        worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a process that was to {way} ended with {worker.wait()}")
    return json.loads(line)


# -- results ---------------------------------------------------------------------------------


def _median(answers: Sequence[Answer], name: str) -> float:
    return statistics.median(answer[name] for answer in answers)


def _time_table(
    options: SessionOptions, saved: Answer, answers: Mapping[str, Sequence[Answer]]
) -> Table:
    computed = answers["compute"]
    rows: list[list[str]] = []
    for way, found in answers.items():
        if found:
            seconds = _median(found, "first_token_s")
            opened = _median(found, "open_s") * 1e3 if way != "compute" else None
            rows.append(
                [
                    _WORDS[way],
                    f"{seconds:.3f}",
                    "" if opened is None else f"{opened:.1f}",
                    f"{_median(computed, 'first_token_s') / seconds:,.1f}",
                ]
            )
    size = saved.get("num_bytes", 0) / 2**20
    return Table(
        title=f"Time to the first token behind {options.tokens:,} tokens (medians)",
        columns=["how", "first token, s", "of which opening, ms", "times as fast"],
        rows=rows,
        notes=[f"The file has {size:,.0f} MiB and was saved in {saved.get('save_s', 0):.2f} s."],
    )


def _memory_table(saved: Answer, together: Sequence[Answer]) -> Table:
    size = saved.get("num_bytes", 0) / 2**20
    rows = []
    if together:
        rss = _median(together, "rss_bytes") / 2**20
        pss = _median(together, "pss_bytes") / 2**20
        rows.append([f"{len(together)}", f"{size:,.1f}", f"{rss:,.1f}", f"{pss:,.2f}"])
    return Table(
        title="The file in memory, processes that have it open together (medians)",
        columns=["processes", "file, MiB", "resident, MiB each", "share, MiB each"],
        rows=rows,
    )


def _plot(answers: Mapping[str, Sequence[Answer]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.5))
    axes = figure.subplots()
    shown = {_WORDS[way]: _median(found, "first_token_s") for way, found in answers.items()}
    axes.barh(list(shown), list(shown.values()), color="#0a7")
    axes.invert_yaxis()
    axes.set_xlabel("seconds to the first token (median)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
