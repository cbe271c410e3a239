"""`vkv simulate`: a cluster on a virtual clock, under one policy after another."""

import itertools
import math
import re
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ...runtime.cluster.placement.machine import CostTable, Wire, read_table
from ...runtime.cluster.policies import CLUSTER_POLICIES, ClusterPolicy, Ledger, Llumnix, Scaling
from ...runtime.cluster.simulator.cluster import ClusterConfig, Member, simulate
from ...runtime.cluster.simulator.costs import LoanCost, StepCost, TransferCost
from ...runtime.cluster.simulator.fitting import Fit, StepRecord, fit_step_cost, read_steps
from ...runtime.cluster.simulator.instance import InstanceConfig
from ...runtime.cluster.simulator.loans import LoanConfig
from ...runtime.cluster.simulator.trace import Report, Slo
from ...runtime.cluster.snapshot import Role
from ...runtime.frontend.progress import counted
from ...vmem.errors import InvalidConfig
from ..limits import LimitsProbe
from ..record import Findings, Record, Table, read_record, record_name
from .comparison import against_first, by_urgency, figures, latencies, plot, totals
from .contenders import Contender, contender
from .long.costs import recorded_loan_cost
from .options import SimulateOptions
from .traces import recorded_steps, recorded_trace, trace_of

_COMPARED = ("measured", "simulated", "error of")
_MOST_NOTES = 8  # runs up to which each is said to have taken so long


def run(options: SimulateOptions, command: str) -> list[Table]:
    """Simulate, and say what came of it; with `out`, write a record of it."""
    if options.record is not None:
        return _again(options.record)
    cost, notes = _cost(options)
    contenders = [contender(text) for text in options.policies]
    slo = Slo(ttft_s=options.slo_ttft_ms / 1e3, tpot_s=options.slo_tpot_ms / 1e3)
    runs: dict[tuple[str, str], list[Report]] = {}
    probe = LimitsProbe(torch.device("cpu"), torch.float32)

    def steps() -> Generator[None, None, None]:
        seeds = options.seeds or (options.load.seed,)
        ways = (False, True) if options.lending else (False,)
        every = list(itertools.product(options.rates, seeds, contenders, ways))
        if options.out is not None:
            probe.measure()
        with counted("runs", len(every)) as advance:
            for rate, seed, one, lends in every:
                trace = trace_of(replace(options.load, seed=seed), rate)
                config = _config(options, one, cost, lends)
                ledger = Ledger() if lends else None
                start, cpu = time.perf_counter(), time.process_time()
                report = simulate(config, _policy(one, options), trace, ledger)
                took_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
                name = f"{one.text}, lending" if lends else one.text
                runs.setdefault((f"{rate:g}/s", name), []).append(report)
                if len(every) <= _MOST_NOTES:
                    notes.append(_speed(name, report, took_s, cpu_s))
                advance()
                yield

    def findings() -> Findings:
        compared = (latencies(runs), against_first(runs), by_urgency(runs))
        return Findings(
            results={
                f"{load}, {policy}": [figures(report, slo) for report in reports]
                for (load, policy), reports in runs.items()
            },
            tables=[t for t in (*compared, totals(runs, slo, notes)) if t is not None],
            draw=partial(plot, runs),
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


def _config(options: SimulateOptions, one: Contender, cost: StepCost, lends: bool) -> ClusterConfig:
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
        scheduling_policy=one.order or options.scheduling_policy,
        loans=_loans(options, table, capacity) if lends else None,
    )
    roles = options.roles or ("both",) * (one.instances or options.instances)
    return ClusterConfig(
        members=tuple(Member(config=instance, role=cast(Role, role)) for role in roles),
        transfer=TransferCost(
            latency_s=options.link_latency_ms / 1e3,
            bytes_per_s=options.link_gbit * 1e9 / 8 if options.link_gbit else None,
            token_bytes=table.token_bytes,
        ),
        report_s=options.report_ms / 1e3,
        react_s=0.01 if len(roles) > 64 else 0.0,
        round_s=options.round_ms / 1e3,
        startup_s=options.startup_s,
    )


def _loans(options: SimulateOptions, table: CostTable, capacity: int) -> LoanConfig:
    """A query and a result of all layers are taken to be as large as a token's keys and values,
    which is so where each head has keys of its own."""
    if options.loan_record is not None:
        cost = recorded_loan_cost(options.loan_record)
    else:
        rate = options.link_gbit * 1e9 / 8
        cost = LoanCost(
            holder_s=table.num_layers * options.loan_latency_us * 1e-6,
            byte_s=1 / rate if rate else 0.0,
            query_bytes=table.token_bytes,
            move_bytes_per_s=rate or math.inf,
        )
    return LoanConfig(
        cost=cost, most_tokens=options.instances * capacity, token_bytes=table.token_bytes
    )


def _policy(one: Contender, options: SimulateOptions) -> ClusterPolicy:
    if one.text != Llumnix.name or options.most_instances is None:
        return one.policy()
    least = len(options.roles) or options.instances
    scaling = Scaling(
        least=least,
        most=max(least, options.most_instances),
        below=options.scale_below,
        above=options.scale_above,
    )
    return Llumnix(scaling=scaling)


def _speed(name: str, report: Report, took_s: float, cpu_s: float) -> str:
    return (
        f"{name}: {report.duration_s:.0f} s in {took_s:.1f} s, {cpu_s:.1f} s of a processor; "
        f"{report.num_steps:,} steps, for "
        f"{report.num_scheduled:,} of which the scheduler was asked."
    )


# -- records again -------------------------------------------------------------------------------


def _again(path: Path) -> list[Table]:
    """Runs of a record, measured and simulated. Costs are fitted to the steps of all of them."""
    record = read_record(path)
    found = record.get("results", {}).get("runs", ())
    runs = [r for r in found if "step_ends" in r and not r.get("num_preemptions")]
    if not runs:
        raise InvalidConfig(
            f"{path} has no runs with the times of their steps and without preemptions; give a "
            "record of `vkv bench serve`"
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
