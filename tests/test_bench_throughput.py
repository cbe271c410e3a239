"""`vkv bench throughput`: what is timed, the talk with workers, and those that fail."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vkv.runtime.bench import throughput
from vkv.runtime.bench.peer import WORKERS, Worker, WorkerFailed
from vkv.runtime.bench.throughput import CELLS, Cell, ThroughputOptions
from vkv.vmem.errors import InvalidConfig

FAKE = f"""
import sys
sys.path.insert(0, {str(WORKERS)!r})
from protocol import expect, serve

def load(options):
    print("chatter that must not reach the harness")
    if options.get("refuses"):
        raise ValueError("no such model")
    def generate(prompts, output_lens):
        print("more chatter")
        if len(prompts) == 3:
            sys.exit("gone")
        expect(sum(map(len, prompts)), sum(output_lens))
    return generate

serve(load)
"""


def make_fake(folder: Path, **options: object) -> Worker:
    script = folder / "fake.py"
    script.write_text(FAKE)
    return Worker([sys.executable, str(script)], {"threads": 1, **options}, folder / "log")


def test_a_worker_answers_fails_and_dies(tmp_path: Path) -> None:
    worker = make_fake(tmp_path)
    seconds, peak = worker.run([[1, 2], [3]], [1, 2])
    assert 0 < seconds < 5
    assert 1 << 20 < peak < 1 << 30
    with pytest.raises(WorkerFailed, match="2 tokens came out where 5 were asked for"):
        worker.run([[1, 2]], [5])
    worker.run([[1]], [1])  # an error is no end
    with pytest.raises(WorkerFailed, match="its process ended: gone"):
        worker.run([[1]] * 3, [1])
    with pytest.raises(WorkerFailed, match="its process ended"):
        worker.run([[1]], [1])
    worker.close()
    assert worker._process.returncode is not None


def test_a_worker_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="ValueError: no such model"):
        make_fake(tmp_path, refuses=True)


def test_the_ragged_cell_is_the_published_workload() -> None:
    ragged = CELLS["ragged"]
    assert len(ragged.prompt_lens) == len(ragged.output_lens) == 32
    assert (sum(ragged.prompt_lens), sum(ragged.output_lens)) == (8769, 3550)
    assert len(set(ragged.prompt_lens)) > 20


def test_tokens_are_counted_by_kind() -> None:
    cell = Cell(name="x", kind="prefill", prompt_lens=(5, 7), output_lens=(1, 1))
    assert cell.num_tokens == 12
    assert replace(cell, kind="decode", output_lens=(4, 9)).num_tokens == 11
    assert replace(cell, kind="total", output_lens=(4, 9)).num_tokens == 13
    assert replace(cell, output_lens=(4, 9)).held_tokens == 25


def test_every_system_on_a_tiny_model(tmp_path: Path) -> None:
    cells = (
        Cell(name="p", kind="prefill", prompt_lens=(20, 20), output_lens=(1, 1)),
        Cell(name="d", kind="decode", prompt_lens=(9, 9), output_lens=(30, 30)),
        Cell(name="r", kind="total", prompt_lens=(5, 19, 8), output_lens=(7, 2, 4)),
    )
    options = ThroughputOptions(
        shape="llama-tiny",
        dtype="float32",
        threads=1,
        systems=tuple(throughput.SYSTEMS),
        cells=cells,
        repeats=1,
        batch=2,
    )
    path, tables = throughput.run(options, tmp_path, "vkv bench throughput")
    results = json.loads(path.read_text())["results"]
    assert not any(results["failures"].values())
    for rates in results["tokens_per_s"].values():
        assert all(len(rates[cell.name]) == 1 for cell in cells)
        assert rates["p"][0] > 0
        assert rates["r"][0] > 0
    assert set(results["peak_rss_bytes"]) == set(options.systems)
    imports = results["model"]["import_bytes"]
    assert 50 << 20 < imports < min(results["peak_rss_bytes"].values())
    assert path.with_suffix(".png").stat().st_size > 1000
    assert tables[0].rows[0][0] == "vkv"
    assert [row[0] for row in tables[1].rows] == list(options.systems[1:])


def test_a_system_that_fails_leaves_the_others(tmp_path: Path) -> None:
    options = ThroughputOptions(
        shape="llama-tiny",
        dtype="float32",
        threads=1,
        systems=("vkv",),
        peers={"vllm": sys.executable},  # which has no vllm
        cells=(Cell(name="r", kind="total", prompt_lens=(5,), output_lens=(7,)),),
        repeats=1,
    )
    path, tables = throughput.run(options, tmp_path, "vkv bench throughput")
    results = json.loads(path.read_text())["results"]
    assert "No module named 'vllm'" in results["failures"]["vllm"]["r"]
    assert len(results["tokens_per_s"]["vkv"]["r"]) == 1
    assert tables[-1].title == "Failed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"systems": ("vkv", "mystery")}, "'mystery' is unknown"),
        ({"peers": {"other": sys.executable}}, "'other' is unknown"),
        ({"peers": {"vllm": "/nowhere/python"}}, "no interpreter at /nowhere/python"),
    ],
)
def test_refusals(options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=words):
        throughput.run(ThroughputOptions(device=torch.device("cpu"), **options), tmp_path, "x")
