"""Benchmark records: what ran, on what, and the raw samples, as JSON with a table beside it."""

import dataclasses
import datetime
import importlib.util
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..runtime.cli.machine import hardware, versions
from ..vmem import linux
from ..vmem.errors import InvalidConfig
from .limits import Limits, LimitsProbe

INCOMPLETE = "The run ended early: this is what had been measured until then."


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


def require_folder(folder: Path) -> None:
    """Raise InvalidConfig if nothing can be written to a folder, there or to be made."""
    if not linux.can_write(folder):
        raise InvalidConfig(f"nothing can be written to {folder}; give another folder")


def read_record(path: Path) -> dict[str, Any]:
    """What a bench has written. Raises InvalidConfig for a file that is no record."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"{path} is no record: {error}; give the JSON of a bench") from error
    if not isinstance(content, dict):
        raise InvalidConfig(f"{path} is no record but a {type(content).__name__}")
    return content


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What a bench has found so far.

    Attributes:
        results: raw samples, for the record; what JSON does not know is written as its text.
        draw: writes the plot.
    """

    results: Mapping[str, Any]
    tables: Sequence[Table]
    draw: Callable[[Path], None]


class Record:
    """A record on its way: `<what>_<hardware>_<date>.json`, written again as it grows.

    One of the same processor and day is written over. One of another processor that sells under
    the same name is not: `<hardware>` then says more of the processor.

    Raises InvalidConfig if plots cannot be drawn here, or nothing can be written to the folder.
    """

    def __init__(
        self,
        folder: Path,
        what: str,
        *,
        device: torch.device,
        config: Mapping[str, Any],
        command: str,
    ) -> None:
        require_matplotlib()  # before the work, not after it
        require_folder(folder)
        self._machine = hardware(device)
        self._date = datetime.date.today().isoformat()
        self._what, self._config, self._command = what, dict(config), command
        self.path = _free_path(folder, what, self._machine, self._date)

    def grow(
        self,
        steps: Generator[None, None, None],
        findings: Callable[[], Findings],
        probe: LimitsProbe,
    ) -> tuple[Path, list[Table]]:
        """Go through `steps`, and write after each what has been found; returns path and tables.

        Ctrl-C ends it, and the record says that it is not complete; before the first step is done
        there is none, and KeyboardInterrupt is raised. `probe` has measured before that.
        """
        is_complete, num_steps = False, 0
        try:
            with closing(steps):
                for _ in steps:
                    self.write(findings(), probe.limits(), is_complete=False)
                    num_steps += 1
            is_complete = True
        except KeyboardInterrupt:
            if not num_steps:
                raise
            Console(stderr=True).print("interrupted; the record holds what was measured until here")
        probe.measure()
        found = findings()
        self.write(found, probe.limits(), is_complete=is_complete)
        found.draw(self.path.with_suffix(".png"))
        return self.path, list(found.tables)

    def write(self, found: Findings, limits: Limits, *, is_complete: bool = True) -> None:
        """Write the JSON, and the tables beside it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "what": self._what,
            "date": self._date,
            "is_complete": is_complete,
            "command": self._command,
            "hardware": self._machine,
            "versions": versions(),
            "limits": dataclasses.asdict(limits),
            "config": self._config,
            "tables": [dataclasses.asdict(table) for table in found.tables],
            "results": dict(found.results),
        }
        unfinished = self.path.with_suffix(".part")  # never half a record, whatever happens
        unfinished.write_text(json.dumps(record, default=str) + "\n")
        unfinished.replace(self.path)
        lines = [
            f"# {self._what}, {self._date}",
            "",
            f"`{self._command}` on {place(self._machine)}.",
        ]
        if not is_complete:
            lines += ["", INCOMPLETE]
        lines += ["", "\n".join(table.markdown() for table in found.tables), str(limits)]
        self.path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def record_name(*words: str | None) -> str:
    """What is measured, in words joined by dashes; those that are empty are left out."""
    return "-".join(filter(None, words))


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
