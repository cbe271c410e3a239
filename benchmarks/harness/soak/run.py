"""`vkv soak`: phases in turn, each a cluster under requests and faults; then a table, and whether
anything was wrong."""

import itertools
import random
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..limits import LimitsProbe
from ..record import Findings, Record, Table
from .clients import Clients, Front, Supply
from .desk import sessions
from .faults import Faults
from .models import save_models
from .options import SoakOptions
from .phases import Phase, phases
from .reference import Reference
from .report import draw_plot, results, tables
from .site import ClusterSite, Site, soak_round
from .tally import Tally

_ROUND_S = 12.0  # of requests and faults, between two looks at what is left
_LEAST_S = 24.0  # of a phase, once its instances are there: machines may be slow to start them
_MOST_PHASE_S = 1200.0


def run(options: SoakOptions, command: str) -> tuple[Path | None, list[Table], Tally]:
    """Soak; returns the record's path, if there is one, its tables, and what was counted.

    Ctrl-C ends it after the round, with what there is so far.
    """
    tally = Tally()
    started_s = time.monotonic()

    def findings() -> Findings:
        took_s = time.monotonic() - started_s
        return Findings(
            results=results(tally, took_s),
            tables=tables(options, tally, took_s),
            draw=lambda path: draw_plot(tally, path),
        )

    steps = _steps(options, tally)
    if options.out is None:
        try:
            for _ in steps:
                pass
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted; the table holds what was seen until here")
        return None, list(findings().tables), tally
    device = torch.device("cpu")
    record = Record(options.out, "soak", device=device, config=asdict(options), command=command)
    probe = LimitsProbe(device, torch.float32)
    probe.measure()
    path, found = record.grow(steps, findings, probe)
    return path, found, tally


def _steps(options: SoakOptions, tally: Tally) -> Generator[None, None, None]:
    """All phases; yields after each round."""
    ends_s = time.monotonic() + 60 * options.minutes
    chance = random.Random(f"{options.seed} faults")
    with (
        tempfile.TemporaryDirectory(prefix="vkv-soak-") as name,
        _shown(60 * options.minutes, tally) as tell,
    ):
        home = Path(name)
        models = save_models(home, seed=options.seed)
        turns = phases(options, models, home)
        drawn = dict.fromkeys((phase.name for phase in turns), 0)
        with ExitStack() as stack:
            reference = stack.enter_context(Reference(models, home / "reference.log"))
            if options.has("sessions"):
                stack.enter_context(sessions(options, models, reference, home, tally))
            phase_s = min(_MOST_PHASE_S, (ends_s - time.monotonic()) / len(turns))
            for phase in itertools.cycle(turns):
                until_s = min(ends_s, time.monotonic() + phase_s)
                supply = Supply(reference, phase.mix, seed=options.seed, start=drawn[phase.name])
                try:
                    supply.wait_for_first()
                    yield from _phase(phase, options, supply, chance, tally, until_s, tell)
                finally:
                    supply.close()
                drawn[phase.name] = supply.num_drawn
                if time.monotonic() > ends_s - _ROUND_S or not tally.is_right:
                    return


def _phase(
    phase: Phase,
    options: SoakOptions,
    supply: Supply,
    chance: random.Random,
    tally: Tally,
    until_s: float,
    tell: Callable[[str], None],
) -> Iterator[None]:
    """Rounds on one cluster, one at least; ends early once something is wrong."""
    tell(f"{phase.name}: {phase.about}")
    with open_site(phase, options, chance, tally) as (site, front):
        clients = Clients(front, supply, phase.voices, tally)
        until_s = max(until_s, time.monotonic() + _LEAST_S)
        while True:
            seconds = max(_ROUND_S / 2, min(_ROUND_S, until_s - time.monotonic()))
            soak_round(
                site,
                clients,
                options.clients,
                seconds,
                chance,
                lambda: tell(f"{phase.name}: {phase.about}"),
            )
            if supply.error is not None:
                raise supply.error
            yield
            if not tally.is_right or time.monotonic() > until_s - _ROUND_S / 2:
                return


@contextmanager
def open_site(
    phase: Phase, options: SoakOptions, chance: random.Random, tally: Tally
) -> Iterator[tuple[Site, Front]]:
    """The cluster of a phase."""
    with phase.open(options.instances) as cluster:
        faults = Faults(cluster, options, phase, chance, tally)
        kv_dir = phase.options.get("kv_dir")
        yield ClusterSite(phase.name, cluster, faults, tally, kv_dir), cluster


@contextmanager
def _shown(seconds: float, tally: Tally) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal's standard error, or now and then a line where there is none."""
    console, began_s, told_s = Console(stderr=True), time.monotonic(), 0.0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("starting", total=seconds, counts="")

        def tell(what: str) -> None:
            nonlocal told_s
            now_s = time.monotonic() - began_s
            counts = (
                f"{tally.requests.total()} requests, {tally.faults.total()} faults, "
                f"{tally.wrong_tokens} wrong tokens, {tally.lost_requests} lost"
            )
            progress.update(task, completed=now_s, description=what, counts=counts)
            if not console.is_terminal and now_s - told_s > 10.0:
                told_s = now_s
                console.print(f"{now_s:.0f} s, {what}: {counts}", soft_wrap=True)

        yield tell
