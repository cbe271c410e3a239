"""The same kind of trace on many simulated instances, with lending and without.

Steps take what steps of the real instances took, each on a processor of its own; asking creditors
takes what was measured with tokens elsewhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ....runtime.cluster.policies import Ledger
from ....runtime.cluster.simulator.cluster import ClusterConfig, Member, simulate
from ....runtime.cluster.simulator.costs import TransferCost
from ....runtime.cluster.simulator.instance import InstanceConfig
from ....runtime.cluster.simulator.loans import LoanConfig
from ...record import Table
from ..contenders import contender
from ..traces import trace_of
from . import lending
from .costs import Costs
from .lending import Pairs, Served, load_of
from .options import PART_TOKENS, LongOptions

_HAND_OVER_S = 5e-3  # of pages that change hands, between processes of one machine
_ROUND_S = 0.1  # between two rounds of the policy, as of the router


def measure(options: LongOptions, costs: Costs, found: dict[str, Pairs]) -> Iterator[None]:
    """Simulate all; yields after each pair, of which the n-th is of the n-th seed."""
    times = options.simulated / options.lenders
    for seed in options.seeds:
        load = load_of(options, seed)
        load = replace(load, num_requests=round(load.num_requests * times))
        trace = trace_of(load, options.rate * times)
        for text in options.policies:
            pairs = found.setdefault(text, Pairs())
            for lends in (False, True):
                ledger = Ledger(part_tokens=PART_TOKENS) if lends else None
                config = _config(options, costs, lends)
                report = simulate(config, contender(text).policy(), trace, ledger)
                served = Served.of(report, report.lent_tokens)
                (pairs.lending if lends else pairs.without).append(served)
            yield


def _config(options: LongOptions, costs: Costs, lends: bool) -> ClusterConfig:
    loans = LoanConfig(
        cost=costs.loan,
        most_tokens=2 * options.pool_tokens,
        token_bytes=costs.token_bytes,
        part_tokens=PART_TOKENS,
        spare_tokens=PART_TOKENS,
    )
    instance = InstanceConfig(
        cost=costs.step,
        capacity_tokens=options.pool_tokens,
        max_seqs=options.max_seqs,
        max_batch_tokens=options.max_batch_tokens,
        loans=loans if lends else None,
    )
    return ClusterConfig(
        members=(Member(config=instance),) * options.simulated,
        transfer=TransferCost(latency_s=_HAND_OVER_S, token_bytes=costs.token_bytes),
        round_s=_ROUND_S,
    )


def table(runs: Mapping[str, Pairs], options: LongOptions) -> Table:
    """A row a policy."""
    times = options.simulated / options.lenders
    return lending.table(
        runs,
        f"{options.simulated} simulated instances with lending and without, {options.workload}",
        [
            f"{round(options.num_requests * times)} requests, {options.rate * times:g} a second, "
            f"medians of {len(options.seeds)} seeds; each instance has a processor of its own. "
            f"Costs of steps and of the link ({options.link}) are those measured."
        ],
    )
