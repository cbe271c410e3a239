"""What `vkv bench stall` found: the steps of its runs, and what of them was waiting for memory."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..record import Table

MARK = 0.05  # of the median step: a longer wait for memory counts as a stall


@dataclass(kw_only=True)
class Run:
    """What happened in each step of one run.

    Attributes:
        step_s: length of the step.
        wait_s: what `grow` took of it.
        backed: slots that `grow` itself had to map pages for.
        asked: slots for which memory was asked ahead in it, because they lacked it still.
        mapping_time_s, background_time_s: as the cache counted them, over the whole run.
    """

    step_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    backed: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    mapping_time_s: float = 0.0
    background_time_s: float = 0.0

    @property
    def had_mapping(self) -> list[bool]:
        """Steps in which `grow` may have waited for mapping.

        It mapped pages itself, or the background may not have been done with what it was asked for
        in the step before; what it was asked for earlier and has not done is asked for again. In
        the first step, all that went before.
        """
        asked = [1, *self.asked] if any(self.asked) else [0, *self.asked]
        return [bool(b or a) for b, a in zip(self.backed, asked[:-1], strict=True)]

    def waits(self, *, mapping: bool) -> list[float]:
        """What `grow` took in steps with (or without) mapping, as shares of the median step."""
        median = statistics.median(self.step_s)
        return [
            wait / median
            for wait, had in zip(self.wait_s, self.had_mapping, strict=True)
            if had is mapping
        ]


def stall_tables(
    runs: Mapping[str, Sequence[Run]], facts: Mapping[str, Any], problem: str
) -> list[Table]:
    """Length of the steps, and what they waited for memory, by mode."""
    crossings = facts["crossings"]
    steps = Table(
        title=f"Decode steps: {problem}, {facts['backend']}",
        columns=[
            "look-ahead",
            "steps",
            "median, ms",
            "99th percentile, ms",
            "longest, ms",
            "those that pages are mapped in, times the others",
        ],
        rows=[_step_row(mode, done) for mode, done in runs.items()],
    )
    waits = Table(
        title=(
            f"Waits for memory: {facts['pages_per_crossing']} pages of "
            f"{facts['page_bytes'] >> 10} KiB every {facts['row_tokens']} tokens of a slot"
        ),
        columns=[
            "look-ahead",
            "page crossings",
            "mapped by grow itself",
            f"steps that waited over {MARK:.0%} of the median",
            "longest wait, % of the median",
            "longest without any mapping, %",
            "mapping in the background, s",
        ],
        rows=[_wait_row(mode, done, crossings) for mode, done in runs.items()],
    )
    return [steps, waits]


def _step_row(mode: str, runs: Sequence[Run]) -> list[str]:
    steps = sorted(seconds for run in runs for seconds in run.step_s)
    return [
        mode,
        f"{len(steps):,}",
        f"{statistics.median(steps) * 1e3:.2f}",
        f"{steps[math.ceil(0.99 * len(steps)) - 1] * 1e3:.2f}",
        f"{steps[-1] * 1e3:.2f}",
        _meanwhile(mode, runs),
    ]


def _wait_row(mode: str, runs: Sequence[Run], crossings: Sequence[int]) -> list[str]:
    waits = [wait for run in runs for wait in run.waits(mapping=True)]
    others = [wait for run in runs for wait in run.waits(mapping=False)]
    return [
        mode,
        str(sum(crossings) * len(runs)),
        str(sum(sum(run.backed) for run in runs)),
        str(sum(wait > MARK for wait in waits)),
        f"{100 * max(waits, default=0.0):.2f}",
        f"{100 * max(others, default=0.0):.2f}",
        f"{sum(run.background_time_s for run in runs):.3f}",
    ]


def _meanwhile(mode: str, runs: Sequence[Run]) -> str:
    """Steps in which pages were mapped over those in which none were, medians of each."""
    ratios = []
    for run in runs:
        busy = run.asked if mode == "on" else run.backed
        mapped = [s for s, slots in zip(run.step_s, busy, strict=True) if slots]
        others = [s for s, slots in zip(run.step_s, busy, strict=True) if not slots]
        if mapped and others:
            ratios.append(statistics.median(mapped) / statistics.median(others))
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def draw(runs: Mapping[str, Sequence[Run]], crossings: Sequence[int], path: Path) -> None:
    """A panel a mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7))
    panels = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (mode, done) in zip(panels, runs.items(), strict=True):
        _panel(axes, done, crossings)
        axes.set_title(f"look-ahead {mode}")
        axes.set_ylabel("ms")
        axes.set_yscale("log")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    panels[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _panel(axes: Any, runs: Sequence[Run], crossings: Sequence[int]) -> None:
    """Where pages were needed, and of each run the steps and what they waited."""
    for step in (step for step, slots in enumerate(crossings) if slots):
        axes.axvline(step, color="#ddd", linewidth=1)
    axes.plot([], color="#ddd", label="a slot needs pages")
    for run in runs:
        axes.plot([seconds * 1e3 for seconds in run.step_s], color="#07a", linewidth=0.6)
        waits = [seconds * 1e3 for seconds in run.wait_s]
        axes.plot(waits, color="#c40", linestyle="", marker=".", markersize=3)
    axes.plot([], color="#07a", label="steps of each run")
    axes.plot([], color="#c40", linestyle="", marker=".", label="their waits for memory")
    median = statistics.median(seconds for run in runs for seconds in run.step_s)
    label = f"{MARK:.0%} of the median step"
    axes.axhline(MARK * median * 1e3, color="#c40", linewidth=0.8, linestyle="--", label=label)
