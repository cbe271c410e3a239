"""8-bit weights as two of four bits: the same numbers, and layers that join as others do."""

import pytest
import torch
from vkv.quant import Int4Linear, QuantError, can_concatenate, concatenate, int8_weight, split

CPU = torch.device("cpu")


def drawn(rows: int, columns: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """All codes there are, at random, with scales as files have them and zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator).half() / 16 + 0.01
    zeros = torch.randint(0, 256, (rows, groups), generator=generator, dtype=torch.uint8)
    return codes, scales, zeros


def dense(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    size = codes.shape[1] // scales.shape[1]
    shifted = codes.double().unflatten(1, (-1, size)) - zeros.double().unsqueeze(-1)
    return (shifted * scales.double().unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("groups", [1, 4])
def test_every_code_is_its_number(groups: int) -> None:
    codes, scales, zeros = drawn(48, 64, groups)
    weight = int8_weight(codes, scales, zeros)
    assert (weight.out_features, weight.in_features, weight.bits) == (48, 64, 8)
    assert torch.equal(weight.codes(), codes)
    assert torch.equal(weight.dequantize(torch.float64), dense(codes, scales, zeros))


def test_scales_whose_sixteenfold_half_precision_lacks() -> None:
    codes, _, zeros = drawn(8, 16, 1)
    scales = torch.full((8, 1), 60000.0).half()
    found = int8_weight(codes, scales, zeros).dequantize(torch.float64)
    assert torch.equal(found, dense(codes, scales, zeros))


def test_signed_values_are_the_weight() -> None:
    values = torch.arange(-128, 128, dtype=torch.int8).view(4, 64)
    weight = int8_weight(values, torch.ones(4, 2))
    assert torch.equal(weight.dequantize(), values.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_products(dtype: torch.dtype, rows: int) -> None:
    codes, scales, zeros = drawn(48, 64, 2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    exact = torch.empty(48, 64, dtype=torch.float64)
    exact[:, order] = dense(codes, scales, zeros)
    bias = torch.randn(48, generator=torch.Generator().manual_seed(2)).to(dtype)
    linear = Int4Linear(int8_weight(codes, scales, zeros, permutation=order), bias)
    inputs = torch.randn(rows, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = inputs.double() @ exact.T + bias.double()
    for _ in range(2):
        error = (linear(inputs).double() - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 0.01)
        linear.settle(dtype)


def test_joined_and_taken_apart() -> None:
    weights = [int8_weight(*drawn(rows, 64, 2, seed=rows)) for rows in (8, 24)]
    joined = concatenate(weights)
    assert (joined.in_features, joined.bits) == (64, 8)
    for one, other in zip(weights, split(joined, (8, 24)), strict=True):
        assert torch.equal(one.dequantize(), other.dequantize())


def test_four_bits_and_eight_do_not_join() -> None:
    eight = int8_weight(*drawn(8, 64, 2))
    assert not can_concatenate(eight, eight.halves())


def test_a_byte_an_element() -> None:
    linear = Int4Linear(int8_weight(*drawn(64, 512, 1)))
    linear.settle(torch.bfloat16)
    if linear.kernel_for(CPU, torch.bfloat16, 1).name == "native":
        assert linear.num_bytes < 1.05 * 64 * 512


def test_other_types_are_refused() -> None:
    with pytest.raises(QuantError, match="uint8 or int8"):
        int8_weight(torch.zeros(4, 8), torch.ones(4, 1))
