"""`vkv bench startup`: how long a user waits before anything happens, in fresh processes.

Each command is started once unseen, so that its files lie in the system's cache, and then the
commands take turns.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from ..runtime.frontend.progress import counted
from .limits import LimitsProbe
from .options import StartupOptions
from .peers.peer import interpreter_of
from .record import Findings, Record, Table

_VKV = "import sys; from vkv.runtime.cli.main import main; sys.argv[0] = 'vkv'; main()"
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "Python alone": ("-c", "pass"),
    "import vkv": ("-c", "import vkv"),
    "import vkv; vkv.LLM": ("-c", "import vkv; vkv.LLM"),
    "vkv --help": ("-c", _VKV, "--help"),
    "vkv bench --help": ("-c", _VKV, "bench", "--help"),
    "vkv info": ("-c", _VKV, "info"),
}
_LAUNCHER = "from vkv.runtime.cluster.instances.launcher import Launcher"
RAY = ("-c", f"{_LAUNCHER}; Launcher().close()")


def run(options: StartupOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path.

    Raises subprocess.CalledProcessError if a command fails.
    """
    cpu = torch.device("cpu")
    record = Record(folder, "startup", device=cpu, config=asdict(options), command=command)
    known = list(options.peers)
    pythons = {n: interpreter_of(n, path, known) for n, path in options.peers.items()}
    commands = {name: (sys.executable, *words) for name, words in COMMANDS.items()}
    if importlib.util.find_spec("ray") is not None:
        commands["Ray started and ended"] = (sys.executable, *RAY)
    for peer, python in pythons.items():
        commands |= {f"{name}, {peer}": (python, *words) for name, words in COMMANDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    probe = LimitsProbe(cpu, torch.float32)

    def steps() -> Generator[None, None, None]:
        probe.measure()
        for words in commands.values():
            _start(words)
        with counted("startup", options.repeats) as advance:
            for _ in range(options.repeats):
                for name, words in commands.items():
                    seconds[name].append(_start(words))
                advance()
                yield

    def findings() -> Findings:
        return Findings(
            results={"seconds": seconds}, tables=[_table(seconds)], draw=partial(_plot, seconds)
        )

    return record.grow(steps(), findings, probe)


def _start(command: Sequence[str]) -> float:
    """Seconds from the start of a process to its end."""
    start = time.perf_counter()
    subprocess.run(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - start


def _table(seconds: Mapping[str, Sequence[float]]) -> Table:
    return Table(
        title="Seconds from the start of a process to its end",
        columns=["command", "median", "shortest", "longest"],
        rows=[
            [name, *(f"{figure:.2f}" for figure in (statistics.median(s), min(s), max(s)))]
            for name, s in seconds.items()
        ],
    )


def _plot(seconds: Mapping[str, Sequence[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.3 * len(seconds)))
    axes = figure.subplots()
    axes.barh(list(seconds), [statistics.median(s) for s in seconds.values()], color="#0a7")
    axes.invert_yaxis()
    axes.set_xlabel("seconds (median)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
