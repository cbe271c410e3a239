"""`vkv bench chains`: that all ways serve the same requests, and that blocks are shared."""

import json
import multiprocessing
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
from vkv.bench.load import chain_workers
from vkv.bench.load.chains import ALONE, APART, TOGETHER, run
from vkv.bench.load.options import ChainsOptions


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All four are forked from one process that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([chain_workers.__name__])
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: context)
    yield
    forkserver._forkserver._stop()


@pytest.mark.usefixtures("quick_workers")
def test_all_ways_answer_all_requests(tmp_path: Path) -> None:
    options = ChainsOptions(
        shape="llama-tiny",
        dtype="float32",
        tenants=1,
        layers=1,
        requests=6,
        rate=50.0,
        prompt_len=12,
        output_len=6,
        repeats=1,
    )
    path, tables = run(options, tmp_path, "vkv bench chains")
    results = json.loads(path.read_text())["results"]
    cells = {cell["way"]: cell for cell in results["cells"]}
    assert cells.keys() == {TOGETHER, APART, ALONE}
    for cell in cells.values():
        assert len(cell["e2es_s"]) == 6
        assert cell["num_tokens"] == 6 * 18
        assert cell["pss_bytes"] > 0
    assert cells[TOGETHER]["block_bytes"] > 0
    assert cells[TOGETHER]["rows_per_call"] >= 1
    assert cells[APART]["block_bytes"] == cells[ALONE]["block_bytes"] == 0
    assert results["bytes"]["kept"] < results["bytes"]["models"]
    assert [row[0] for row in tables[0].rows] == [TOGETHER, APART, ALONE]
