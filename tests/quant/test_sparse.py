"""2:4 sparsity with 4-bit codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized import correlated_inputs, matrix
from vkv.quant import Int4Weight, QuantError
from vkv.quant.quantise.gptq import Hessian, gptq
from vkv.quant.quantise.rounding import Rounding, round_to_nearest
from vkv.quant.sparse import pack_sparse, prune_magnitude, quantize_sparse, semi_structured


@given(
    rows=st.integers(1, 6),
    octets=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_packing_and_unpacking_are_exact(rows, octets, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 2 * octets, 4), generator=generator)
    gone = torch.rand(codes.shape, generator=generator).argsort(-1)[..., :2]
    codes = codes.scatter(2, gone, 8).flatten(1)  # 8, zero, may also stand among those kept
    weight = Int4Weight.from_codes(codes, torch.rand(rows, 1, generator=generator), None)
    packed = pack_sparse(weight)
    assert torch.equal(packed.unpack().packed, weight.packed)
    assert packed.in_features == weight.in_features
    assert packed.num_bytes - packed.scales.nbytes == rows * 8 * octets * 3 // 8


def test_magnitude_pruning_keeps_the_two_largest_of_four():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.0, 0.0, -0.5, 0.1]])
    assert prune_magnitude(weight).tolist() == [[0, -4, 0, 3, 0, 0, -0.5, pytest.approx(0.1)]]


@pytest.mark.parametrize("with_hessian", [True, False])
def test_quantising_leaves_two_of_four_and_the_reference_multiplies_by_them(with_hessian):
    weight, inputs = matrix(16, 64), correlated_inputs(300, 64)
    hessian = Hessian(64)
    hessian.add(inputs)
    sparse = quantize_sparse(weight, Rounding(group_size=32), hessian if with_hessian else None)
    dense = sparse.unpack().dequantize(torch.float64)
    assert ((dense.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    expected = inputs.double() @ dense.T
    torch.testing.assert_close(sparse.multiply(inputs).double(), expected, rtol=1e-4, atol=1e-4)


def test_pruning_by_the_hessian_moves_outputs_less():
    weight, hessian = matrix(16, 64), Hessian(64)
    hessian.add(correlated_inputs(300, 64))
    rounding = Rounding(group_size=32)
    errors = [
        hessian.output_error(weight, quantize_sparse(weight, rounding, h).unpack().dequantize())
        for h in (hessian, None)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_what_cannot_be_packed_is_refused():
    weight = round_to_nearest(matrix(4, 16), Rounding(group_size=8))
    with pytest.raises(QuantError, match="more than two values in columns"):
        pack_sparse(weight)
    with pytest.raises(QuantError, match="symmetric"):
        pack_sparse(round_to_nearest(matrix(4, 16), Rounding(group_size=8, symmetric=False)))
    with pytest.raises(QuantError, match="multiple of 8 columns, not 12"):
        quantize_sparse(matrix(4, 12), Rounding(group_size=4))
    with pytest.raises(QuantError, match="multiple of 4 columns, not 6"):
        prune_magnitude(matrix(4, 6))
    hessian = Hessian(16)
    hessian.add(matrix(20, 16))
    with pytest.raises(QuantError, match="symmetric rounding"):
        gptq(matrix(4, 16), hessian, Rounding(group_size=8, symmetric=False), sparse=True)


def test_semi_structured_products_ask_for_a_gpu():
    sparse = quantize_sparse(matrix(64, 64), Rounding(group_size=32))
    with pytest.raises(QuantError, match="need an NVIDIA GPU"):
        semi_structured(sparse, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_products_are_right(dtype):
    sparse = quantize_sparse(matrix(128, 256).cuda(), Rounding(group_size=64))
    inputs = matrix(64, 256).cuda().to(dtype)
    found = torch.nn.functional.linear(inputs, semi_structured(sparse, dtype)).double()
    expected = inputs.double() @ sparse.unpack().dequantize(torch.float64).T
    assert (found - expected).norm() < 1e-2 * expected.norm()
