"""`vkv bench vmm`: what every driver call costs, by page size and by length of the run.

A run of pages goes through its whole life, again and again: reserved, created, mapped new, mapped
again as recycled pages are, mapped scattered (no page follows its predecessor in physical memory,
the worst case of a run), unmapped after each, released. Measured are the operations of
`VmemDriver` as a whole, and beneath them every call to the system or the CUDA driver, by kind.
"""

import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...runtime.frontend.progress import counted
from ...vmem import VmemDriver, open_driver
from ...vmem.errors import InvalidConfig
from ..limits import LimitsProbe
from ..record import Findings, Record, Table, record_name
from .options import VmmOptions

_HOST_PAGE_BYTES = (64 << 10, 256 << 10, 1 << 20, 2 << 20)
_CUDA_MULTIPLES = (1, 4, 8)  # of the granularity

OPERATIONS = ("create", "map new", "map again", "map scattered", "unmap", "release")


@dataclass
class Timing:
    """An operation over one run of pages, repeated.

    Attributes:
        wall_s: of the whole operation, each time.
        calls: driver calls in all repetitions together, by kind.
        call_s: seconds in them together, by kind.
    """

    wall_s: list[float] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    call_s: dict[str, float] = field(default_factory=dict)

    @property
    def median_s(self) -> float:
        return statistics.median(self.wall_s)


@dataclass(frozen=True, kw_only=True)
class RunTimings:
    """All operations over runs of one length, of pages of one size; on the host, huge or not."""

    page_bytes: int
    num_pages: int
    huge_pages: bool | None
    operations: Mapping[str, Timing]

    @property
    def page(self) -> str:
        """The kind of page, in words."""
        return _size(self.page_bytes) + (", huge" if self.huge_pages else "")

    @property
    def times_s(self) -> dict[str, float]:
        """What the tables and plots show: operations, and of mapping the access by itself."""
        times = {name: self.operations[name].median_s for name in OPERATIONS}
        again = self.operations["map again"]
        if "set_access" in again.call_s:  # on the host, mapping gives access, too
            times["its access"] = again.call_s["set_access"] / len(again.wall_s)
        return times


def run(options: VmmOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    name = record_name("vmm", options.device.type)
    record = Record(folder, name, device=options.device, config=asdict(options), command=command)
    plan = _plan(options.page_bytes or _default_page_bytes(options.device), options)
    timings: list[RunTimings] = []
    probe = LimitsProbe(options.device, torch.float32)

    def steps() -> Generator[None, None, None]:
        with counted("vmm", sum(len(runs) for runs in plan.values())) as advance:
            for page_bytes, runs in plan.items():
                probe.measure()
                for timing in _of_pages(options, page_bytes, runs):
                    timings.append(timing)
                    advance()
                    yield

    def findings() -> Findings:
        tables = [_operation_table(timings, per_page) for per_page in (True, False)]
        return Findings(
            results={"timings": [asdict(timing) for timing in timings]},
            tables=[*tables, _call_table(timings)],
            draw=partial(_plot, timings),
        )

    return record.grow(steps(), findings, probe)


def _of_pages(options: VmmOptions, page_bytes: int, runs: Sequence[int]) -> Iterator[RunTimings]:
    """The timings of each length of run, of pages of one size."""
    with open_driver(options.device, page_bytes) as driver:
        _live(driver, 1, 1)  # what happens only once, beforehand
        for num_pages in runs:
            yield RunTimings(
                page_bytes=page_bytes,
                num_pages=num_pages,
                huge_pages=getattr(driver, "huge_pages", None),
                operations=_live(driver, num_pages, options.repeats),
            )


def _default_page_bytes(device: torch.device) -> tuple[int, ...]:
    if device.type == "cpu":
        return _HOST_PAGE_BYTES
    with open_driver(device) as driver:
        return tuple(multiple * driver.granularity for multiple in _CUDA_MULTIPLES)


def _plan(page_sizes: Sequence[int], options: VmmOptions) -> dict[int, list[int]]:
    """The runs of each page size that stay within the memory allowed."""
    if not options.runs or min(options.runs) < 1 or options.repeats < 1:
        raise InvalidConfig(
            f"runs are {options.runs} and repeats {options.repeats}; each must be at least 1"
        )
    plan = {
        size: [run for run in sorted(options.runs) if run * size <= options.max_bytes]
        for size in page_sizes
    }
    if too_large := [size for size, runs in plan.items() if not runs]:
        raise InvalidConfig(
            f"not one run of pages of {too_large[0]} bytes fits into {options.max_bytes}; raise "
            "--max-memory or choose smaller pages"
        )
    return plan


# -- measuring ---------------------------------------------------------------------------------


def _live(driver: VmemDriver, num_pages: int, repeats: int) -> dict[str, Timing]:
    """Take a run of pages through its life `repeats` times."""
    timings: dict[str, Timing] = {}

    def timed(name: str, operation: Callable[..., Any], *args: Any) -> Any:
        return _timed(driver, timings.setdefault(name, Timing()), operation, *args)

    size = num_pages * driver.page_bytes
    for _ in range(repeats):
        address = timed("reserve", driver.reserve, size)
        pages = timed("create", driver.create, num_pages)
        timed("map new", driver.map, address, pages)
        timed("unmap", driver.unmap, address, size)
        timed("map again", driver.map, address, pages)
        timed("unmap", driver.unmap, address, size)
        timed("map scattered", driver.map, address, pages[::-1])
        timed("unmap scattered", driver.unmap, address, size)
        timed("release", driver.release, pages)
        timed("free", driver.free, address)
    return timings


def _timed(driver: VmemDriver, timing: Timing, operation: Callable[..., Any], *args: Any) -> Any:
    """Run an operation, and add what it took, as a whole and in each kind of driver call."""
    calls, seconds = dict(driver.counters), dict(driver.call_times_s)
    start = time.perf_counter()
    result = operation(*args)
    timing.wall_s.append(time.perf_counter() - start)
    for kind, count in driver.counters.items():
        if new := count - calls.get(kind, 0):
            timing.calls[kind] = timing.calls.get(kind, 0) + new
            spent = driver.call_times_s[kind] - seconds.get(kind, 0.0)
            timing.call_s[kind] = timing.call_s.get(kind, 0.0) + spent
    return result


# -- results -----------------------------------------------------------------------------------


def _operation_table(timings: Sequence[RunTimings], per_page: bool) -> Table:
    rows = []
    for timing in timings:
        divisor = timing.num_pages if per_page else 1
        times = [_microseconds(seconds / divisor) for seconds in timing.times_s.values()]
        rows.append([timing.page, str(timing.num_pages), *times])
    unit = "a page" if per_page else "a run"
    return Table(
        title=f"Operations, µs {unit} (median)",
        columns=["page", "run, pages", *timings[0].times_s],
        rows=rows,
    )


def _call_table(timings: Sequence[RunTimings]) -> Table:
    """The driver calls under the operations, for the shortest and longest run of each page size."""
    rows = []
    for page_bytes in dict.fromkeys(timing.page_bytes for timing in timings):
        of_size = [timing for timing in timings if timing.page_bytes == page_bytes]
        for index in dict.fromkeys((0, len(of_size) - 1)):
            rows += _call_rows(of_size[index])
    return Table(
        title="Driver calls under them (mean)",
        columns=[
            "page",
            "run, pages",
            "operation",
            "call",
            "calls a run",
            "µs a call",
            "µs a page",
        ],
        rows=rows,
    )


def _call_rows(timing: RunTimings) -> list[list[str]]:
    return [
        [
            timing.page,
            str(timing.num_pages),
            name,
            kind,
            f"{count / len(operation.wall_s):g}",
            _microseconds(operation.call_s[kind] / count),
            _microseconds(operation.call_s[kind] / len(operation.wall_s) / timing.num_pages),
        ]
        for name, operation in timing.operations.items()
        for kind, count in operation.calls.items()
    ]


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if not num_bytes % (1 << 20) else f"{num_bytes >> 10} KiB"


def _plot(timings: Sequence[RunTimings], path: Path) -> None:
    """Left, every operation on the largest pages; right, recycled pages of every size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5))
    left, right = figure.subplots(1, 2)
    size = max(timing.page_bytes for timing in timings)
    largest = [timing for timing in timings if timing.page_bytes == size]
    for name in largest[0].times_s:
        _line(left, largest, name, label=name)
    left.set_title(f"pages of {largest[0].page}")
    for page_bytes in sorted({timing.page_bytes for timing in timings}):
        of_size = [timing for timing in timings if timing.page_bytes == page_bytes]
        _line(right, of_size, "map again", label=of_size[0].page)
    right.set_title("mapping recycled pages")
    for axes in (left, right):
        axes.set_xlabel("run, pages")
        axes.set_ylabel("µs a page")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _line(axes: Any, timings: Sequence[RunTimings], name: str, *, label: str) -> None:
    per_page = [t.times_s[name] / t.num_pages * 1e6 for t in timings]
    axes.plot([t.num_pages for t in timings], per_page, marker=".", label=label)
