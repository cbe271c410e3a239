"""`vkv bench schedule`: what a request costs the scheduler, by how many wait in line.

The scheduler and a cache as they are, and no model: a step's tokens are made up. Requests are
queued, some in the middle of the line are dropped, and then steps run while for each request that
finishes another is queued, so that the line stays as long. Lines take turns. By priority, a request
that comes may take the slot of another, which costs both of them.
"""

import itertools
import statistics
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from ...allocator import LayerGeometry, PagedKVCache, PagedLayout
from ...runtime.frontend.progress import counted
from ...runtime.request.request import Request
from ...runtime.request.sampling_params import SamplingParams
from ...runtime.request.sampling_state import SamplingState
from ...runtime.request.spec import RequestSpec
from ...runtime.scheduling.plan import Order
from ...runtime.scheduling.policies import Fair, Fcfs, Priority, SplitFuse
from ...runtime.scheduling.scheduler import Scheduler
from ..limits import LimitsProbe
from ..record import Findings, Record, Table
from .options import ScheduleOptions

_PROMPT_TOKENS, _OUTPUT_TOKENS, _BLOCK_TOKENS = 40, 8, 16
_PARAMS = SamplingParams(max_tokens=_OUTPUT_TOKENS)
_NUM_DROPPED = 50
_NUM_KINDS = 1000  # of priorities and tenants


@dataclass
class Costs:
    """Microseconds a request, one figure for each repeat."""

    add: list[float] = field(default_factory=list)
    schedule: list[float] = field(default_factory=list)
    abort: list[float] = field(default_factory=list)


def run(options: ScheduleOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    cpu = torch.device("cpu")
    policy = options.scheduling_policy
    name = "schedule" if policy == "fcfs" else f"schedule-{policy}"
    record = Record(folder, name, device=cpu, config=asdict(options), command=command)
    probe = LimitsProbe(cpu, torch.float32)
    costs = {num_queued: Costs() for num_queued in options.queued}

    def steps() -> Generator[None, None, None]:
        probe.measure()
        with counted("schedule", options.repeats) as advance:
            for _ in range(options.repeats):
                for num_queued, found in costs.items():
                    _measure(num_queued, options, found)
                advance()
                yield

    def findings() -> Findings:
        return Findings(
            results={"microseconds": {n: asdict(found) for n, found in costs.items()}},
            tables=[_table(costs, policy)],
            draw=partial(_plot, costs),
        )

    return record.grow(steps(), findings, probe)


def _measure(num_queued: int, options: ScheduleOptions, costs: Costs) -> None:
    scheduler = _scheduler(options)
    requests = _requests(1 if options.scheduling_policy == "fcfs" else _NUM_KINDS)
    queued = list(itertools.islice(requests, num_queued))
    start = time.perf_counter()
    for request in queued:
        scheduler.add(request)
    costs.add.append(_each(start, num_queued))

    middle = num_queued // 2
    dropped = queued[middle : middle + _NUM_DROPPED]
    others = list(itertools.islice(requests, options.num_finished + len(dropped)))
    start = time.perf_counter()
    for request in dropped:
        scheduler.abort(request)
    costs.abort.append(_each(start, len(dropped)))
    for _ in dropped:
        scheduler.add(others.pop())

    num_finished = 0
    start = time.perf_counter()
    while num_finished < options.num_finished:
        for request in _step(scheduler):
            num_finished += 1
            if others:
                scheduler.add(others.pop())
            assert request.is_finished
    costs.schedule.append(_each(start, num_finished))
    scheduler.cache.shutdown()


def _scheduler(options: ScheduleOptions) -> Scheduler:
    max_seqs = options.max_seqs
    geometry = LayerGeometry(num_kv_heads=1, key_dim=1, value_dim=1)
    layout = PagedLayout((geometry,), torch.float32, max_len=256, block_tokens=_BLOCK_TOKENS)
    num_pages = 4 * max_seqs * layout.num_pages(_PROMPT_TOKENS + _OUTPUT_TOKENS)
    cache = PagedKVCache(
        layout, num_pages * layout.page_bytes, num_slots=2 * max_seqs, max_parked=max_seqs
    )
    orders: dict[str, Order] = {order.name: order for order in (Fcfs(), Priority(), Fair())}
    policy = SplitFuse(orders[options.scheduling_policy])
    return Scheduler(cache, policy, max_seqs=max_seqs, max_batch_tokens=256)


def _requests(num_kinds: int) -> Generator[Request, None, None]:
    """Requests whose prompts have nothing in common, of so many priorities and tenants."""
    for number in itertools.count():
        tokens = [(number * 7919 + i * i) % 50_021 for i in range(_PROMPT_TOKENS)]
        kind = number * 7919 % num_kinds
        spec = RequestSpec(
            request_id=str(number),
            prompt_token_ids=tokens,
            params=_PARAMS,
            priority=kind,
            tenant=str(kind),
        )
        sampling = SamplingState(_PARAMS, tokens)
        yield Request(spec, max_tokens=_OUTPUT_TOKENS, sampling=sampling)


def _step(scheduler: Scheduler) -> list[Request]:
    """A step whose tokens are all 0; returns the requests that ended."""
    ended: list[Request] = []
    for item in scheduler.schedule().items:
        request, samples = item.request, item.samples
        request.num_computed += item.num_tokens
        if samples:
            request.token_ids.append(0)
            scheduler.accounts.generated(request)
            if request.num_output_tokens == _OUTPUT_TOKENS:
                scheduler.finish(request)
                ended.append(request)
    return ended


def _each(start: float, count: int) -> float:
    return (time.perf_counter() - start) / count * 1e6


def _table(costs: Mapping[int, Costs], policy: str) -> Table:
    medians = {
        n: [statistics.median(part) for part in (c.add, c.schedule, c.abort)]
        for n, c in costs.items()
        if c.abort
    }
    first = next(iter(medians.values()), [])
    rows = [
        [f"{n:,}", *(f"{figure:.1f}" for figure in found), f"{sum(found) / sum(first):.2f}"]
        for n, found in medians.items()
    ]
    return Table(
        title=f"Microseconds of the scheduler ({policy}), a request",
        columns=["in line", "to queue it", "all its steps", "to drop one", "together, ratio"],
        rows=rows,
        notes=[
            f"A request has {_PROMPT_TOKENS} prompt and {_OUTPUT_TOKENS} output tokens. Medians "
            "over repeats; the ratio is to the shortest line."
        ],
    )


def _plot(costs: Mapping[int, Costs], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for name, label in (("add", "queue"), ("schedule", "all steps"), ("abort", "drop")):
        axes.loglog(
            list(costs), [statistics.median(getattr(c, name)) for c in costs.values()], label=label
        )
    axes.set_xlabel("requests in line")
    axes.set_ylabel("µs a request (median)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
