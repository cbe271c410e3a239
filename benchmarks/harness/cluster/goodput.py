"""`vkv bench cluster --roles`: prompts and decodes apart, against as many instances that do both.

Beside what is measured here is what the simulator says of the same requests, and of OPT-13B on
A100, whose costs are published.

Source: Zhong et al., DistServe, arXiv:2401.09670, section 6.2.
"""

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch

from ...runtime.cluster.placement.machine import Machine, read_table
from ...runtime.cluster.policies import ClusterPolicy, Disaggregated, Llumnix
from ...runtime.cluster.simulator.cluster import ClusterConfig, Member, simulate
from ...runtime.cluster.simulator.instance import InstanceConfig
from ...runtime.cluster.simulator.trace import Report, Slo
from ...runtime.cluster.snapshot import Role
from ...runtime.frontend.progress import counted
from ...vmem.errors import InvalidConfig
from ..limits import LimitsProbe
from ..record import Findings, Record, Table, record_name
from .bench import Costs, Site, calibrated, compared, parse_load, requests, said, site, slos, warmed
from .comparison import figures, latencies, plot, totals
from .options import DEFAULT_TABLE, ClusterOptions, Load
from .real import serve
from .traces import trace_of

_TOGETHER = "both"
_SHARE = 0.9  # of requests that both promises must be kept for
_REAL_SHAPE_RATES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)  # requests a second and device
_REAL_SHAPE_SLOS = tuple(
    Slo(ttft_s=first, tpot_s=each) for first, each in ((0.2, 0.1), (0.2, 0.05), (1.0, 0.05))
)
_REAL_SHAPE_REQUESTS = 1000

Runs = dict[tuple[str, str], list[Report]]


@dataclass
class Found:
    """What has been measured so far, and said of the same requests."""

    real: Runs = field(default_factory=dict)
    simulated: Runs = field(default_factory=dict)
    costs: dict[tuple[str, float], Costs | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run(options: ClusterOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """As of `bench.run`."""
    loads = [parse_load(text) for text in options.loads]
    if len({name for name, _ in loads}) > 1:
        raise InvalidConfig(f"workload is {options.loads}: use one, at rising rates")
    record = Record(
        folder,
        record_name("cluster-roles", options.shape, options.label),
        device=torch.device("cpu"),
        config=asdict(options),
        command=command,
    )
    found, promises = Found(), slos(options)
    probe = LimitsProbe(torch.device("cpu"), options.dtype)
    real_shape = of_real_shape(options.roles)

    def findings() -> Findings:
        tables = [kept(found.real, promises, "Measured"), latencies(found.real)]
        tables.append(totals(found.real, promises[0], found.notes))
        if found.simulated:
            tables.append(kept(found.simulated, promises, "Simulated"))
            tables.append(compared(found.real, found.simulated))
        return Findings(
            results={
                ", ".join(key): [figures(report, promises[0]) for report in reports]
                for key, reports in found.real.items()
            },
            tables=[*tables, real_shape],
            draw=partial(plot, found.real),
        )

    return record.grow(_measure(options, loads, found, probe), findings, probe)


def _measure(
    options: ClusterOptions, loads: Sequence[tuple[str, float]], found: Found, probe: LimitsProbe
) -> Generator[None, None, None]:
    """Each way in turn, at rising rates; costs are those of instances that do both."""
    number = itertools.count(1)
    count = 2 * len(loads) * (len(options.seeds) + 1)
    with counted("runs", count) as advance:
        for what, roles in setups(options.roles).items():
            probe.measure()
            with site(options, roles) as there:
                for name, rate in loads:
                    if what == _TOGETHER:
                        costs = found.costs[name, rate] = calibrated(there, name, rate)
                        found.notes.append(said(f"{name}@{rate:g}", costs))
                    else:
                        warmed(there, name, rate, policy_of(roles))
                    advance()
                    for seed in options.seeds:
                        _run_once(there, (name, rate), what, roles, seed, next(number), found)
                        advance()
                        yield


def _run_once(
    there: Site,
    load: tuple[str, float],
    what: str,
    roles: Sequence[Role],
    seed: int,
    number: int,
    found: Found,
) -> None:
    """A run, and the same simulated."""
    trace, key = requests(there.options, *load, seed), (f"{load[1]:g}/s", what)
    run = serve(
        there.cluster,
        there.exchange,
        policy_of(roles),
        trace,
        vocab_size=there.vocab_size,
        seed=number,
    )
    found.real.setdefault(key, []).append(run.report)
    costs = found.costs[load]
    if costs is not None:
        report = simulate(there.config(costs), policy_of(roles), trace)
        found.simulated.setdefault(key, []).append(report)


def setups(roles: Sequence[str]) -> dict[str, list[Role]]:
    """What is compared: as many instances, in two ways."""
    return {
        _TOGETHER: ["both"] * len(roles),
        ", ".join(roles): [cast(Role, role) for role in roles],
    }


def policy_of(roles: Sequence[Role]) -> ClusterPolicy:
    """The one that a cluster of these roles has by default."""
    return Llumnix() if set(roles) == {"both"} else Disaggregated()


def kept(runs: Mapping[tuple[str, str], Sequence[Report]], slos: Sequence[Slo], how: str) -> Table:
    """Shares of requests for which promises were kept, and up to which rate enough were."""
    rows = []
    goodput: dict[tuple[str, Slo], float] = {}
    for (load, what), reports in runs.items():
        cells = []
        for slo in slos:
            shares = [report.attainment(slo).both for report in reports]
            share = sorted(shares)[len(shares) // 2]
            cells.append(f"{share:.0%}")
            if share >= _SHARE:
                rate = float(load.removesuffix("/s"))
                goodput[what, slo] = max(goodput.get((what, slo), 0.0), rate)
        rows.append([f"{load}, {what}", *cells])
    for what in dict.fromkeys(what for _, what in runs):
        cells = [f"{goodput.get((what, slo), 0.0):g}/s" for slo in slos]
        rows.append([f"goodput: {what}", *cells])
    return Table(
        title=f"{how}: requests that were served as promised (TTFT, TPOT)",
        columns=["run", *(f"{slo.ttft_s * 1e3:g} ms, {slo.tpot_s * 1e3:g} ms" for slo in slos)],
        rows=rows,
        notes=[f"Goodput: the highest rate at which {_SHARE:.0%} were."],
    )


def of_real_shape(roles: Sequence[str]) -> Table:
    """The same instances of OPT-13B on an A100 each, as the simulator sees them."""
    table, machine = read_table(DEFAULT_TABLE), Machine()
    load = Load(workload="sharegpt-turns", num_requests=_REAL_SHAPE_REQUESTS, most_tokens=2047)
    runs: Runs = {}
    for what, chosen in setups(roles).items():
        members = tuple(
            Member(
                config=InstanceConfig(
                    cost=table.cost(1, 1, machine.within),
                    capacity_tokens=table.capacity(1, 1) or 0,
                    max_batch_tokens=2048 if role == "prefill" else 512,
                ),
                role=role,
            )
            for role in chosen
        )
        config = ClusterConfig(members=members, transfer=table.transfer(machine.within))
        for rate in _REAL_SHAPE_RATES:
            total = rate * len(roles)
            report = simulate(config, policy_of(chosen), trace_of(load, total))
            runs[f"{total:g}/s", what] = [report]
    return kept(runs, _REAL_SHAPE_SLOS, f"Simulated, {table.model} on {len(roles)} {table.device}")
