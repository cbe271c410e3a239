"""`vkv bench stall`: that every step is in the record, and what it waited is of its mapping."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from allocator_model import one_thread  # noqa: F401 - of every test
from typer.testing import CliRunner
from vkv.allocator import KVCache, Slot
from vkv.bench.kernels import stall
from vkv.bench.kernels.options import StallOptions
from vkv.bench.kernels.stall import run
from vkv.bench.kernels.stall_results import Run, _step_row, _wait_row
from vkv.runtime.cli import main as cli
from vkv.runtime.engine.devices import CpuProfile
from vkv.vmem import HostDriver, Page
from vkv.vmem.errors import InvalidConfig

STEPS, PAGE_BYTES = 24, 4096
OPTIONS = StallOptions(
    heads="4:2x32",  # 16 tokens a page
    batch=2,
    context=40,
    layers=3,
    steps=STEPS,
    look_ahead_tokens=4,
    page_bytes=PAGE_BYTES,
    repeats=2,
)


class Watched(HostDriver):
    """Takes its time to map, counts it, and notes what is left when it is closed."""

    delay_s = 0.001
    num_mapped = 0
    left: int | None = None

    def _map(self, address: int, pages: Sequence[Page]) -> None:
        super()._map(address, pages)
        time.sleep(self.delay_s)
        Watched.num_mapped += len(pages)

    def close(self) -> None:
        if Watched.left is None:
            Watched.left = self.num_pages
        super().close()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    monkeypatch.setattr(Watched, "num_mapped", 0)
    monkeypatch.setattr(Watched, "left", None)
    monkeypatch.setattr(stall, "open_driver", lambda _, page: Watched(page))
    return Watched


def _record(options: StallOptions, folder: Path) -> dict[str, Any]:
    path, tables = run(options, folder, "vkv bench stall")
    assert path.with_suffix(".png").stat().st_size > 1000
    shown = path.with_suffix(".md").read_text()
    assert all(table.markdown() in shown for table in tables)
    return json.loads(path.read_text())


def test_every_step_of_both_modes_is_recorded(watched: type[Watched], tmp_path: Path) -> None:
    record = _record(OPTIONS, tmp_path)
    results = record["results"]
    assert results["growth_tokens"] == 16
    assert results["pages_per_crossing"] == 3
    # Staggered by 8: from 40 tokens on, the 49th is the first of a page, from 32 the 33rd.
    assert results["starts"] == [40, 32]
    crossings = [int(step % 16 in (0, 8)) for step in range(STEPS)]
    assert results["crossings"] == crossings
    for mode in ("on", "off"):
        assert len(results["runs"][mode]) == 2
        for done in results["runs"][mode]:
            assert len(done["step_s"]) == len(done["wait_s"]) == STEPS
            assert len(done["backed"]) == len(done["asked"]) == STEPS
            assert all(0 < w < s for w, s in zip(done["wait_s"], done["step_s"], strict=True))
            # What the cache counted lies within what was timed around it.
            assert 0 < done["mapping_time_s"] <= sum(done["wait_s"])
    steps, waits = (table["rows"] for table in record["tables"])
    assert [row[:2] for row in steps] == [["on", str(2 * STEPS)], ["off", str(2 * STEPS)]]
    assert [row[:2] for row in waits] == [[mode, str(2 * sum(crossings))] for mode in ("on", "off")]
    assert watched.left == 0


def test_where_mapping_happens_follows_the_mode(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mapped: list[int] = []  # in each growth by a token
    grow, attend = KVCache.grow, stall._Bench._attend

    def watched_grow(self: KVCache, slot: Slot, num_tokens: int) -> None:
        before, is_filled = watched.num_mapped, slot.num_tokens > 0
        grow(self, slot, num_tokens)
        if is_filled:
            mapped.append(watched.num_mapped - before)

    def long_attend(self: Any) -> None:
        attend(self)
        self.cache._look_ahead.drain()  # it takes as long as the background does

    monkeypatch.setattr(KVCache, "grow", watched_grow)
    monkeypatch.setattr(stall._Bench, "_attend", long_attend)
    record = _record(OPTIONS, tmp_path)
    runs, crossings = record["results"]["runs"], record["results"]["crossings"]
    by_step = [sum(mapped[i : i + OPTIONS.batch]) for i in range(0, len(mapped), OPTIONS.batch)]
    on, off = [0] * STEPS, [3 * slots for slots in crossings]
    assert by_step == [*on, *off] * 2
    for done in runs["on"]:
        assert done["background_time_s"] > 0
        assert not any(done["backed"])
        # Of each crossing but the first, which was asked for before the run began.
        assert sum(done["asked"]) == sum(crossings) - 1
    for done in runs["off"]:
        assert done["background_time_s"] == 0
        assert not any(done["asked"])
        assert done["backed"] == crossings
        crossed = [w for w, slots in zip(done["wait_s"], crossings, strict=True) if slots]
        assert min(crossed) >= 3 * watched.delay_s
        assert done["mapping_time_s"] >= len(crossed) * 3 * watched.delay_s


def test_runs_start_alike(watched: type[Watched], tmp_path: Path) -> None:
    """The same pages are mapped in each run without look-ahead: nothing is left of the last."""
    options = StallOptions(**{**vars(OPTIONS), "look_ahead_tokens": STEPS, "repeats": 1})
    run(options, tmp_path, "")
    once = watched.num_mapped
    run(StallOptions(**{**vars(options), "repeats": 3}), tmp_path, "")
    first = 3 * sum(-(-start // 16) for start in (40, 32))
    assert watched.num_mapped - once - first == 3 * (once - first)


def test_a_wait_counts_against_the_median_of_its_own_run() -> None:
    at_end: dict[str, Any] = {"backed": [0] * 8 + [1], "asked": [0] * 9}
    slow = Run(step_s=[2.0] * 9, wait_s=[0.05] * 8 + [0.2], **at_end)
    fast = Run(step_s=[1.0] * 8 + [50.0], wait_s=[0.5] + [0.01] * 8, **at_end)
    crossings = [0] * 8 + [1]
    steps = _step_row("off", [slow, fast])
    assert steps[:2] == ["off", "18"]
    assert steps[4:] == ["50000.00", "25.50"]  # 1 time the others in one run, 50 in the other
    waits = _wait_row("off", [slow, fast], crossings)
    # Half a step went by where nothing was mapped: not a wait for memory.
    assert waits == ["off", "2", "2", "1", "10.00", "50.00", "0.000"]


def test_what_is_asked_for_may_be_waited_for_in_the_next_step() -> None:
    done = Run(step_s=[1.0] * 5, wait_s=[0.1, 0.2, 0.3, 0.4, 0.5], backed=[0, 0, 0, 0, 1])
    done.asked = [0, 1, 0, 0, 0]
    assert done.had_mapping == [True, False, True, False, True]
    assert done.waits(mapping=True) == [0.1, 0.3, 0.5]
    done.asked = [0] * 5
    assert done.waits(mapping=False) == [0.1, 0.2, 0.3, 0.4]


def test_over_the_stand_in_for_cuda(
    standin_driver_factory: Callable[..., standin.StandInCudaDriver],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(stall, "open_driver", lambda *_: standin_driver_factory())
    monkeypatch.setattr(CpuProfile, "layers_per_range", None)
    tokens = standin.GRANULARITY // (3 * PAGE_BYTES // 16)
    options = StallOptions(**{**vars(OPTIONS), "steps": 2 * tokens, "repeats": 1})
    record = _record(options, tmp_path)
    assert record["results"]["pages_per_crossing"] == 1
    assert sum(record["results"]["crossings"]) >= 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 2}, "raise --steps"),
        ({"repeats": 0}, "at least 1"),
        ({"look_ahead_tokens": 0}, "at least 1"),
        ({"layers": 1 << 40}, "lower --batch"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=words):
        run(StallOptions(**{**vars(OPTIONS), "batch": 1, "context": 33, **options}), tmp_path, "")


def test_from_the_command_line(tmp_path: Path) -> None:
    words = "bench stall --device cpu --heads 4:2x32 --layers 2 --batch 2 --context 40 --steps 20"
    more = f"--page 4KiB --repeats 1 --dtype float32 --label small --out {tmp_path}"
    shown = CliRunner().invoke(cli.app, [*words.split(), *more.split()])
    assert shown.exit_code == 0, shown.output
    (path,) = tmp_path.glob("stall-small_*.json")
    config = json.loads(path.read_text())["config"]
    assert config["dtype"] == str(torch.float32)
    assert (config["layers"], config["shape"]["context"]) == (2, 40)
