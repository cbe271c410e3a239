"""`vkv soak`: phases in turn, each a cluster under requests and faults; then a table, and whether
anything was wrong."""

import itertools
import random
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
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
from .site import ClusterSite, Site
from .tally import Tally

_NOTES_S = 0.5  # between two looks at what engines have counted
_ROUND_S = 12.0  # of requests and faults, between two looks at what is left
_LEAST_S = 24.0  # of a phase, once its instances are there: machines may be slow to start them
_MOST_PHASE_S = 1200.0


@dataclass(frozen=True, kw_only=True)
class _Soak:
    """What all phases have in common.

    Attributes:
        chance: draws who asks for what and what is done when.
        tell: shows what is going on.
        at_rest: while it lasts, nothing but a phase's cluster is at work.
    """

    options: SoakOptions
    chance: random.Random
    tally: Tally
    tell: Callable[[str], None]
    at_rest: Callable[[], AbstractContextManager[None]]


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
            at_rest: Callable[[], AbstractContextManager[None]] = nullcontext
            if options.has("sessions"):
                desk = sessions(options, models, reference, home, tally)
                at_rest = stack.enter_context(desk).at_rest
            soak = _Soak(options=options, chance=chance, tally=tally, tell=tell, at_rest=at_rest)
            phase_s = min(_MOST_PHASE_S, (ends_s - time.monotonic()) / len(turns))
            for phase in itertools.cycle(turns):
                until_s = min(ends_s, time.monotonic() + phase_s)
                supply = Supply(reference, phase.mix, seed=options.seed, start=drawn[phase.name])
                try:
                    supply.wait_for_first()
                    yield from _phase(phase, soak, supply, until_s)
                finally:
                    supply.close()
                drawn[phase.name] = supply.num_drawn
                if time.monotonic() > ends_s - _ROUND_S or not tally.is_right:
                    return


def _phase(phase: Phase, soak: _Soak, supply: Supply, until_s: float) -> Iterator[None]:
    """Rounds on one cluster, one at least; ends early once something is wrong."""
    soak.tell(f"{phase.name}: {phase.about}")
    with open_site(phase, soak.options, soak.chance, soak.tally) as (site, front):
        clients = Clients(front, supply, phase.voices, soak.tally)
        until_s = max(until_s, time.monotonic() + _LEAST_S)
        while True:
            seconds = max(_ROUND_S / 2, min(_ROUND_S, until_s - time.monotonic()))
            _round(phase, soak, site, clients, seconds)
            if supply.error is not None:
                raise supply.error
            yield
            if not soak.tally.is_right or time.monotonic() > until_s - _ROUND_S / 2:
                return


def _round(phase: Phase, soak: _Soak, site: Site, clients: Clients, seconds: float) -> None:
    """Ask for some time while faults come; then wait for all, and look at what is left."""
    ends_s = time.monotonic() + seconds
    with clients.asking(soak.options.clients, soak.chance), site.faults():
        while (left_s := ends_s - time.monotonic()) > 0:
            time.sleep(min(_NOTES_S, left_s))
            site.note()
            soak.tell(f"{phase.name}: {phase.about}")
    with soak.at_rest():
        site.check_idle()
    soak.tell(f"{phase.name}: {phase.about}")


@contextmanager
def open_site(
    phase: Phase, options: SoakOptions, chance: random.Random, tally: Tally
) -> Iterator[tuple[Site, Front]]:
    """The cluster of a phase."""
    with phase.open(options.instances) as cluster:
        faults = Faults(cluster, options, phase, chance, tally)
        home = phase.models.base.parent
        yield ClusterSite(phase.name, cluster, faults, tally, home), cluster


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
