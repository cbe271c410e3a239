"""The placement with the highest goodput for each device, by simulating all of them."""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from ....vmem.errors import InvalidConfig
from ..policies import ClusterPolicy, Disaggregated, LeastLoaded
from ..simulator.cluster import ClusterConfig, Member, simulate
from ..simulator.instance import InstanceConfig
from ..simulator.trace import Attainment, Report, Slo, TraceRequest
from .candidates import Group, Placement
from .machine import CostTable, Machine

TraceAt = Callable[[float], Sequence[TraceRequest]]
"""The same requests, so many of them a second."""


class SearchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to search.

    Attributes:
        slo: what must be kept.
        most_rate: requests a second and device, above which is not looked.
        tolerance: of a rate, at which bisecting ends.
        prompt_tokens: of a step on an instance that computes prompts alone.
        mixed_tokens: of a step on one that does both.
        max_seqs: requests that run at once on an instance.
    """

    slo: Slo
    most_rate: float = 5.0
    tolerance: float = 0.1
    prompt_tokens: int = 2048
    mixed_tokens: int = 512
    max_seqs: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < self.most_rate:
            raise InvalidConfig(
                f"tolerance {self.tolerance} and most_rate {self.most_rate}: use a tolerance above "
                "0 and below most_rate"
            )


class Rated(msgspec.Struct, frozen=True, kw_only=True):
    """A placement, and what it can do.

    Attributes:
        rate: requests a second and device up to which promises are kept; 0 if not even at the
            lowest that was tried.
        kept: shares at that rate; None where it is 0.
        missed_rate, missed: the lowest rate that was too high, and shares there; None if none was.
        report: of the run at `rate`, or where that is 0 of the one that missed.
    """

    placement: Placement
    rate: float
    kept: Attainment | None
    missed_rate: float | None
    missed: Attainment | None
    report: Report

    @property
    def limit(self) -> str:
        """What is too slow first."""
        if self.missed is None:
            return "none found"
        return "first tokens" if self.missed.ttft < self.missed.tpot else "further tokens"


def rate(
    placement: Placement,
    machine: Machine,
    table: CostTable,
    config: SearchConfig,
    trace_at: TraceAt,
) -> Rated:
    """The highest rate at which a placement keeps its promises, by bisection."""
    cluster = cluster_of(placement, machine, table, config)
    low, high = 0.0, config.most_rate
    kept = missed = None
    kept_report = missed_report = None
    while high - low > config.tolerance:
        middle = (low + high) / 2
        report = simulate(cluster, policy_of(placement), trace_at(middle * placement.num_gpus))
        found = report.attainment(config.slo)
        if found.meets(config.slo):
            low, kept, kept_report = middle, found, report
        else:
            high, missed, missed_report = middle, found, report
    report = kept_report or missed_report
    assert report is not None
    return Rated(
        placement=placement,
        rate=low,
        kept=kept,
        missed_rate=high if missed is not None else None,
        missed=missed,
        report=report,
    )


def search(
    candidates: Iterable[Placement],
    machine: Machine,
    table: CostTable,
    config: SearchConfig,
    trace_at: TraceAt,
    *,
    on_rated: Callable[[Rated], None] = lambda rated: None,
) -> list[Rated]:
    """All of them, the best first: by rate a device, and of equals the smallest.

    Raises InvalidConfig if there are none.
    """
    found: list[Rated] = []
    for placement in candidates:
        found.append(rate(placement, machine, table, config, trace_at))
        on_rated(found[-1])
    if not found:
        raise InvalidConfig(
            f"{table.model} fits no placement on {machine.num_gpus} devices; describe more of them"
        )
    return sorted(found, key=lambda rated: (-rated.rate, rated.placement.num_gpus))


def cluster_of(
    placement: Placement, machine: Machine, table: CostTable, config: SearchConfig
) -> ClusterConfig:
    """A unit of it, to be simulated."""
    members = tuple(
        Member(config=_instance(group, placement, machine, table, config), role=group.role)
        for group in placement.groups
        for _ in range(group.count)
    )
    wire = machine.within if placement.is_within else machine.network
    return ClusterConfig(members=members, transfer=table.transfer(wire))


def policy_of(placement: Placement) -> ClusterPolicy:
    """Who gets what in it."""
    return Disaggregated() if placement.is_apart else LeastLoaded()


def _instance(
    group: Group, placement: Placement, machine: Machine, table: CostTable, config: SearchConfig
) -> InstanceConfig:
    crosses = placement.crossing > 1 or group.tensor * group.pipeline > machine.gpus_per_node
    capacity = table.capacity(group.tensor, group.pipeline)
    assert capacity is not None, f"{table.model} does not fit {group}"
    return InstanceConfig(
        cost=table.cost(
            group.tensor, group.pipeline, machine.network if crosses else machine.within
        ),
        capacity_tokens=capacity,
        max_seqs=config.max_seqs,
        max_batch_tokens=config.mixed_tokens if group.role == "both" else config.prompt_tokens,
    )
