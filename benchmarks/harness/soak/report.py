"""What a soak has found: tables, and raw counts for the record."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..record import Table
from .options import SoakOptions
from .site import FRONT
from .tally import Process, Tally

_MOST_LINES = 20  # of what was wrong


def results(tally: Tally, took_s: float) -> dict[str, Any]:
    """All counts."""
    return {
        "took_s": took_s,
        "is_right": tally.is_right,
        "requests": dict(tally.requests),
        "tokens": dict(tally.tokens),
        "moves": dict(tally.all_moves()),
        "faults": dict(tally.faults),
        "wrong_tokens": tally.wrong_tokens,
        "lost_requests": tally.lost_requests,
        "wrong": tally.wrong,
        "leaks": tally.leaks,
        "held_pages": tally.held_pages,
        "processes": {name: list(map(asdict, seen)) for name, seen in tally.processes.items()},
    }


def tables(options: SoakOptions, tally: Tally, took_s: float) -> list[Table]:
    """What is shown in the end."""
    found = [
        _counts("asked and answered as it should be", "requests", tally.requests),
        _counts("compared", "tokens", tally.tokens),
        _counts("moved and saved", "count", tally.all_moves(), sums=False),
        _counts("injected", "faults", tally.faults),
        _left(tally),
        _verdict(options, tally, took_s),
    ]
    return [table for table in found if table.rows]


def _counts(title: str, what: str, counts: Mapping[str, int], *, sums: bool = True) -> Table:
    rows = [[name, f"{count:,}"] for name, count in counts.items() if count]
    if sums and len(rows) > 1:
        rows.append(["all", f"{sum(counts.values()):,}"])
    return Table(title=title, columns=["", what], rows=rows)


def _left(tally: Tally) -> Table:
    """Processes that were looked at more than once, those of instances by the worst of them."""
    of_soak = [seen for seen in tally.processes.values() if seen[0].name.startswith(FRONT)]
    others = [seen for seen in tally.processes.values() if seen not in of_soak and len(seen) > 1]
    rows = []
    if tally.held_pages:
        rows.append(["pages", str(tally.held_pages[0]), str(tally.held_pages[-1])])
    for seen in of_soak:
        rows += _rows(seen[0].name, seen)
    if others:
        longest = max(others, key=len)
        rows += _rows(longest[0].name, longest)
        worst = max(others, key=lambda seen: seen[-1].rss_bytes - seen[0].rss_bytes)
        if worst is not longest:
            rows += _rows(worst[0].name, worst)
    return Table(
        title="held while nothing runs",
        columns=["", "at the start", "at the end"],
        rows=rows,
        notes=[
            "Pages of all instances together, once what finished requests hold was given back. Of "
            "instances the one that was seen most often, and the one that grew most."
        ],
    )


def _rows(name: str, seen: list[Process]) -> list[list[str]]:
    first, last = seen[0], seen[-1]
    return [
        [f"{name}: descriptors", str(first.num_descriptors), str(last.num_descriptors)],
        [f"{name}: threads", str(first.num_threads), str(last.num_threads)],
        [
            f"{name}: MiB of its own",
            f"{first.rss_bytes / 2**20:.1f}",
            f"{last.rss_bytes / 2**20:.1f}",
        ],
    ]


def _verdict(options: SoakOptions, tally: Tally, took_s: float) -> Table:
    lines = [*tally.wrong, *tally.leaks]
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"and {len(lines) - _MOST_LINES} more"]
    left_out = f", without {', '.join(options.without)}" if options.without else ""
    return Table(
        title="verdict",
        columns=["", ""],
        rows=[
            ["minutes", f"{took_s / 60:.1f}"],
            ["requests", f"{tally.requests.total():,}"],
            ["tokens", f"{tally.tokens.total():,}"],
            ["wrong tokens", str(tally.wrong_tokens)],
            ["lost requests", str(tally.lost_requests)],
            ["left over", str(len(tally.leaks))],
        ],
        notes=[
            f"Seed {options.seed}, {options.instances} instances{left_out}.",
            *(lines or ["Nothing was wrong."]),
        ],
    )


def draw_plot(tally: Tally, path: Path) -> None:
    """Memory of each process whenever nothing ran, and requests by kind."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    instances = "instances"
    for seen in tally.processes.values():
        mib = [one.rss_bytes / 2**20 for one in seen]
        if seen[0].name.startswith(FRONT):
            left.plot(mib, label=seen[0].name)
        elif len(seen) > 1:  # there may be a hundred of them, which share a name here
            left.plot(mib, label=instances, color="grey", linewidth=0.7)
            instances = "_"
    left.set(xlabel="rounds", ylabel="MiB of its own", title="while nothing runs")
    left.legend()
    right.barh(list(tally.requests), list(tally.requests.values()))
    right.set(title="requests")
    figure.savefig(path, dpi=120)
    plt.close(figure)
