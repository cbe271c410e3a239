"""Benchmark records: what ran, on what, and the raw samples, as JSON with a table beside it."""

import dataclasses
import datetime
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..runtime.cli.machine import hardware, versions
from ..vmem.errors import InvalidConfig
from .limits import Limits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of a result, for the terminal and for Markdown.

    Attributes:
        notes: what the rows do not say; a paragraph each, under the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table in Markdown, numbers to the right."""
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "|".join(["---"] + ["---:"] * (len(self.columns) - 1)) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"


def require_matplotlib() -> None:
    """Raise InvalidConfig if plots cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidConfig("matplotlib draws the plots and is missing: pip install 'vkv[bench]'")


def write_record(
    folder: Path,
    what: str,
    *,
    device: torch.device,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    tables: Sequence[Table],
    limits: Limits,
    command: str,
) -> Path:
    """Write `<what>_<hardware>_<date>.json` and the tables beside it; returns the JSON's path.

    A record of the same processor is written over. One of another processor that sells under the
    same name is not: `<hardware>` then says more of the processor.
    What JSON does not know, a `torch.dtype` for one, is written as its text.
    """
    machine = hardware(device)
    today = datetime.date.today().isoformat()
    path = _free_path(folder, what, machine, today)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "what": what,
        "date": today,
        "command": command,
        "hardware": machine,
        "versions": versions(),
        "limits": dataclasses.asdict(limits),
        "config": dict(config),
        "tables": [dataclasses.asdict(table) for table in tables],
        "results": dict(results),
    }
    path.write_text(json.dumps(record, default=str) + "\n")
    head = f"# {what}, {today}\n\n`{command}` on {place(machine)}.\n\n"
    shown = "\n".join(table.markdown() for table in tables)
    path.with_suffix(".md").write_text(f"{head}{shown}\n{limits}\n")
    return path


def place(machine: Mapping[str, Any]) -> str:
    """Where a record was made, in words, from its `hardware`."""
    return machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"


def identity(machine: Mapping[str, Any]) -> str:
    """`place`, and all that a record says of which processor that is.

    One name is sold for several: the capability tells some apart, the model all; older records
    lack it.
    """
    if "gpu" in machine:
        return place(machine)
    more = (machine.get("cpu_capability"), machine.get("cpu_model"))
    return ", ".join([place(machine), *filter(None, more)])


def _free_path(folder: Path, what: str, machine: Mapping[str, Any], date: str) -> Path:
    """The shortest name that no record of another processor has."""
    more = [machine["cpu_capability"], machine.get("cpu_model", "")]
    names = [" ".join([_short_name(machine), *more[:count]]) for count in range(len(more) + 1)]
    paths = [folder / f"{what}_{_slug(name)}_{date}.json" for name in names]
    return next((path for path in paths if not _is_of_another(path, machine)), paths[-1])


def _is_of_another(path: Path, machine: Mapping[str, Any]) -> bool:
    if not path.exists():
        return False
    return identity(json.loads(path.read_text())["hardware"]) != identity(machine)


def _short_name(machine: Mapping[str, Any]) -> str:
    return machine.get("gpu") or f"{machine['processor']}-{machine['cores']}c"


def _slug(name: str) -> str:
    name = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
