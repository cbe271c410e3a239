"""`vkv bench vmm`: that its figures are of the calls that were made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standin
from vkv.bench.kernels import vmm
from vkv.bench.kernels.vmm import OPERATIONS, VmmOptions, run
from vkv.vmem import HostDriver
from vkv.vmem.errors import InvalidConfig


def _record(options: VmmOptions, folder: Path) -> dict[str, Any]:
    path, tables = run(options, folder, "vkv bench vmm")
    assert path.with_suffix(".png").stat().st_size > 1000
    shown = path.with_suffix(".md").read_text()
    assert all(table.markdown() in shown for table in tables)
    return json.loads(path.read_text())


def _calls(record: dict[str, Any], num_pages: int) -> dict[str, dict[str, int]]:
    """Driver calls by operation and kind, in all repeats of the run of `num_pages`."""
    (timing,) = [t for t in record["results"]["timings"] if t["num_pages"] == num_pages]
    return {name: operation["calls"] for name, operation in timing["operations"].items()}


def _check_times(record: dict[str, Any], repeats: int) -> None:
    for timing in record["results"]["timings"]:
        for name in OPERATIONS:
            operation = timing["operations"][name]
            lives = repeats * (2 if name == "unmap" else 1)
            assert len(operation["wall_s"]) == lives
            assert 0 < sum(operation["call_s"].values()) <= sum(operation["wall_s"])
            assert operation["call_s"].keys() == operation["calls"].keys()


def test_on_the_host_a_run_is_one_call_unless_it_is_scattered(tmp_path: Path) -> None:
    options = VmmOptions(page_bytes=(16 << 10,), runs=(5, 1), repeats=3)
    record = _record(options, tmp_path)
    _check_times(record, 3)
    calls = _calls(record, 5)
    assert calls["map new"] == calls["map again"] == {"map": 3}
    assert calls["map scattered"] == {"map": 15}
    assert calls["unmap"] == {"unmap": 6}
    assert calls["release"] == {"release": 3}
    assert "its access" not in record["tables"][0]["columns"]
    assert [t["num_pages"] for t in record["results"]["timings"]] == [1, 5]


def test_on_cuda_every_page_is_mapped_and_every_run_made_accessible(
    standin_driver_factory: Callable[..., standin.StandInCudaDriver],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(vmm, "open_driver", lambda _, page: standin_driver_factory(page_bytes=page))
    sizes = tuple(multiple * standin.GRANULARITY for multiple in (1, 2))
    record = _record(VmmOptions(page_bytes=sizes, runs=(4,), repeats=2), tmp_path)
    _check_times(record, 2)
    assert [t["page_bytes"] for t in record["results"]["timings"]] == list(sizes)
    for timing in record["results"]["timings"]:
        calls = {name: op["calls"] for name, op in timing["operations"].items()}
        assert calls["create"] == {"create": 8}
        # New pages are cleared, one call each and one to wait for them.
        assert calls["map new"] == {"map": 8, "set_access": 2, "zero": 10}
        assert calls["map again"] == calls["map scattered"] == {"map": 8, "set_access": 2}
        assert calls["unmap"] == {"unmap": 16}
        assert calls["release"] == {"release": 8}
    for table in record["tables"][:2]:
        assert table["columns"][-1] == "its access"
        assert float(table["rows"][0][-1]) > 0


def test_runs_beyond_the_memory_allowed_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    most = 0

    class Watched(HostDriver):
        def _create(self, num_pages: int) -> list[Any]:
            nonlocal most
            most = max(most, (self.num_pages + num_pages) * self.page_bytes)
            return super()._create(num_pages)

    monkeypatch.setattr(vmm, "open_driver", lambda _, page: Watched(page))
    options = VmmOptions(page_bytes=(8 << 10, 16 << 10), runs=(1, 8, 64), repeats=1)
    record = _record(VmmOptions(**{**vars(options), "max_bytes": 128 << 10}), tmp_path)
    runs = [(t["page_bytes"] >> 10, t["num_pages"]) for t in record["results"]["timings"]]
    assert runs == [(8, 1), (8, 8), (16, 1), (16, 8)]
    assert most == 128 << 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runs": (0,)}, "at least 1"),
        ({"runs": ()}, "at least 1"),
        ({"repeats": 0}, "at least 1"),
        ({"max_bytes": 1 << 20}, "2097152 bytes fits into 1048576"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=words):
        run(VmmOptions(**{"page_bytes": (2 << 20,), **options}), tmp_path, "")


def test_the_hosts_page_sizes_go_up_to_a_huge_page() -> None:
    sizes = vmm._default_page_bytes(VmmOptions().device)
    assert (min(sizes), max(sizes)) == (64 << 10, 2 << 20)
