"""`vkv place`: which instances to run on given machines, and why."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...runtime.cluster.placement.candidates import placements
from ...runtime.cluster.placement.machine import CostTable, Machine, read_machine, read_table
from ...runtime.cluster.placement.search import Rated, SearchConfig, search
from ...runtime.cluster.simulator.trace import Slo
from ...runtime.frontend.progress import counted
from ..record import Table, require_folder, require_matplotlib
from .options import PlaceOptions
from .traces import trace_of

_COLUMNS = (
    "placement",
    "GPUs",
    "requests/s/GPU",
    "requests/s",
    "TTFT p90, ms",
    "TPOT p90, ms",
    "kept",
    "busy",
    "memory",
    "too slow first",
)


def run(options: PlaceOptions, command: str) -> list[Table]:
    """Search, and say what was found."""
    if options.plot is not None:
        require_matplotlib()
        require_folder(options.plot.parent)
    machine, table = _machine(options), read_table(options.table)
    config = SearchConfig(
        slo=Slo(
            ttft_s=options.slo_ttft_ms / 1e3,
            tpot_s=options.slo_tpot_ms / 1e3,
            share=options.share,
            is_joint=options.is_joint,
        ),
        most_rate=options.most_rate,
        tolerance=options.tolerance,
        prompt_tokens=options.prompt_tokens,
        mixed_tokens=options.mixed_tokens,
    )
    candidates = list(
        placements(
            machine,
            table,
            most_instances=options.most_instances,
            apart=options.kinds != "together",
            together=options.kinds != "apart",
        )
    )
    with counted("placements", len(candidates)) as advance:
        found = search(
            candidates,
            machine,
            table,
            config,
            lambda rate: trace_of(options.load, rate),
            on_rated=lambda rated: advance(),
        )
    if options.plot is not None:
        _plot(found, options.plot)
    return [_shown(found[: options.top], machine, table, config)]


def _machine(options: PlaceOptions) -> Machine:
    machine = read_machine(options.machine) if options.machine is not None else Machine()
    given = {
        "nodes": options.nodes,
        "gpus_per_node": options.gpus_per_node,
        "affinity": options.affinity,
    }
    return msgspec.structs.replace(machine, **{k: v for k, v in given.items() if v is not None})


def _shown(
    found: Sequence[Rated], machine: Machine, table: CostTable, config: SearchConfig
) -> Table:
    rows = []
    for rated in found:
        report, kept = rated.report, rated.kept
        p90 = report.percentiles(90)
        rows.append(
            [
                str(rated.placement),
                str(rated.placement.num_gpus),
                f"{rated.rate:.2f}",
                f"{rated.rate * rated.placement.num_gpus:.2f}",
                f"{p90['ttft'][0] * 1e3:.0f}",
                f"{p90['tpot'][0] * 1e3:.0f}",
                f"{kept.both:.0%}" if kept is not None else "–",
                " ".join(f"{share:.0%}" for share in report.busy.values()),
                " ".join(f"{share:.0%}" for share in report.most_used.values()),
                rated.limit,
            ]
        )
    return Table(
        title=f"{table.model} on {machine.nodes} x {machine.gpus_per_node} {table.device}, "
        f"affinity {machine.affinity}",
        columns=_COLUMNS,
        rows=rows,
        notes=[_reason(found, machine, config), f"Costs: {table.source}."],
    )


def _reason(found: Sequence[Rated], machine: Machine, config: SearchConfig) -> str:
    """Why the first is the first."""
    best = found[0]
    if not best.rate:
        return "None keeps its promises at the lowest rate tried; promise less, or add devices."
    units = machine.num_gpus // best.placement.num_gpus
    slo = config.slo
    text = (
        f"Best: {best.placement}, {best.rate:.2f} requests/s/GPU with {slo.share:.0%} of first "
        f"tokens within {slo.ttft_s * 1e3:g} ms and of further ones within {slo.tpot_s * 1e3:g}; "
        f"{units} of it fit. "
    )
    if best.missed_rate is not None:
        text += f"At {best.missed_rate:.2f} its {best.limit} are too slow. "
    others = [r for r in found[1:] if r.placement.is_apart != best.placement.is_apart]
    if others:
        kind = "apart" if others[0].placement.is_apart else "on the same instances"
        text += (
            f"The best with prompts and decodes {kind} is {others[0].placement} "
            f"({others[0].rate:.2f}; its {others[0].limit} are too slow first)."
        )
    return text.strip()


def _plot(found: Sequence[Rated], path: Path) -> None:
    """Rates of all placements, the best at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.3 * len(found)))
    axes = figure.subplots()
    names = [f"{rated.placement}, {rated.placement.num_gpus} GPUs" for rated in found][::-1]
    colours = ["C0" if rated.placement.is_apart else "C1" for rated in found][::-1]
    axes.barh(names, [rated.rate for rated in found][::-1], color=colours)
    axes.set_xlabel("requests a second and GPU")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
