"""`vkv bench linear`: that all contestants compute the same products, and what is counted."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vkv.bench.kernels import linear as bench
from vkv.bench.kernels.linear import LAYERS, LinearOptions, all_kernels, run
from vkv.bench.models.shapes import SHAPES
from vkv.quant import Int4Linear, Int4Weight

OPTIONS = LinearOptions(layers=("small",), rows=(1, 5), repeats=2, max_bytes=1 << 16)


@pytest.fixture(autouse=True)
def small_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LAYERS", {"small": ((64, 128), (32, 256))})


def test_a_record_of_every_contestant(tmp_path: Path) -> None:
    path, (table,) = run(OPTIONS, tmp_path, "vkv bench linear")
    cells = json.loads(path.read_text())["results"]["cells"]
    assert [(cell["rows"], cell["copies"]) for cell in cells] == [(1, 2), (5, 2)]
    for cell in cells:
        first, *_, last = cell["product_s"]
        assert (first, last) == ("int4 auto", "dense")
        for passes in cell["product_s"].values():
            assert [len(products) for products in passes] == [2, 2]
            assert min(map(min, passes)) > 0
    assert [row[0] for row in table.rows] == ["1", "5"]
    assert len(table.columns) == len(table.rows[0]) == 3 + len(cells[0]["product_s"])
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_contestant_that_computes_something_else_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Int4Linear.forward
    monkeypatch.setattr(Int4Linear, "forward", lambda self, x: honest(self, x) * 1.5)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        run(OPTIONS, tmp_path, "x")


def test_every_kernel_that_takes_all_batches() -> None:
    names = all_kernels(torch.device("cpu"), torch.bfloat16)
    assert (names[0], names[-1]) == ("auto", "dequantize")
    assert "int4pack" not in names  # for few rows only


def test_bytes_are_those_of_codes_scales_inputs_and_outputs(tmp_path: Path) -> None:
    path, (table,) = run(OPTIONS, tmp_path, "x")
    record = json.loads(path.read_text())
    codes, scales = (64 * 128 + 32 * 256) // 2, 2 * (64 * 1 + 32 * 2)
    for cell in record["results"]["cells"]:
        values = cell["rows"] * (128 + 64 + 256 + 32)
        assert cell["moved_bytes"] == codes + scales + 2 * values
    cell = record["results"]["cells"][0]
    seconds = statistics.median(map(sum, cell["product_s"]["int4 auto"]))
    share = cell["moved_bytes"] / seconds / record["limits"]["read_bytes_per_s"]
    assert table.rows[0][2] == f"{share:.0%}"


def test_dense_products_alone(tmp_path: Path) -> None:
    path, (table,) = run(replace(OPTIONS, kernels=("none",)), tmp_path, "x")
    cell = json.loads(path.read_text())["results"]["cells"][0]
    assert not any(name.startswith("int4") for name in cell["product_s"])
    assert table.columns[1] == f"{next(iter(cell['product_s']))}, µs"
    assert cell["moved_bytes"] == 2 * (64 * 128 + 32 * 256 + 128 + 64 + 256 + 32)


def test_zeros_are_counted_where_a_weight_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Int4Weight.from_codes(
        torch.zeros(64, 128, dtype=torch.uint8),
        torch.ones(64, 1, dtype=torch.float16),
        torch.full((64, 1), 8, dtype=torch.uint8),
    )
    monkeypatch.setattr(bench, "LAYERS", {"small": ((64, 128),)})
    monkeypatch.setattr(bench, "_random_weight", lambda *_: weight)
    assert bench._copies("small", OPTIONS).weight_bytes == 64 * 128 // 2 + 64 * 2 + 64


def test_each_product_is_timed_by_the_device_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by one that counts what it is given: on a GPU, what a graph is captured of."""
    passes = []

    def clock(once):
        passes.append(once)
        return lambda: float(len(passes))

    monkeypatch.setattr(bench, "_host_clock", clock)
    copies = bench._copies("small", OPTIONS)
    cell = bench._measure("small", copies, 1, OPTIONS)
    assert len(passes) == 2 * len(copies.products)  # both products of the layer
    for seconds in cell["product_s"].values():  # of the one copy's share
        assert seconds == [[len(passes) / 2] * 2] * OPTIONS.repeats
    products, inputs = passes[1].args
    assert products == [layer[1] for layer in copies.products["int4 auto"]]
    assert inputs.shape == (1, 256)


def test_a_label_is_part_of_the_record_s_name(tmp_path: Path) -> None:
    path, _ = run(replace(OPTIONS, label="avx2"), tmp_path, "x")
    assert path.name.startswith("linear-avx2_")


@pytest.mark.parametrize("name", ["llama-455m", "llama3-8b"])
def test_layers_are_those_of_the_models(name: str) -> None:
    shape = SHAPES[name]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim", hidden // shape["num_attention_heads"])
    queries = shape["num_attention_heads"] * head
    joined = queries + 2 * shape["num_key_value_heads"] * head
    assert LAYERS[name] == (
        (joined, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner),
    )  # fmt: skip
