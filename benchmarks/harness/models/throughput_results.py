"""What `vkv bench throughput` measured: its tables and plot."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..limits import Limits
from ..record import Table
from .cells import DecodeStep
from .checkpoints import Checkpoints, gains_table
from .systems import has_dense_weights


@dataclass(kw_only=True)
class Results:
    """What came of each system, by name.

    Attributes:
        samples: tokens a second by cell, one for each repeat.
        failures: why a cell has none.
        peaks: the most memory that was resident, in bytes.
        weights: bytes of its weights as it keeps them; those of the checkpoint if it cannot say.
        reads: bytes of those that a decode step reads.
        first_tokens: by cell, each prompt's first token, of the last repeat.
        versions: of its packages, by name.
        beyond: by cell, the repeats (from 1) whose figure is more than memory allowed, however
            often it was measured.
    """

    samples: dict[str, dict[str, list[float]]]
    failures: dict[str, dict[str, str]]
    peaks: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    first_tokens: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    beyond: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, systems: Iterable[str], cells: Iterable[str]) -> "Results":
        """Nothing yet."""
        names = list(cells)
        samples = {system: {cell: [] for cell in names} for system in systems}
        failures: dict[str, dict[str, str]] = {system: {} for system in samples}
        tokens: dict[str, dict[str, list[int]]] = {system: {} for system in samples}
        beyond: dict[str, dict[str, list[int]]] = {system: {} for system in samples}
        return cls(samples=samples, failures=failures, first_tokens=tokens, beyond=beyond)

    def fail(self, system: str, error: Exception) -> None:
        """Note a system that cannot be measured at all."""
        self.failures[system] |= {cell: str(error) for cell in self.samples[system]}

    def not_measured(self, repeats: int) -> dict[str, dict[str, str]]:
        """Why a cell has less than so many samples: a failure, or the run is not over."""
        missing = {
            system: {
                cell: f"{len(rates)} of {repeats} repeats"
                for cell, rates in cells.items()
                if len(rates) < repeats
            }
            for system, cells in self.samples.items()
        }
        return {system: cells | self.failures[system] for system, cells in missing.items()}


def as_record(
    results: Results, checkpoints: Checkpoints, repeats: int, import_bytes: int
) -> dict[str, Any]:
    """What the record keeps."""
    return {
        "model": {
            "weight_bytes": checkpoints.weight_bytes,
            "kv_bytes_per_token": checkpoints.kv_bytes_per_token,
            "vocab_size": checkpoints.vocab_size,
            "group_size": checkpoints.group_size,
            "import_bytes": import_bytes,
        },
        "tokens_per_s": results.samples,
        "failures": results.not_measured(repeats),
        "peak_rss_bytes": results.peaks,
        "weight_bytes": results.weights,
        "read_bytes": results.reads,
        "first_tokens": results.first_tokens,
        "versions": results.versions,
        "beyond_limit": {system: cells for system, cells in results.beyond.items() if cells},
    }


def tables(
    results: Results,
    checkpoints: Checkpoints,
    *,
    repeats: int,
    baseline: str,
    int4: Sequence[str],
    decodes: Mapping[str, DecodeStep],
    held_tokens: int,
    import_bytes: int,
    limits: Limits,
) -> list[Table]:
    """Rates, their ratios, memory, and the machine's limits.

    Ratios are to `baseline` and to the first of `int4`, the systems whose weights free memory that
    `baseline` takes. `decodes` are the cells that time decodes, `held_tokens` is the most tokens
    whose KV is held at once, `import_bytes` what a process takes that loads no model.
    """
    names = list(next(iter(results.samples.values())))
    found = [
        Table(
            title="Tokens a second (median)",
            columns=["system", *names],
            rows=[
                [system, *(_marked(results, system, name) for name in names)]
                for system in results.samples
            ],
        ),
        *(_ratio_table(results, name, names) for name in (baseline, *int4[:1])),
        *_agreement_table(results, baseline, names),
        _memory_table(results, held_tokens * checkpoints.kv_bytes_per_token, import_bytes),
    ]
    compared = (baseline, *int4)
    weights = {name: results.weights[name] for name in compared if name in results.weights}
    if len(weights) > 1 and baseline in weights:
        found.append(gains_table(weights, checkpoints.kv_bytes_per_token))
    kv_bytes = {
        cell: step.kv_tokens * checkpoints.kv_bytes_per_token for cell, step in decodes.items()
    }
    found.append(_limits_table(results, limits, list(weights), decodes, kv_bytes))
    failed = [
        [system, cell, text]
        for system, cells in results.not_measured(repeats).items()
        for cell, text in cells.items()
    ]
    if failed:
        found.append(Table(title="Not measured", columns=["system", "cell", "reason"], rows=failed))
    return found


def _ratio_table(results: Results, baseline: str, names: Sequence[str]) -> Table:
    ours = results.samples[baseline]
    return Table(
        title=f"{baseline} over each (median of paired ratios)",
        columns=["system", *names],
        rows=[
            [system, *(_ratio(ours[name], cells[name]) for name in names)]
            for system, cells in results.samples.items()
            if system != baseline
        ],
    )


def _agreement_table(results: Results, baseline: str, names: Sequence[str]) -> Iterator[Table]:
    """How many first tokens are the baseline's, of systems with the same weights."""
    ours = results.first_tokens[baseline]
    rows = [
        [system, *(_alike(ours.get(name), cells.get(name)) for name in names)]
        for system, cells in results.first_tokens.items()
        if system != baseline and has_dense_weights(system) and cells
    ]
    if rows:
        title = f"First tokens that are those of {baseline}"
        yield Table(title=title, columns=["system", *names], rows=rows)


def _alike(ours: Sequence[int] | None, theirs: Sequence[int] | None) -> str:
    if ours is None or theirs is None:
        return ""
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return f"{same} of {len(ours)}"


def _memory_table(results: Results, held_bytes: int, import_bytes: int) -> Table:
    rows = [
        ["the most KV", f"{held_bytes / 2**20:.0f}", "", "", "", ""],
        ["a process that only imports vkv", f"{import_bytes / 2**20:.0f}", "", "", "", ""],
    ]
    for name, peak in results.peaks.items():
        weights = results.weights[name]
        needed = weights + held_bytes
        over = peak - needed - import_bytes
        mebibytes = (f"{number / 2**20:.0f}" for number in (peak, weights, peak - needed, over))
        rows.append([name, *mebibytes, f"{over / needed:+.0%}"])
    return Table(
        title="Peak resident memory",
        columns=[
            "system",
            "MiB",
            "its weights, MiB",
            "beyond them and the most KV, MiB",
            "beyond those and the imports, MiB",
            "of weights and the most KV",
        ],
        rows=rows,
    )


def _limits_table(
    results: Results,
    limits: Limits,
    systems: Sequence[str],
    decodes: Mapping[str, DecodeStep],
    kv_bytes: Mapping[str, float],
) -> Table:
    """Of memory and matrix units, and what memory allows in steps.

    For some `systems`, also the steps of each decode, whose KV of `kv_bytes` is read too,
    and the share of them that the system reached.
    """
    steps = []
    for name in systems:
        for cell, step in decodes.items():
            limit = limits.read_bytes_per_s / (results.reads[name] + kv_bytes[cell])
            rates = results.samples[name][cell]
            reached = statistics.median(rates) / step.num_tokens / limit if rates else None
            share = "" if reached is None else f", {reached:.0%} reached"
            what = f"steps a second in {cell} if weights and KV of {name} are read once"
            steps.append([what, f"{limit:.1f}{share}"])
    return Table(
        title="Limits of this machine, measured in this run",
        columns=["limit", "value"],
        rows=[
            ["reading memory, GB/s", f"{limits.read_bytes_per_s / 1e9:.1f}"],
            [f"matrix product in {limits.dtype}, TFLOP/s", f"{limits.flops_per_s / 1e12:.2f}"],
            *(
                [
                    f"steps a second if the weights of {name} are read once",
                    f"{limits.read_bytes_per_s / read_bytes:.1f}",
                ]
                for name, read_bytes in results.reads.items()
            ),
            *steps,
        ],
    )


def _marked(results: Results, system: str, cell: str) -> str:
    """The median, with a mark if memory cannot have been read so fast."""
    mark = " (beyond the limit)" if results.beyond[system].get(cell) else ""
    return _median(results.samples[system][cell]) + mark


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else "none"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    pairs = list(zip(ours, theirs, strict=False))  # one may have been cut short
    return f"{statistics.median(a / b for a, b in pairs):.2f}" if pairs else ""


def draw(samples: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    """A panel for each cell, a bar for each system."""
    from matplotlib.figure import Figure

    cells = list(next(iter(samples.values())))
    figure = Figure(figsize=(2.2 * len(cells), 4))
    for index, cell in enumerate(cells):
        axes = figure.add_subplot(1, len(cells), index + 1)
        names = [name for name, rates in samples.items() if rates[cell]]
        axes.bar(
            range(len(names)),
            [statistics.median(samples[name][cell]) for name in names],
            color=["#0a7" if name.startswith("vkv") else "#89a" for name in names],
        )
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_title(cell, fontsize=9)
        axes.tick_params(axis="y", labelsize=7)
    figure.supylabel("tokens a second", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
