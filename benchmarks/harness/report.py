"""`vkv bench report`: the newest record of each kind and machine, on one Markdown page.

Machines are told apart by their GPU or, without one, by number of cores and processor: name,
vector instructions, and family and model where the record has them.

The record (JSON) is the source of everything but the plot, which is linked. Records written
before tables were part of them have theirs read from the Markdown beside them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..vmem.errors import InvalidConfig
from .limits import Limits
from .record import INCOMPLETE, Table, identity, place

PAGE = "REPORT.md"
_FIELDS = {"what", "date", "command", "hardware", "versions", "config", "results"}


@dataclass(frozen=True)
class Record:
    """A record and where it lies."""

    path: Path
    content: Mapping[str, Any]

    @property
    def what(self) -> str:
        return self.content["what"]

    @property
    def machine(self) -> str:
        """Which machine it is of, in words."""
        return identity(self.content["hardware"])

    @property
    def heading(self) -> str:
        return f"{self.what}, {self.machine}, {self.content['date']}"


def report(folder: Path) -> Path:
    """Write `REPORT.md` into `folder` from the records there; returns its path.

    The same records give the same page. Raises InvalidConfig if there are none.
    """
    records = newest_records(folder)
    if not records:
        raise InvalidConfig(f"{folder} holds no benchmark records; make one with vkv bench memory")
    lines = ["# Benchmarks", "", "Made by `vkv bench report` from the records beside it.", ""]
    lines += [f"- [{record.heading}](#{_anchor(record.heading)})" for record in records]
    sections = [_section(record) for record in records]
    page = folder / PAGE
    page.write_text("\n".join(lines) + "\n\n" + "\n".join(sections))
    return page


def newest_records(folder: Path) -> list[Record]:
    """The newest record of each kind and machine, sorted by these. Other JSON is passed over."""
    newest: dict[tuple[str, str], Record] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not content.keys() >= _FIELDS:
            continue
        record = Record(path, content)
        key = record.what, record.machine
        if key not in newest or newest[key].content["date"] <= content["date"]:
            newest[key] = record
    return [newest[key] for key in sorted(newest)]


def _section(record: Record) -> str:
    content = record.content
    machine, versions = content["hardware"], content["versions"]
    lines = [
        f"## {record.heading}",
        "",
        f"`{content['command']}` ([record]({record.path.name}))",
        "",
        f"- {_machine_line(machine)}",
        "- " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if "limits" in content:
        lines.append(f"- {Limits.from_record(content['limits'])}")
    if not content.get("is_complete", True):
        lines += ["", INCOMPLETE]
    lines += ["", _tables(record)]
    plot = record.path.with_suffix(".png")
    if plot.exists():
        lines += [f"![{record.what}]({plot.name})", ""]
    return "\n".join(lines)


def _machine_line(machine: Mapping[str, Any]) -> str:
    parts = [
        place(machine),
        f"{machine['threads']} threads",
        f"{machine['memory_gib']} GiB",
        machine["cpu_capability"],
        *([f"processor {machine['cpu_model']}"] if "cpu_model" in machine else []),
        f"Linux {machine['system']}",
        f"load {machine['load_before']:.1f} before the record was written",
    ]
    return ", ".join(parts)


def _tables(record: Record) -> str:
    """The record's tables in Markdown, each with a heading of the third level."""
    stored: Sequence[Mapping[str, Any]] | None = record.content.get("tables")
    if stored is not None:
        return "\n".join(Table(**table).markdown() for table in stored)
    beside = record.path.with_suffix(".md")
    if not beside.exists():
        return "No tables are kept of this record.\n"
    text = beside.read_text()
    start = text.find("\n### ")
    return text[start + 1 :] if start >= 0 else ""


def _anchor(heading: str) -> str:
    """The name under which a heading of a page can be linked to, as GitHub forms it."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")
