"""Runs of one trace under several policies, simulated or real: their tables and their plot."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ...runtime.cluster.simulator.trace import Report, Served, Slo
from ..record import Table

Runs = Mapping[tuple[str, str], Sequence[Report]]
"""By load and policy, as they are called, the runs of all seeds, in the same order."""

_SHARES = (50, 90, 99)
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "gap": "longest gap"}
_TOTALS = (
    "policy",
    "whole",
    "requests/s",
    "goodput/s",
    "kept",
    "moves",
    "preemptions",
    "held back",
    "instance-hours",
)


def figures(report: Report, slo: Slo) -> dict[str, Any]:
    """Of a record: totals, and all percentiles in seconds."""
    kept = msgspec.to_builtins(report.attainment(slo))
    totals = msgspec.structs.asdict(report)
    del totals["served"]
    found = {"kept": kept, **totals, "percentiles": report.percentiles(*range(101))}
    for name, part in _by_urgency(report).items():
        found[f"percentiles of {name}"] = part.percentiles(*range(101))
    return found


def latencies(runs: Runs) -> Table:
    """Percentiles of all requests."""
    rows = []
    for name, reports in _named(runs):
        cells = []
        for key in _NAMES:
            found = [report.percentiles(*_SHARES)[key] for report in reports]
            cells += [f"{_median(values) * 1e3:.1f}" for values in zip(*found, strict=True)]
        rows.append([name, *cells])
    return Table(
        title="Latency, ms" + _of_seeds(runs),
        columns=["policy", *(f"{said} p{p}" for said in _NAMES.values() for p in _SHARES)],
        rows=rows,
    )


def totals(runs: Runs, slo: Slo, notes: Sequence[str]) -> Table:
    """What was served, and what it took."""
    cells: list[Callable[[Report], float]] = [
        lambda r: len(r.whole),
        lambda r: len(r.served) / r.duration_s,
        lambda r: r.goodput(slo),
        lambda r: r.attainment(slo).both,
        lambda r: r.num_moves,
        lambda r: r.num_preemptions,
        lambda r: r.num_held_back,
        lambda r: r.instance_s / 3600,
    ]
    forms = ("{:.0f}", "{:.2f}", "{:.2f}", "{:.1%}", "{:.0f}", "{:.0f}", "{:.0f}", "{:.3f}")
    rows = []
    for name, reports in _named(runs):
        found = [_median(map(cell, reports)) for cell in cells]
        rows.append([name, *(form.format(x) for form, x in zip(forms, found, strict=True))])
    return Table(
        title=f"Totals; promised: {slo.ttft_s * 1e3:g} ms to a first token, "
        f"{slo.tpot_s * 1e3:g} ms for each after it" + _of_seeds(runs),
        columns=_TOTALS,
        rows=rows,
        notes=notes,
    )


def against_first(runs: Runs) -> Table | None:
    """How many times as long the first policy takes; None where there is no other."""
    firsts: dict[str, Sequence[Report]] = {}
    rows = []
    for (load, policy), reports in runs.items():
        first = firsts.setdefault(load, reports)
        if first is reports:
            continue
        cells = []
        for key in ("ttft", "tpot", "e2e"):
            for measure in (_mean, _p99):
                pairs = zip(first, reports, strict=False)
                ratios = [measure(one, key) / measure(other, key) for one, other in pairs]
                cells.append(_spread(ratios))
        rows.append([_name(runs, load, policy), *cells])
    if not rows:
        return None
    first_name = next(policy for _, policy in runs)
    columns = [f"{_NAMES[key]} {how}" for key in ("ttft", "tpot", "e2e") for how in ("mean", "p99")]
    return Table(
        title=f"How many times as long {first_name} takes" + _of_seeds(runs, "median and range"),
        columns=["policy", *columns],
        rows=rows,
    )


def by_urgency(runs: Runs) -> Table | None:
    """Urgent requests and the others apart; None where none is urgent."""
    rows = []
    for name, reports in _named(runs):
        parts = [_by_urgency(report) for report in reports]
        for part in ("urgent", "others"):
            found = [one[part] for one in parts if part in one]
            if not found:
                continue
            cells = [
                f"{_median(measure(one, key) for one in found) * 1e3:.1f}"
                for key in ("ttft", "tpot", "e2e")
                for measure in (_mean, _p99)
            ]
            rows.append([f"{name}: {part}", *cells])
    if not rows:
        return None
    columns = [f"{_NAMES[key]} {how}" for key in ("ttft", "tpot", "e2e") for how in ("mean", "p99")]
    return Table(
        title="Urgent requests and the others, ms" + _of_seeds(runs),
        columns=["policy", *columns],
        rows=rows,
    )


def plot(runs: Runs, path: Path) -> None:
    """How many first tokens, and how many answers, take longer than so much."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8))
    first, whole = figure.subplots(1, 2)
    for axes, key, said in ((first, "ttft_s", "first token, s"), (whole, "e2e_s", "answer, s")):
        for name, reports in _named(runs):
            values = sorted(getattr(one, key) for report in reports for one in report.whole)
            shares = [1 - place / len(values) for place in range(len(values))]
            axes.loglog(values, shares, label=name)
        axes.set_xlabel(said)
        axes.set_ylabel("share of requests that take longer")
    first.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# -- parts of runs -------------------------------------------------------------------------------


def values(report: Report, key: str) -> list[float]:
    """TTFT, TPOT or E2E of all whole requests, in seconds."""
    found = (getattr(one, f"{key}_s") for one in report.whole)
    return [value for value in found if value is not None]


def _mean(report: Report, key: str) -> float:
    return float(np.mean(values(report, key) or [0.0]))


def _p99(report: Report, key: str) -> float:
    return float(np.percentile(values(report, key) or [0.0], 99))


def _by_urgency(report: Report) -> dict[str, Report]:
    """Reports of urgent requests and of the others, where there are both."""

    def of(wanted: Callable[[Served], bool]) -> Report:
        served = [one for one in report.served if wanted(one)]
        return msgspec.structs.replace(report, served=served)

    parts = {
        "urgent": of(lambda one: one.request.priority < 0),
        "others": of(lambda one: one.request.priority >= 0),
    }
    return parts if all(part.served for part in parts.values()) else {}


def _named(runs: Runs) -> list[tuple[str, Sequence[Report]]]:
    return [(_name(runs, load, policy), reports) for (load, policy), reports in runs.items()]


def _name(runs: Runs, load: str, policy: str) -> str:
    """Both, where loads differ."""
    return policy if len({load for load, _ in runs}) == 1 else f"{load}, {policy}"


def _of_seeds(runs: Runs, how: str = "median") -> str:
    count = max((len(reports) for reports in runs.values()), default=1)
    return f" ({how} of {count} seeds)" if count > 1 else ""


def _median(numbers: Any) -> float:
    return statistics.median(list(numbers))


def _spread(ratios: Sequence[float]) -> str:
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
