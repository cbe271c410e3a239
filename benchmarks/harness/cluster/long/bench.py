"""`vkv bench long`: contexts beyond one pool, and what it brings that instances lend memory.

In parts, each of which can be left out: the longest context over so many instances
(`context.py`), decode steps where first tokens lie elsewhere (`decode.py`), tokens a second with
lending and without, on real instances (`lending.py`) and on simulated ones that have the costs just
measured (`simulated.py`).

Source: Infinite-LLM, arXiv:2401.02669, sections 5 to 7.
"""

import tempfile
from collections.abc import Generator, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from ....runtime.frontend.progress import counted
from ....vmem.errors import InvalidConfig
from ...limits import LimitsProbe
from ...models.checkpoints import Checkpoints, save_checkpoints
from ...record import Findings, Record, Table, record_name
from . import context, decode, lending, simulated
from .costs import Costs, recorded_loan_cost, recorded_step_cost
from .options import LongOptions


def run(options: LongOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    record = Record(
        folder,
        record_name("long", options.shape, options.label),
        device=torch.device("cpu"),
        config=asdict(options),
        command=command,
    )
    found = _Found(options)
    probe = LimitsProbe(torch.device("cpu"), options.dtype)

    def steps() -> Generator[None, None, None]:
        with (
            tempfile.TemporaryDirectory(prefix="vkv-long-") as scratch,
            counted("cells", found.num_steps) as advance,
        ):
            saved = found.save(Path(scratch))
            for part in options.parts:
                probe.measure()
                for _ in found.measure(part, saved):
                    advance()
                    yield

    def findings() -> Findings:
        return Findings(results=found.results(), tables=found.tables(), draw=partial(_plot, found))

    return record.grow(steps(), findings, probe)


class _Found:
    """What all parts have found so far."""

    def __init__(self, options: LongOptions) -> None:
        self._options = options
        self._saved: Checkpoints | None = None
        self.contexts: dict[int, context.Longest] = {}
        self.decodes: decode.Decodes = {}
        self.lent = lending.Lent()
        self.simulated: dict[str, lending.Pairs] = {}

    @property
    def num_steps(self) -> int:
        """Of all parts."""
        options = self._options
        counts = {
            "context": len(options.counts),
            "decode": len(decode.cells(options)) * options.repeats,
            "lending": options.pairs * len(options.policies),
            "simulated": len(options.seeds) * len(options.policies),
        }
        return sum(counts[part] for part in options.parts)

    def save(self, scratch: Path) -> Checkpoints:
        """The model that all parts run."""
        options = self._options
        most = (
            context.most_positions(options),
            decode.num_tokens(options),
            options.most_tokens + 1,
        )
        self._saved = save_checkpoints(
            options.shape, None, options.dtype, None, scratch, max_position_embeddings=max(most)
        )
        return self._saved

    def measure(self, part: str, saved: Checkpoints) -> Iterator[None]:
        """A part; yields after each of its steps."""
        if part == "context":
            return context.measure(self._options, saved, self.contexts)
        if part == "decode":
            return decode.measure(self._options, saved, self.decodes)
        if part == "lending":
            return lending.measure(self._options, saved, self.lent)
        return simulated.measure(self._options, self._costs(saved), self.simulated)

    def _costs(self, saved: Checkpoints) -> Costs:
        """That simulated instances have: as measured just now, or in a record."""
        options = self._options
        fit = decode.link_cost(self.decodes, options.link)
        step, loan = self.lent.step_cost, None if fit is None else fit[0]
        if options.record is not None:
            step = step or recorded_step_cost(options.record)
            loan = loan or recorded_loan_cost(options.record, options.link)
        if step is None or loan is None:
            raise InvalidConfig(f"nothing was measured over {options.link}: give it in links")
        return Costs(step, loan, saved.kv_bytes_per_token)

    def results(self) -> dict[str, Any]:
        """Raw samples, for the record."""
        costs = {link: decode.link_cost(self.decodes, link) for link in self._options.links}
        return {
            "context": {str(count): asdict(one) for count, one in self.contexts.items()},
            "decode": [{**asdict(cell), **asdict(one)} for cell, one in self.decodes.items()],
            "loan_costs": {
                link: {**msgspec.structs.asdict(fit[0]), "error": fit[1]}
                for link, fit in costs.items()
                if fit is not None
            },
            "lending": lending.results(self.lent),
            "simulated": lending.runs_of(self.simulated),
        }

    def tables(self) -> list[Table]:
        """Of the parts that have something to show."""
        assert self._saved is not None
        tables: list[Table | None] = []
        if self.contexts:
            tables.append(context.table(self.contexts, self._options))
        if self.decodes:
            tables += [decode.table(self.decodes, self._saved), decode.fitted(self.decodes)]
        if self.lent.runs:
            tables.append(lending.real_table(self.lent, self._options))
        if self.simulated:
            tables.append(simulated.table(self.simulated, self._options))
        return [table for table in tables if table is not None]


def _plot(found: _Found, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8))
    left, right = figure.subplots(1, 2)
    if found.contexts:
        points = [(count, one.num_tokens) for count, one in found.contexts.items()]
        left.plot(*zip(*points, strict=True), marker="o")
    left.set_xlabel("instances")
    left.set_ylabel("tokens of the longest context")
    for link in dict.fromkeys((cell.link, cell.batch) for cell in found.decodes if cell.link):
        points = [
            (cell.creditors, one.median_s * 1e3)
            for cell, one in found.decodes.items()
            if (cell.link, cell.batch) == link or cell == decode.Cell(decode.HOME, batch=link[1])
        ]
        right.plot(*zip(*points, strict=True), marker="o", label=f"{link[0]}, {link[1]} requests")
    right.set_xlabel("creditors")
    right.set_ylabel("ms a decode step")
    if found.decodes:
        right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
