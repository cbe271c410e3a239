"""The Triton kernel: its layout exactly, its numerics in Triton's interpreter and on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized import random_weight
from vkv.quant import Int4Linear, Int4Weight
from vkv.quant.kernels.table import kernel_names
from vkv.quant.kernels.triton_linear import (
    Tile,
    TritonKernel,
    TritonLayout,
    dequantize,
    interleave,
    launch,
    split_columns,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which is made for Linux"
)
_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
_SMALL = Tile(rows=16, outputs=128, num_warps=4, num_stages=3)
# What the interpreter's NumPy says of padding that no one reads.
_NUMPY = "ignore:invalid value encountered:RuntimeWarning"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, where conftest.py has Triton interpret its kernels; a GPU, if there is one."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here, and one process does not interpret too")
    return torch.device(request.param)


def weight_and_layout(
    device: torch.device, n: int, k: int, group: int, *, symmetric: bool
) -> tuple[Int4Weight, TritonLayout]:
    weight = random_weight(n, k, group, symmetric=symmetric).to(device)
    return weight, TritonKernel().prepare(weight)


def relative_error(found: torch.Tensor, inputs: torch.Tensor, weight: Int4Weight) -> float:
    expected = inputs.double() @ weight.dequantize(torch.float64).T
    return float((found.double() - expected).norm() / expected.norm())


@given(rows=st.integers(1, 4), units=st.integers(1, 3), seed=st.integers(0, 1000))
def test_nibble_i_of_word_j_is_column_32_i_plus_j(rows, units, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 256 * units), generator=generator, dtype=torch.uint8)
    words = interleave(codes)
    assert words.shape == (units, rows, 32)
    assert words.dtype == torch.int32
    back = [(words >> (4 * i)) & 15 for i in range(8)]  # each [units, rows, 32]
    assert torch.equal(torch.cat(back, dim=2).transpose(0, 1).flatten(1).to(torch.uint8), codes)


@pytest.mark.filterwarnings(_NUMPY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [
        (32, 256, 32),
        (40, 512, 64),
        (136, 256, 128),
        (32, 1024, 512),
        (32, 160, 160),  # one scale a row, and columns that do not fill a unit
        (24, 288, 32),
    ],
)
def test_products_are_right(device, n, k, group, symmetric, dtype):
    weight, layout = weight_and_layout(device, n, k, group, symmetric=symmetric)
    inputs = torch.randn(3, k, device=device).to(dtype)
    found = launch(layout, inputs, _SMALL)
    assert found.dtype == dtype
    assert relative_error(found, inputs, weight) < _TOLERANCE[dtype]


@pytest.mark.filterwarnings(_NUMPY)
@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("split", [1, 3, 4])
def test_products_are_right_however_the_columns_are_split(device, rows, split):
    weight, layout = weight_and_layout(device, 48, 1024, 128, symmetric=False)
    inputs = torch.randn(rows, 1024, device=device).half()
    first = launch(layout, inputs, _SMALL, split=split)
    assert relative_error(first, inputs, weight) < _TOLERANCE[torch.float16]
    assert not layout.arrivals.any(), "the counters must be left as they were found"
    assert torch.equal(launch(layout, inputs, _SMALL, split=split), first)


@pytest.mark.filterwarnings(_NUMPY)
def test_rows_of_a_larger_matrix_are_read_where_they_lie(device):
    weight, layout = weight_and_layout(device, 32, 256, 64, symmetric=True)
    inputs = torch.randn(5, 3 * 256, device=device).half()[:, 256:512]
    assert relative_error(launch(layout, inputs, _SMALL), inputs, weight) < 1e-3


@pytest.mark.filterwarnings(_NUMPY)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantising_is_right(device, symmetric):
    weight, layout = weight_and_layout(device, 40, 288, 32, symmetric=symmetric)
    dense = dequantize(layout, torch.float16)
    torch.testing.assert_close(dense, weight.dequantize(torch.float16), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings(_NUMPY)
@pytest.mark.parametrize("rows", [0, 2, 300])
def test_the_kernel_serves_any_batch(device, rows):
    weight, layout = weight_and_layout(device, 64, 256, 64, symmetric=True)
    inputs = torch.randn(rows, 256, device=device).half()
    found = TritonKernel().multiply(layout, inputs)
    assert found.shape == (rows, 64)
    if rows:
        assert relative_error(found, inputs, weight) < 1e-3


@pytest.mark.gpu
def test_a_linear_layer_runs_on_it():
    weight = random_weight(32, 256, 64, act_order=True).to("cuda")
    bias = torch.randn(32, device="cuda").half()
    inputs = torch.randn(2, 3, 256, device="cuda").half()
    found = Int4Linear(weight, bias, kernel_name="triton")(inputs)
    expected = inputs.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert (found.double() - expected).norm() < 1e-3 * expected.norm()


def test_what_it_accepts():
    kernel, device = TritonKernel(), torch.device("cuda")

    def accepts(k: int, group: int, dtype: torch.dtype) -> bool:
        return kernel.accepts(random_weight(8, k, group), device, dtype, 1)

    assert accepts(256, 128, torch.float16)
    assert accepts(160, 160, torch.bfloat16)
    assert not accepts(256, 128, torch.float32)
    assert not accepts(192, 96, torch.float16)
    assert not accepts(256, 16, torch.float16)
    assert not accepts(48, 48, torch.float16)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in str(TritonKernel.unavailable_reason())
    weight = random_weight(8, 64, 32)
    assert not TritonKernel().accepts(weight, torch.device("cpu"), torch.float16, 1)
    assert "triton" in kernel_names()


def test_columns_are_split_until_every_processor_has_work():
    layout = TritonKernel().prepare(random_weight(128, 2048, 128))
    tile = Tile(rows=16, outputs=64, num_warps=4, num_stages=3, crowd=1)
    assert split_columns(layout, 1, tile, processors=1) == 1
    assert split_columns(layout, 1, tile, processors=8) == 4
    assert split_columns(layout, 64, tile, processors=8) == 1
    assert split_columns(layout, 1, tile, processors=1000) == 8


def test_it_compiles_for_gpus_that_are_not_here():
    """Down to machine code, for Ampere and Hopper, every tile."""
    script = Path(__file__).parents[1] / "support" / "compile_triton.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    built = [json.loads(line) for line in run.stdout.splitlines()]
    assert {line["capability"] for line in built} == {80, 90}
    for line in built:
        room = 99 << 10 if line["first"] else 227 << 10  # the least of all cards; Hopper's
        assert line["shared_bytes"] <= room, line
