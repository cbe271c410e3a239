"""`vkv bench cluster`: policies on real instances, and beside them what the simulator says.

One cluster serves the same trace under one policy after the other. What its steps take is seen in
a run of other requests, of the same lengths and as many a second; with costs fitted to those, the
same traces are simulated. With roles, see `goodput.py`.

Source: Llumnix, arXiv:2406.03243, sections 6.3 and 6.4.
"""

import itertools
import statistics
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...runtime.cluster.cluster import Cluster
from ...runtime.cluster.policies import ClusterPolicy, LeastLoaded
from ...runtime.cluster.simulator.cluster import ClusterConfig, Member, simulate
from ...runtime.cluster.simulator.costs import TransferCost
from ...runtime.cluster.simulator.fitting import Fit, fit_beside
from ...runtime.cluster.simulator.instance import InstanceConfig
from ...runtime.cluster.simulator.trace import Report, Slo, TraceRequest
from ...runtime.cluster.snapshot import Role
from ...runtime.frontend.progress import counted
from ...vmem.errors import InvalidConfig
from ..limits import LimitsProbe
from ..models.checkpoints import save_checkpoints
from ..record import Findings, Record, Table, record_name
from .comparison import against_first, by_urgency, figures, latencies, plot, totals, values
from .contenders import Contender, contender
from .options import ClusterOptions, Load
from .real import Exchange, Run, observed_steps, serve
from .traces import trace_of

_HAND_OVER_S = 5e-3  # of pages that change hands, between processes of one machine
_ROUND_S = 0.1  # between two rounds of moves, as of the router
_OTHER_SEED = 1_000_003  # of requests that are not measured
_FIGURES = (("mean", None), ("p50", 50), ("p90", 90), ("p99", 99))


@dataclass(frozen=True)
class Site:
    """A cluster that is up, and what is known of it.

    Attributes:
        exchange: its policy.
        vocab_size: of its model.
    """

    cluster: Cluster
    exchange: Exchange
    vocab_size: int
    options: ClusterOptions

    @property
    def memory(self) -> str:
        """What an instance holds."""
        return (
            f"An instance holds keys and values of {self.cluster.face.capacity_tokens} tokens; a "
            f"request grows by {self._page_tokens}."
        )

    @property
    def _page_tokens(self) -> int:
        stats = self.cluster.stats().instances[0].stats
        return 16 if stats is None else stats.kv.growth_tokens

    def config(self, costs: "Costs", order: str = "fcfs") -> ClusterConfig:
        """The same for the simulator."""
        face = self.cluster.face
        members = self.cluster.stats().instances
        instance = InstanceConfig(
            cost=costs.fit.cost,
            capacity_tokens=face.capacity_tokens,
            page_tokens=self._page_tokens,
            max_seqs=face.max_seqs,
            max_batch_tokens=self.options.max_batch_tokens,
            scheduling_policy=order,
        )
        return ClusterConfig(
            members=tuple(Member(config=instance, role=member.role) for member in members),
            transfer=TransferCost(latency_s=_HAND_OVER_S, token_bytes=face.token_bytes),
            round_s=_ROUND_S,
            slowdown=costs.slowdown,
        )


def run(options: ClusterOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    if options.roles:
        from .goodput import run as run_roles

        return run_roles(options, folder, command)
    contenders = [contender(text) for text in options.policies]
    loads = [parse_load(text) for text in options.loads]
    record = Record(
        folder,
        record_name("cluster", options.shape, options.label),
        device=torch.device("cpu"),
        config=asdict(options),
        command=command,
    )
    real: dict[tuple[str, str], list[Report]] = {}
    simulated: dict[tuple[str, str], list[Report]] = {}
    notes: list[str] = []
    number = itertools.count(1)  # of runs: no two have the same prompts
    probe = LimitsProbe(torch.device("cpu"), options.dtype)

    def steps() -> Generator[None, None, None]:
        count = len(loads) * (len(options.seeds) * len(contenders) + 1)
        with site(options) as there, counted("runs", count) as advance:
            notes.append(there.memory)
            for name, rate in loads:
                probe.measure()
                costs = calibrated(there, name, rate)
                notes.append(said(f"{name}@{rate:g}", costs))
                advance()
                for seed in options.seeds:
                    trace = requests(options, name, rate, seed)
                    for one in contenders:
                        key = f"{name} at {rate:g}/s", one.text
                        real.setdefault(key, []).append(_served(there, one, trace, next(number)))
                        if costs is not None:
                            config = there.config(costs, one.order or "fcfs")
                            report = simulate(config, one.policy(), trace)
                            simulated.setdefault(key, []).append(report)
                        advance()
                        yield

    def findings() -> Findings:
        slo = slos(options)[0]
        tables = [latencies(real), against_first(real), by_urgency(real), totals(real, slo, notes)]
        tables += [compared(real, simulated)] if simulated else []
        return Findings(
            results={
                ", ".join(key): {
                    "real": [figures(report, slo) for report in reports],
                    "simulated": [figures(report, slo) for report in simulated.get(key, ())],
                }
                for key, reports in real.items()
            },
            tables=[table for table in tables if table is not None],
            draw=partial(plot, real),
        )

    return record.grow(steps(), findings, probe)


@contextmanager
def site(options: ClusterOptions, roles: Sequence[Role] | None = None) -> Iterator[Site]:
    """A cluster of a random model of that shape, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="vkv-bench-") as scratch:
        saved = save_checkpoints(options.shape, None, options.dtype, None, Path(scratch))
        exchange = Exchange()
        with Cluster(
            saved.dense,
            instances=options.instances if roles is None else len(roles),
            roles=roles,
            policy=exchange,
            threads=options.threads,
            device="cpu",
            dtype=str(options.dtype).removeprefix("torch."),
            max_seqs=options.max_seqs,
            max_len=options.most_tokens,
            max_batch_tokens=options.max_batch_tokens,
            kv_memory=options.kv_memory,
            scheduling_policy="priority" if _is_by_priority(options) else "fcfs",
        ) as cluster:
            capacity = cluster.face.capacity_tokens
            if capacity < options.most_tokens:
                raise InvalidConfig(
                    f"kv_memory {options.kv_memory} holds {capacity} tokens, and requests have "
                    f"{options.most_tokens}: give more memory, or a smaller most_tokens"
                )
            yield Site(cluster, exchange, saved.vocab_size, options)


def requests(
    options: ClusterOptions, name: str, rate: float, seed: int, count: int | None = None
) -> list[TraceRequest]:
    """The trace of a workload and a seed."""
    load = Load(
        workload=name,
        num_requests=count or options.num_requests,
        cv=options.cv,
        scale=options.scale,
        most_tokens=options.most_tokens,
        urgent=options.urgent,
        seed=seed,
    )
    return trace_of(load, rate)


def slos(options: ClusterOptions) -> list[Slo]:
    """What is promised."""
    return [Slo(ttft_s=first / 1e3, tpot_s=each / 1e3) for first, each in options.promises]


@dataclass(frozen=True)
class Costs:
    """What steps take, and how many times as long beside others, as of `ClusterConfig`."""

    fit: Fit
    slowdown: tuple[float, ...]


def warmed(there: Site, name: str, rate: float, policy: ClusterPolicy) -> Run:
    """A run of other requests of such a load, after which all is warm.

    They are cut so that none has to give way, which would hide what its steps computed.
    """
    count = there.options.calibrating or 8
    most = there.cluster.face.capacity_tokens // 8
    trace = [
        TraceRequest(
            arrival_s=one.arrival_s,
            prompt_tokens=min(one.prompt_tokens, most),
            output_tokens=min(one.output_tokens, most),
        )
        for one in requests(there.options, name, rate, seed=_OTHER_SEED, count=count)
    ]
    return serve(
        there.cluster,
        there.exchange,
        policy,
        trace,
        vocab_size=there.vocab_size,
        seed=_OTHER_SEED,
    )


def calibrated(there: Site, name: str, rate: float) -> Costs | None:
    """Costs of steps under such a load; None if none are asked for."""
    found = warmed(there, name, rate, LeastLoaded())
    if not there.options.calibrating:
        return None
    return Costs(*fit_beside(*observed_steps(found, there.options.max_batch_tokens)))


def _served(there: Site, one: Contender, trace: Sequence[TraceRequest], number: int) -> Report:
    """A run. Only policies that order by priority are told of it."""
    is_by_priority = one.order == "priority"
    found = serve(
        there.cluster,
        there.exchange,
        one.policy(),
        trace,
        vocab_size=there.vocab_size,
        seed=number,
        tells_priority=is_by_priority,
    )
    return found.report


def _is_by_priority(options: ClusterOptions) -> bool:
    """Without priorities that differ, that is by arrival."""
    return any(contender(text).order == "priority" for text in options.policies)


def parse_load(text: str) -> tuple[str, float]:
    """A workload and its requests a second. Raises InvalidConfig."""
    name, separator, rate = text.partition("@")
    try:
        found = float(rate)
    except ValueError:
        found = 0.0
    if not separator or found <= 0:
        raise InvalidConfig(f"workload is {text!r}; write NAME@RATE, such as sharegpt@4")
    return name, found


# -- the simulator beside it ---------------------------------------------------------------------


def said(name: str, costs: Costs | None) -> str:
    """How well costs explain the steps of a load."""
    if costs is None:
        return f"{name}: not simulated."
    fit, slower = costs.fit, ", ".join(f"{factor:.2f}" for factor in costs.slowdown)
    return (
        f"{name}: costs fitted to {fit.num_steps} steps of other requests; a step's error is "
        f"{fit.mean_error:.1%} in the mean, of all together {fit.total_error:+.1%}. A step takes "
        f"{slower} times as long where one, two … instances compute."
    )


def compared(
    real: Mapping[tuple[str, str], Sequence[Report]],
    simulated: Mapping[tuple[str, str], Sequence[Report]],
) -> Table:
    """What the simulator says, as a share of what was measured; medians of the seeds."""
    rows, ratios = [], []
    for key, reports in simulated.items():
        cells = []
        for figure in ("ttft", "tpot", "e2e"):
            for _, share in _FIGURES:
                pairs = zip(reports, real[key], strict=False)
                found = [_figure(s, figure, share) / _figure(r, figure, share) for s, r in pairs]
                ratios += found
                cells.append(f"{statistics.median(found):.2f}")
        rows.append([", ".join(key), *cells])
    near = sum(abs(ratio - 1) <= 0.1 for ratio in ratios) / max(1, len(ratios))
    names = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}
    return Table(
        title="Simulated, as a share of measured",
        columns=["run", *(f"{said} {how}" for said in names.values() for how, _ in _FIGURES)],
        rows=rows,
        notes=[f"Of {len(ratios)} figures of single runs, {near:.0%} are within 10 %."],
    )


def _figure(report: Report, key: str, share: int | None) -> float:
    found = values(report, key) or [float("nan")]
    return float(np.mean(found) if share is None else np.percentile(found, share))
