"""`vkv simulate`: a cluster on a virtual clock, under one policy after another."""

import json
import re
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch

from ...runtime.cluster.placement.machine import Wire, read_table
from ...runtime.cluster.policies import CLUSTER_POLICIES, ClusterPolicy, Llumnix, Scaling
from ...runtime.cluster.simulator.cluster import ClusterConfig, Member, simulate
from ...runtime.cluster.simulator.costs import StepCost, TransferCost
from ...runtime.cluster.simulator.fitting import Fit, StepRecord, fit_step_cost, read_steps
from ...runtime.cluster.simulator.instance import InstanceConfig
from ...runtime.cluster.simulator.trace import Report, Slo
from ...runtime.cluster.snapshot import Role
from ...vmem.errors import InvalidConfig
from ..limits import LimitsProbe
from ..record import Findings, Record, Table, record_name
from .options import SimulateOptions
from .traces import recorded_steps, recorded_trace, trace_of

_SHARES = (50, 90, 99)
_COMPARED = ("measured", "simulated", "error of")
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


def run(options: SimulateOptions, command: str) -> list[Table]:
    """Simulate, and say what came of it; with `out`, write a record of it."""
    if options.record is not None:
        return _again(options.record)
    cost, notes = _cost(options)
    config = _config(options, cost)
    trace = trace_of(options.load, options.rate)
    slo = Slo(ttft_s=options.slo_ttft_ms / 1e3, tpot_s=options.slo_tpot_ms / 1e3)
    reports: dict[str, Report] = {}
    probe = LimitsProbe(torch.device("cpu"), torch.float32)

    def steps() -> Generator[None, None, None]:
        for name in options.policies:
            if options.out is not None:
                probe.measure()
            start, cpu = time.perf_counter(), time.process_time()
            reports[name] = simulate(config, _policy(name, options), trace)
            took_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
            notes.append(_speed(name, reports[name], took_s, cpu_s))
            yield

    def findings() -> Findings:
        return Findings(
            results={name: _figures(report, slo) for name, report in reports.items()},
            tables=[_latencies(reports), _totals(reports, slo, notes)],
            draw=partial(_plot, reports),
        )

    if options.out is None:
        for _ in steps():
            pass
        return list(findings().tables)
    record = Record(
        options.out,
        record_name("simulate", options.label),
        device=torch.device("cpu"),
        config=asdict(options),
        command=command,
    )
    return record.grow(steps(), findings, probe)[1]


def _cost(options: SimulateOptions) -> tuple[StepCost, list[str]]:
    if options.steps is not None:
        fit = fit_step_cost(read_steps(options.steps))
        return fit.cost, [_said(fit)]
    table = read_table(options.table)
    if options.tensor not in table.costs:
        known = ", ".join(map(str, table.costs))
        raise InvalidConfig(f"{table.name} has no costs of tensor {options.tensor}; use {known}")
    wire = Wire(latency_s=2e-5, bytes_per_s=2e11)
    cost = table.cost(options.tensor, options.pipeline, wire)
    return cost, [f"Costs: {table.model} on {table.device}. {table.source}."]


def _said(fit: Fit) -> str:
    return (
        f"Costs fitted to {fit.num_steps} steps: a step's error is {fit.mean_error:.1%} in the "
        f"mean and {fit.p95_error:.1%} at p95; of all of them together {fit.total_error:+.1%}."
    )


def _config(options: SimulateOptions, cost: StepCost) -> ClusterConfig:
    table = read_table(options.table)
    capacity = options.capacity_tokens
    if capacity is None:
        capacity = table.capacity(options.tensor, options.pipeline)
    if capacity is None:
        raise InvalidConfig(
            f"{table.name} says nothing of tensor {options.tensor} and pipeline "
            f"{options.pipeline}; give capacity_tokens"
        )
    instance = InstanceConfig(
        cost=cost,
        capacity_tokens=capacity,
        max_seqs=options.max_seqs,
        max_batch_tokens=options.max_batch_tokens,
        policy=options.step_policy,
        scheduling_policy=options.scheduling_policy,
    )
    roles = options.roles or ("both",) * options.instances
    return ClusterConfig(
        members=tuple(Member(config=instance, role=cast(Role, role)) for role in roles),
        transfer=TransferCost(
            latency_s=options.link_latency_ms / 1e3,
            bytes_per_s=options.link_gbit * 1e9 / 8 if options.link_gbit else None,
            token_bytes=table.token_bytes,
        ),
        report_s=options.report_ms / 1e3,
        react_s=0.01 if len(roles) > 64 else 0.0,
        startup_s=options.startup_s,
    )


def _policy(name: str, options: SimulateOptions) -> ClusterPolicy:
    if name == Llumnix.name and options.most_instances is not None:
        least = len(options.roles) or options.instances
        scaling = Scaling(
            least=least,
            most=max(least, options.most_instances),
            below=options.scale_below,
            above=options.scale_above,
        )
        return Llumnix(scaling=scaling)
    return CLUSTER_POLICIES[name]()


def _speed(name: str, report: Report, took_s: float, cpu_s: float) -> str:
    return (
        f"{name}: {report.duration_s:.0f} s in {took_s:.1f} s, {cpu_s:.1f} s of a processor; "
        f"{report.num_steps:,} steps, for "
        f"{report.num_scheduled:,} of which the scheduler was asked."
    )


def _figures(report: Report, slo: Slo) -> dict[str, Any]:
    """Of a record: totals, and all percentiles in seconds."""
    kept = msgspec.to_builtins(report.attainment(slo))
    totals = msgspec.structs.asdict(report)
    del totals["served"]
    return {"kept": kept, **totals, "percentiles": report.percentiles(*range(101))}


def _plot(reports: Mapping[str, Report], path: Path) -> None:
    """How many first tokens, and how many answers, take longer than so much."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8))
    first, whole = figure.subplots(1, 2)
    for axes, key, said in ((first, "ttft_s", "first token, s"), (whole, "e2e_s", "answer, s")):
        for name, report in reports.items():
            values = sorted(getattr(one, key) for one in report.whole)
            shares = [1 - place / len(values) for place in range(len(values))]
            axes.loglog(values, shares, label=name)
        axes.set_xlabel(said)
        axes.set_ylabel("share of requests that take longer")
    first.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _latencies(reports: Mapping[str, Report]) -> Table:
    names = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "gap": "longest gap"}
    return Table(
        title="Latency, ms",
        columns=["policy", *(f"{said} p{p}" for said in names.values() for p in _SHARES)],
        rows=[
            [name, *(f"{x * 1e3:.1f}" for key in names for x in found[key])]
            for name, report in reports.items()
            for found in (report.percentiles(*_SHARES),)
        ],
    )


def _totals(reports: Mapping[str, Report], slo: Slo, notes: list[str]) -> Table:
    rows = []
    for name, report in reports.items():
        kept = report.attainment(slo)
        rows.append(
            [
                name,
                f"{len(report.whole)}",
                f"{len(report.served) / report.duration_s:.2f}",
                f"{report.goodput(slo):.2f}",
                f"{kept.both:.1%}",
                f"{report.num_moves}",
                f"{report.num_preemptions}",
                f"{report.num_held_back}",
                f"{report.instance_s / 3600:.3f}",
            ]
        )
    return Table(
        title=f"Totals; promised: {slo.ttft_s * 1e3:g} ms to a first token, "
        f"{slo.tpot_s * 1e3:g} ms for each after it",
        columns=_TOTALS,
        rows=rows,
        notes=notes,
    )


# -- records again -------------------------------------------------------------------------------


def _again(path: Path) -> list[Table]:
    """Runs of a record, measured and simulated. Costs are fitted to the steps of all of them."""
    record = json.loads(path.read_text())
    runs = [r for r in record.get("results", {}).get("runs", ()) if not r.get("num_preemptions")]
    if not runs:
        raise InvalidConfig(
            f"{path} has no runs without preemptions; give a record of `vkv bench serve`"
        )
    steps: list[StepRecord] = [step for run in runs for step in recorded_steps(run)]
    fit = fit_step_cost(steps)
    rows = [row for run in runs for row in _compared(run, fit.cost, record["config"]["max_seqs"])]
    return [
        Table(
            title="Measured and simulated, ms",
            columns=("run", "of", *(f"{how} p{p}" for p in (50, 90) for how in _COMPARED)),
            rows=rows,
            notes=[_said(fit)],
        )
    ]


def _compared(run: Mapping[str, Any], cost: StepCost, max_seqs: int) -> list[list[str]]:
    budget = int(run.get("max_batch_tokens") or max(run["step_tokens"]))  # older ones lack it
    config = InstanceConfig(
        cost=cost,
        capacity_tokens=10 * sum(run["input_lens"]) + 10 * sum(run["output_lens"]),
        max_seqs=max_seqs,
        max_batch_tokens=budget,
        policy=run["policy"],
    )
    waiting = re.match(r"(\d+) clients", run["load"])
    clients = int(waiting[1]) if waiting else None
    cluster = ClusterConfig(members=(Member(config=config),), clients=clients)
    report = simulate(cluster, CLUSTER_POLICIES["least_loaded"](), recorded_trace(run))
    simulated = report.percentiles(50, 90)
    measured = {
        "ttft": run["ttfts"],
        "tpot": [sum(gaps) / len(gaps) for gaps in run["itls"] if gaps],
        "e2e": [ttft + sum(gaps) for ttft, gaps in zip(run["ttfts"], run["itls"], strict=True)],
    }
    name = f"{run['workload']}, {run['load']}, {run['policy']} {budget}"
    rows = []
    for key, values in measured.items():
        row = [name, key.upper()]
        for at, share in enumerate((50, 90)):
            was, said = float(np.percentile(values, share)) * 1e3, simulated[key][at] * 1e3
            row += [f"{was:.1f}", f"{said:.1f}", f"{said / was - 1:+.1%}"]
        rows.append(row)
    return rows
