"""`vkv bench serve --server` and `--peer`: servers over HTTP, beside the library itself.

All get the same requests at the same times, and take turns: the engine in this process without a
server (`library`), servers that are there, and servers that are started on the loopback for it.
"""

import asyncio
import os
import statistics
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...runtime.frontend.llm import LLM
from ...runtime.frontend.progress import counted
from ..driver import Driver
from ..limits import LimitsProbe
from ..models.checkpoints import save_checkpoints
from ..peers.peer import WorkerFailed
from ..record import Findings, Record, Table, record_name
from .client import Trace, drive
from .http_client import Endpoint, drive_server
from .http_servers import Footprint, Started, as_gguf, checked, named, running
from .options import ServeOptions
from .serve import loads_of, works_of
from .serve_metrics import vllm_metrics
from .workloads import WorkItem

LIBRARY = "library"
SERVER = "vkv"
_OF_RAY = ("gcs_server", "raylet", "monitor.py", "log_monitor.py", "dashboard.py")
_SHOWN = {
    "output_throughput": "output tokens/s",
    "request_goodput": "goodput, requests/s",
    "median_ttft_ms": "TTFT p50",
    "p95_ttft_ms": "TTFT p95",
    "median_tpot_ms": "TPOT p50",
    "p95_tpot_ms": "TPOT p95",
    "median_itl_ms": "ITL p50",
    "p95_itl_ms": "ITL p95",
    "median_e2el_ms": "E2E p50",
    "p95_e2el_ms": "E2E p95",
}


Work = dict[str, list[WorkItem]]
Drive = Callable[[Sequence[WorkItem], Sequence[float]], Trace]
Cell = tuple[str, str, str]
"""A system, a workload and a load."""


@dataclass
class _Found:
    """What each cell came to, once for each repeat."""

    metrics: dict[Cell, list[dict[str, float]]] = field(default_factory=dict)
    traces: dict[Cell, list[Trace]] = field(default_factory=dict)
    footprints: dict[str, list[Footprint]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, cell: Cell, trace: Trace, metrics: dict[str, float]) -> None:
        self.metrics.setdefault(cell, []).append(metrics)
        self.traces.setdefault(cell, []).append(trace)


def run(options: ServeOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    name = record_name("serve-http", options.shape, options.label)
    record = Record(folder, name, device=options.device, config=asdict(options), command=command)
    bench = _Bench(options)
    return record.grow(bench.steps(), bench.findings, bench.probe)


class _Bench:
    """Systems that take turns."""

    def __init__(self, options: ServeOptions) -> None:
        self.probe = LimitsProbe(options.device, options.dtype)
        self._options = options
        self._peers, self._servers = checked(options.peers), named(options.servers)
        self._found = _Found()

    def steps(self) -> Generator[None, None, None]:
        """One for each system and repeat."""
        options = self._options
        systems = (LIBRARY, *self._servers, *self._peers)
        with tempfile.TemporaryDirectory(prefix="vkv-bench-") as scratch:
            saved = save_checkpoints(options.shape, None, options.dtype, None, Path(scratch))
            works = works_of(options, saved.vocab_size, saved.max_positions)
            loads = loads_of(options)
            total = options.repeats * len(systems) * len(works) * len(loads)
            with counted("requests", total * options.num_requests) as advance:
                for _ in range(options.repeats):
                    for system in systems:
                        self.probe.measure()
                        self._turn(system, works, loads, saved.dense, Path(scratch), advance)
                        yield

    def _turn(
        self,
        system: str,
        works: Work,
        loads: dict[str, list[float]],
        model: Path,
        scratch: Path,
        advance: Callable[[], None],
    ) -> None:
        max_len = max(item.num_tokens for work in works.values() for item in work)
        try:
            with self._system(system, model, max_len, scratch, advance) as drive_it:
                some = next(iter(works.values()))[0]
                drive_it([WorkItem(some.prompt[:16], 2)], [0.0])  # warms it up
                for workload, work in works.items():
                    for load, arrivals_s in loads.items():
                        trace = drive_it(work, arrivals_s)
                        metrics = vllm_metrics(trace, self._options.targets)
                        self._found.add((system, workload, load), trace, metrics)
        except ExceptionGroup as group:
            self._found.failures[system] = str(group.exceptions[0])
        except (WorkerFailed, OSError) as error:
            self._found.failures[system] = str(error)

    @contextmanager
    def _system(
        self, system: str, model: Path, max_len: int, scratch: Path, advance: Callable[[], None]
    ) -> Generator[Drive]:
        """A system ready to be driven."""
        options = self._options
        if system == LIBRARY:
            with LLM(
                model,
                dtype=options.dtype,
                device=options.device,
                max_seqs=options.max_seqs,
                max_len=max_len,
                max_batch_tokens=next(iter(options.budgets), None),
            ) as llm:
                driver = Driver(llm)
                yield lambda work, arrivals_s: drive(driver, work, arrivals_s, on_finish=advance)
        elif system in self._servers:
            yield _over_http(Endpoint(url=self._servers[system]), advance)
        else:
            server = Started(
                name=system,
                interpreter=self._peers[system],
                model=as_gguf(model, scratch, options.dtype) if system == "llama-cpp" else model,
                dtype=str(options.dtype).removeprefix("torch."),
                threads=len(os.sched_getaffinity(0)),
                max_seqs=options.max_seqs,
                max_len=max_len,
                max_batch_tokens=next(iter(options.budgets), None),
            )
            with running(server, scratch / f"{system}.log") as (endpoint, footprint):
                self._found.footprints.setdefault(system, []).append(footprint)
                yield _over_http(endpoint, advance)

    def findings(self) -> Findings:
        """So far."""
        found = self._found
        return Findings(
            results={
                "runs": _as_records(found),
                "footprints": {
                    system: [asdict(footprint) for footprint in all_of_them]
                    for system, all_of_them in found.footprints.items()
                },
                "failures": found.failures,
            },
            tables=_tables(found),
            draw=partial(_plot, found),
        )


def _over_http(endpoint: Endpoint, advance: Callable[[], None]) -> Drive:
    return lambda work, arrivals_s: asyncio.run(
        drive_server(endpoint, work, arrivals_s, on_finish=advance)
    )


# -- results -----------------------------------------------------------------------------------


def _as_records(found: _Found) -> list[dict[str, Any]]:
    """Metrics, and the raw samples in seconds, under the names that vLLM gives them."""
    return [
        {
            "system": system,
            "workload": workload,
            "load": load,
            "repeat": repeat,
            **metrics,
            "input_lens": [request.num_prompt_tokens for request in trace.requests],
            "output_lens": [len(request.token_times_s) for request in trace.requests],
            "arrivals": [request.arrival_s for request in trace.requests],
            "ttfts": [request.ttft_s for request in trace.requests],
            "e2els": [request.e2e_s for request in trace.requests],
        }
        for (system, workload, load), runs in found.metrics.items()
        for repeat, (metrics, trace) in enumerate(
            zip(runs, found.traces[system, workload, load], strict=True)
        )
    ]


def _median(runs: Sequence[dict[str, float]], name: str) -> float | None:
    values = [metrics[name] for metrics in runs if name in metrics]
    return statistics.median(values) if values else None


def _tables(found: _Found) -> list[Table]:
    table = Table(
        title="Over HTTP and without: medians of repeats, times in ms",
        columns=["workload", "load", "system", *_SHOWN.values()],
        rows=[
            [workload, load, system, *(_rounded(_median(runs, name)) for name in _SHOWN)]
            for (system, workload, load), runs in found.metrics.items()
        ],
    )
    tables = [table, _ratios(found, LIBRARY, "the library without a server")]
    if SERVER in {system for system, *_ in found.metrics}:
        tables.append(_ratios(found, SERVER, "a server with one engine"))
    tables.append(_footprints(found))
    failed = Table(
        title="Not measured", columns=["system", "reason"], rows=list(found.failures.items())
    )
    return [*(one for one in tables if one.rows), *([failed] if found.failures else [])]


def _ratios(found: _Found, base: str, words: str) -> Table:
    """What is measured beside `base`, over it."""
    rows = []
    for (system, workload, load), runs in found.metrics.items():
        others = found.metrics.get((base, workload, load))
        if system in (base, LIBRARY) or not others:
            continue
        pairs = list(zip(runs, others, strict=False))
        ratios = [one["output_throughput"] / other["output_throughput"] for one, other in pairs]
        later = [one["median_ttft_ms"] - other["median_ttft_ms"] for one, other in pairs]
        figures = (f"{statistics.median(ratios):.3f}", f"{statistics.median(later):+.2f}")
        rows.append([workload, load, system, *figures])
    return Table(
        title=f"To {words}, medians of the repeats' pairs",
        columns=["workload", "load", "system", "output tokens/s, ratio", "TTFT p50, ms later"],
        rows=rows,
    )


def _footprints(found: _Found) -> Table:
    """Ray's processes go by their own names; the first is the server's, or its front's."""
    rows = []
    for system, footprints in found.footprints.items():
        last = footprints[-1]
        of_ray = [num_bytes for name, num_bytes in last.processes if _is_of_ray(name)]
        rows.append(
            [
                system,
                f"{statistics.median(one.ready_s for one in footprints):.1f}",
                str(len(last.processes)),
                f"{statistics.median(one.num_bytes for one in footprints) / 2**20:.0f}",
                str(len(of_ray)),
                f"{sum(of_ray) / 2**20:.0f}",
            ]
        )
    return Table(
        title="Started here: until ready, and memory then (PSS, weights and the engine included)",
        columns=["system", "s", "processes", "MiB", "of them Ray's own", "their MiB"],
        rows=rows,
    )


def _is_of_ray(program: str) -> bool:
    """Whether a program is one of Ray's, and not an actor of ours."""
    is_worker = program.startswith("ray::")
    return program in _OF_RAY or (is_worker and program != "ray::InstanceActor")


def _rounded(number: float | None) -> str:
    if number is None:
        return "–"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _plot(found: _Found, path: Path) -> None:
    """For each workload and load: how many requests had their first token later than so much."""
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((workload, load) for _, workload, load in found.metrics))
    figure = Figure(figsize=(max(6, 4.2 * len(places)), 4))
    panels = figure.subplots(1, max(1, len(places)), squeeze=False)
    for panel, (workload, load) in zip(panels[0], places, strict=False):
        for (system, *where), traces in found.traces.items():
            if where == [workload, load]:
                ms = sorted(r.ttft_s * 1e3 for trace in traces for r in trace.requests)
                panel.plot(ms, [1 - i / len(ms) for i in range(len(ms))], label=system)
        panel.set_title(f"{workload}, {load}")
        panel.set_xscale("log")
        panel.set_xlabel("time to the first token, ms")
        panel.set_ylabel("share of requests that took longer")
        panel.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
