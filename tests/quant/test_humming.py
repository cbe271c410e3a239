"""The adapter to humming-kernels: what it hands over; the package itself runs on a GPU only."""

import pytest
import torch
from quantized import random_weight
from vkv.quant import Int4Linear
from vkv.quant.kernels.humming import HummingKernel, HummingLayout, layer_options, layer_tensors


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_hold_codes_in_column_order_and_zeros_in_row_order(symmetric):
    weight = random_weight(16, 64, 32, symmetric=symmetric)
    tensors = layer_tensors(weight, torch.bfloat16)
    codes, words = weight.codes(), tensors["weight"]
    assert words.shape == (16, 8)
    for column in range(64):
        nibble = (words[:, column // 8] >> (4 * (column % 8))) & 15
        assert torch.equal(nibble.to(torch.uint8), codes[:, column])
    assert torch.equal(tensors["weight_scale"], weight.scales.bfloat16())
    assert ("zero_point" in tensors) == (not symmetric)
    if weight.zeros is not None:
        zeros = tensors["zero_point"]
        assert zeros.shape == (2, 2)
        for row in range(16):
            nibble = (zeros[row // 8] >> (4 * (row % 8))) & 15
            assert torch.equal(nibble.to(torch.uint8), weight.zeros[row])


def test_options_say_what_the_tensors_are():
    grouped = layer_options(random_weight(16, 64, 32, symmetric=False), torch.float16)
    assert grouped["shape_n"] == 16
    assert grouped["shape_k"] == 64
    assert grouped["weight_config"] == {"dtype": "uint4", "group_size": 32, "has_zero_point": True}
    whole = layer_options(random_weight(16, 64, 64), torch.float16)
    assert whole["weight_config"] == {"dtype": "uint4", "group_size": 0, "has_zero_point": False}


def test_a_layout_counts_the_bytes_it_holds():
    weight = random_weight(64, 64, 32)
    assert HummingKernel().num_bytes(HummingLayout(weight)) == weight.num_bytes


def test_where_it_cannot_run_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr("vkv.quant.kernels.humming.find_spec", lambda _: None)
    assert "vkv[marlin]" in str(HummingKernel.unavailable_reason())
    cpu = torch.device("cpu")
    assert not HummingKernel().accepts(random_weight(64, 64, 32), cpu, torch.float16, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [64, 256])
def test_products_are_right(group: int, symmetric: bool, dtype: torch.dtype) -> None:
    if why := HummingKernel.unavailable_reason():
        pytest.skip(why)
    weight = random_weight(128, 256, group, symmetric=symmetric, act_order=True).to("cuda")
    linear = Int4Linear(weight, kernel_name="humming")
    dense = weight.dequantize(torch.float64)
    for rows in (1, 3, 16, 300):
        inputs = torch.randn(rows, 256, device="cuda").to(dtype)
        expected = inputs.double() @ dense.T
        error = (linear(inputs).double() - expected).norm() / expected.norm()
        assert error < (1e-3 if dtype == torch.float16 else 1e-2)
