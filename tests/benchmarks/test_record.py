"""Records that grow: what is on disk while a bench runs, and after Ctrl-C."""

import json
import sys
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from vkv.bench import startup
from vkv.bench.limits import LimitsProbe
from vkv.bench.load import serve
from vkv.bench.load.options import ServeOptions
from vkv.bench.models import cache, memory
from vkv.bench.models.options import CacheOptions, MemoryOptions
from vkv.bench.options import StartupOptions
from vkv.bench.record import INCOMPLETE, Findings, Record, Table
from vkv.bench.report import report
from vkv.vmem.errors import InvalidConfig

CPU = torch.device("cpu")


def _grow(folder: Path, ends_after: int | None, seen: list[Any]) -> Path:
    """A record of three steps; Ctrl-C comes after so many, if it does."""
    record = Record(folder, "things", device=CPU, config={}, command="vkv bench things")
    found: list[int] = []
    probe = LimitsProbe(CPU, torch.float32)

    def steps() -> Generator[None, None, None]:
        probe.measure()
        try:
            for index in range(3):
                if record.path.exists():
                    seen.append(json.loads(record.path.read_text()))
                if index == ends_after:
                    raise KeyboardInterrupt
                found.append(index)
                yield
        finally:
            seen.append("closed")

    def findings() -> Findings:
        rows = [[str(index)] for index in found]
        table = Table(title="Things", columns=["which"], rows=rows)
        return Findings(results={"found": list(found)}, tables=[table], draw=Path.touch)

    return record.grow(steps(), findings, probe)[0]


def test_a_record_is_there_after_each_step(tmp_path: Path) -> None:
    seen: list[Any] = []
    path = _grow(tmp_path, None, seen)
    assert [(one["results"]["found"], one["is_complete"]) for one in seen[:-1]] == [
        ([0], False),
        ([0, 1], False),
    ]
    record = json.loads(path.read_text())
    assert record["is_complete"]
    assert record["results"]["found"] == [0, 1, 2]
    assert len(record["limits"]["read_samples"]) == 2
    assert INCOMPLETE not in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").exists()
    assert not list(tmp_path.glob("*.part"))


def test_ctrl_c_keeps_what_there_is_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    path = _grow(tmp_path, 2, seen)
    record = json.loads(path.read_text())
    assert record["results"]["found"] == [0, 1]
    assert not record["is_complete"]
    assert INCOMPLETE in path.with_suffix(".md").read_text()
    assert INCOMPLETE in report(tmp_path).read_text()
    assert "interrupted" in capsys.readouterr().err
    assert seen[-1] == "closed"


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    seen: list[Any] = []
    for folder in (tmp_path / "file", tmp_path / "file" / "records" / "more"):
        with pytest.raises(InvalidConfig, match="nothing can be written to"):
            _grow(folder, None, seen)
    assert not seen
    assert _grow(tmp_path / "made" / "for it", None, seen).is_file()


def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _grow(tmp_path, 0, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bench", "step", "options", "kept"),
    [
        (
            serve,
            "_serve",
            ServeOptions(
                device=CPU, workloads=("sharegpt",), num_requests=2, clients=(1,), scale=0.02
            ),
            lambda results: len(results["runs"]),
        ),
        (
            memory,
            "_fill_caches",
            MemoryOptions(
                device=CPU, num_requests=2, output_lens=(2, 4), kinds=("static", "dynamic")
            ),
            lambda results: len(results["samples"]),
        ),
        (
            cache,
            "_ask",
            CacheOptions(shape="llama-tiny", problems=((1, 8), (1, 9)), kinds=("static",)),
            lambda results: len(results["cells"]),
        ),
    ],
    ids=["serve", "memory", "cache"],
)
def test_every_bench_keeps_the_steps_before_ctrl_c(
    bench: Any,
    step: str,
    options: Any,
    kept: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest, calls = getattr(bench, step), []

    def second_is_interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*arguments)

    if bench is cache:  # without its processes
        answer = {"token_s": [0.1], "peak_bytes": 1 << 20, "filled_bytes": 1}
        honest = lambda *_: answer  # noqa: E731
    monkeypatch.setattr(bench, step, second_is_interrupted)
    path, tables = bench.run(options, tmp_path, "vkv bench")
    record = json.loads(path.read_text())
    assert not record["is_complete"]
    assert kept(record["results"]) == 1
    assert tables[0].rows
    assert path.with_suffix(".png").stat().st_size > 1000


def test_startup_times_each_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {"nothing": ("-c", "pass"), "import vkv": ("-c", "import vkv")}
    monkeypatch.setattr(startup, "COMMANDS", commands)
    monkeypatch.setattr(startup, "RAY", ("-c", "pass"))
    options = StartupOptions(repeats=2, peers={"other": sys.executable})
    path, (table,) = startup.run(options, tmp_path, "vkv bench startup")
    record = json.loads(path.read_text())
    assert record["what"] == "startup"
    ray = [] if find_spec("ray") is None else ["Ray started and ended"]
    names = [*commands, *ray, *(f"{name}, other" for name in commands)]
    assert {n: len(s) for n, s in record["results"]["seconds"].items()} == dict.fromkeys(names, 2)
    assert [row[0] for row in table.rows] == names


def test_what_startup_times_of_ray_runs() -> None:
    pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")
    assert startup._start((sys.executable, *startup.RAY)) > 0
