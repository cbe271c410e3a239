"""`vkv bench linear`: that all contestants compute the same products, and what is counted."""

import json
from pathlib import Path

import pytest
import torch
from vkv.quant import Int4Linear
from vkv.runtime.bench import linear as bench
from vkv.runtime.bench.linear import LAYERS, LinearOptions, all_kernels, run
from vkv.runtime.bench.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("quick_limits")
OPTIONS = LinearOptions(layers=("small",), rows=(1, 5), repeats=2, max_bytes=1 << 16)


@pytest.fixture(autouse=True)
def small_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LAYERS", {"small": ((64, 128), (32, 256))})


def test_a_record_of_every_contestant(tmp_path: Path) -> None:
    path, (table,) = run(OPTIONS, tmp_path, "vkv bench linear")
    cells = json.loads(path.read_text())["results"]["cells"]
    assert [(cell["rows"], cell["copies"]) for cell in cells] == [(1, 2), (5, 2)]
    for cell in cells:
        assert list(cell["product_s"])[:2] == ["int4 auto", "dense"]
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
