"""Aggregate tokens a second where a few requests are long and many short, with lending and without.

One cluster serves the same trace with lending and without, in turns. All requests come faster than
they can be served, and each of them fits into one pool: what lending brings is that instances which
are full of long ones go on taking short ones.
"""

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from ....runtime.cluster.cluster import Cluster
from ....runtime.cluster.policies import LeastLoaded, Ledger, Settlement
from ....runtime.cluster.simulator.costs import StepCost
from ....runtime.cluster.simulator.fitting import fit_beside
from ....runtime.cluster.simulator.trace import Report, TraceRequest
from ....runtime.cluster.snapshot import ClusterSnapshot
from ...models.checkpoints import Checkpoints
from ...record import Table
from ..contenders import contender
from ..options import Load
from ..real import Exchange, observed_steps, serve
from ..traces import trace_of
from .context import lent_tokens
from .options import LongOptions

_LIVENESS_S = 120.0  # a long step of a busy machine is no sign of death
_OTHER_SEED = 1_000_003  # of requests that are not measured


@dataclass
class Served:
    """A run.

    Attributes:
        tokens_per_s: of prompts and outputs, of all requests that are whole.
        num_whole: how many they are.
        lent_tokens: that went from one instance to another.
        ttft_s, e2e_s: medians.
    """

    tokens_per_s: float
    duration_s: float
    num_whole: int
    num_preemptions: int
    lent_tokens: int
    ttft_s: float
    e2e_s: float

    @classmethod
    def of(cls, report: Report, num_lent: int) -> "Served":
        """What is kept of a report."""
        return cls(
            tokens_per_s=tokens_per_s(report),
            duration_s=report.duration_s,
            num_whole=len(report.whole),
            num_preemptions=report.num_preemptions,
            lent_tokens=num_lent,
            ttft_s=report.percentiles(50)["ttft"][0],
            e2e_s=report.percentiles(50)["e2e"][0],
        )


@dataclass
class Pairs:
    """Runs of one policy; the n-th with lending and the n-th without served the same trace."""

    without: list[Served] = field(default_factory=list)
    lending: list[Served] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Tokens a second with lending over those without."""
        pairs = zip(self.lending, self.without, strict=False)
        return [one.tokens_per_s / other.tokens_per_s for one, other in pairs]


@dataclass
class Lent:
    """All runs by policy, and what steps of these instances take."""

    runs: dict[str, Pairs] = field(default_factory=dict)
    step_cost: StepCost | None = None
    step_error: float = 0.0


class Switch(Ledger):
    """A ledger that can be told to give nobody any credit.

    Attributes:
        is_on: it gives some.
    """

    is_on = True

    def settle(self, snapshot: ClusterSnapshot) -> Settlement:
        """As of `Ledger`."""
        return super().settle(snapshot) if self.is_on else Settlement()


def tokens_per_s(report: Report) -> float:
    """Of prompts and outputs of requests that are whole, until the last token."""
    whole = report.whole
    count = sum(one.request.prompt_tokens + one.request.output_tokens for one in whole)
    return count / max(report.duration_s, 1e-9)


def load_of(options: LongOptions, seed: int) -> Load:
    """Of a trace."""
    return Load(
        workload=options.workload,
        num_requests=options.num_requests,
        scale=options.scale,
        most_tokens=options.most_tokens,
        seed=seed,
    )


def measure(options: LongOptions, saved: Checkpoints, found: Lent) -> Iterator[None]:
    """Serve all traces; yields after each pair of runs."""
    exchange, switch = Exchange(), Switch()
    with _cluster(options, saved, exchange) as cluster:
        cluster.router.decisions.lending.ledger = switch
        switch.is_on = False
        _fit(cluster, exchange, options, saved, found)
        number = 0
        for turn in range(options.pairs):
            trace = trace_of(load_of(options, options.seed + turn), options.rate)
            for text in options.policies:
                pairs = found.runs.setdefault(text, Pairs())
                for lends in (turn % 2 == 0, turn % 2 == 1):
                    switch.is_on, number = lends, number + 1
                    before = lent_tokens(cluster)
                    run = serve(
                        cluster,
                        exchange,
                        contender(text).policy(),
                        trace,
                        vocab_size=saved.vocab_size,
                        seed=options.seed + number,
                    )
                    served = Served.of(run.report, lent_tokens(cluster) - before)
                    (pairs.lending if lends else pairs.without).append(served)
                yield


@contextmanager
def _cluster(options: LongOptions, saved: Checkpoints, exchange: Exchange) -> Iterator[Cluster]:
    with Cluster(
        saved.dense,
        instances=options.lenders,
        policy=exchange,
        lending=True,
        threads=1,
        liveness_s=_LIVENESS_S,
        device="cpu",
        dtype=str(options.dtype).removeprefix("torch."),
        max_seqs=options.max_seqs,
        max_len=options.most_tokens + 1,
        max_batch_tokens=options.max_batch_tokens,
        kv_memory=options.pool_tokens * saved.kv_bytes_per_token,
    ) as cluster:
        yield cluster


def _fit(
    cluster: Cluster, exchange: Exchange, options: LongOptions, saved: Checkpoints, found: Lent
) -> None:
    """What steps take, from a run of other requests in which none has to give way; a first one
    warms all."""
    most = min(options.pool_tokens // 4, options.max_batch_tokens - 1)
    for seed in (_OTHER_SEED, _OTHER_SEED + 1):
        trace = [
            TraceRequest(
                arrival_s=one.arrival_s,
                prompt_tokens=min(one.prompt_tokens, most),
                output_tokens=min(one.output_tokens, most),
            )
            for one in trace_of(load_of(options, seed), options.rate)
        ]
        run = serve(cluster, exchange, LeastLoaded(), trace, vocab_size=saved.vocab_size, seed=seed)
    fit, _ = fit_beside(*observed_steps(run, options.max_batch_tokens))
    found.step_cost, found.step_error = fit.cost, fit.mean_error


# -- results -----------------------------------------------------------------------------------


def results(found: Lent) -> dict[str, Any]:
    """For the record."""
    return {
        "runs": runs_of(found.runs),
        "step_cost": found.step_cost and msgspec.to_builtins(found.step_cost),
        "step_error": found.step_error,
    }


def runs_of(found: Mapping[str, Pairs]) -> dict[str, Any]:
    """For the record, by policy."""
    return {text: asdict(pairs) for text, pairs in found.items()}


def real_table(found: Lent, options: LongOptions) -> Table:
    """Of real instances."""
    return table(
        found.runs,
        f"{options.lenders} instances with lending and without, {options.workload}",
        [
            f"{options.num_requests} requests of {options.workload} times {options.scale:g}, of "
            f"{options.most_tokens} tokens at most, {options.rate:g} a second, to pools of "
            f"{options.pool_tokens} tokens; both ways in turns, medians of {options.pairs} pairs. "
            "Tokens are those of prompts and outputs. The paper: 1.03 to 2.4 times "
            "(arXiv:2401.02669).",
            *_whole(found.runs, options.num_requests),
        ],
    )


def _whole(runs: Mapping[str, Pairs], count: int) -> list[str]:
    """Where requests failed."""
    return [
        f"{text}, {way}: {run.num_whole} of {count} requests were whole."
        for text, pairs in runs.items()
        for way, found in (("without", pairs.without), ("lending", pairs.lending))
        for run in found
        if run.num_whole < count
    ]


def table(runs: Mapping[str, Pairs], title: str, notes: list[str]) -> Table:
    """A row a policy, medians of its runs."""
    rows = []
    for text, pairs in runs.items():
        if not pairs.ratios:
            continue
        cells = [text]
        for way in (pairs.without, pairs.lending):
            cells += [
                f"{_median(way, 'tokens_per_s'):.0f}",
                f"{_median(way, 'ttft_s'):.2f}",
                f"{_median(way, 'num_preemptions'):.0f}",
            ]
        ratios = pairs.ratios
        cells.append(f"{_median(pairs.lending, 'lent_tokens'):.0f}")
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        rows.append(cells)
    sides = ("tokens/s", "first token, s", "preemptions")
    return Table(
        title=title,
        columns=(
            "policy",
            *(f"{said}, {way}" for way in ("without", "lending") for said in sides),
            "lent tokens",
            "tokens/s, times (range)",
        ),
        rows=rows,
        notes=notes,
    )


def _median(runs: list[Served], what: str) -> float:
    return statistics.median(getattr(run, what) for run in runs)
