"""Rounding to nearest and GPTQ, on plain matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized import correlated_inputs, matrix
from vkv.quant import QuantError
from vkv.quant.quantise.gptq import Hessian, gptq
from vkv.quant.quantise.rounding import Rounding, round_to_nearest


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    columns=st.sampled_from([2, 8, 32]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_without_clipping_no_element_is_more_than_half_a_step_away(
    rows, groups, columns, symmetric, dtype, seed
):
    weight = matrix(rows, groups * columns, seed=seed)
    rounding = Rounding(group_size=columns, symmetric=symmetric, clip=False, scale_dtype=dtype)
    quantised = round_to_nearest(weight, rounding)
    steps = quantised.scales.float().repeat_interleave(columns, dim=1)
    # A scale that was stored a little too small leaves the ends of the range a little short, and
    # a zero point is a whole number of steps, so that an end may fall half a step outside.
    slack = 15 * torch.finfo(dtype).eps + (0 if symmetric else 0.5)
    assert ((quantised.dequantize() - weight).abs() <= steps * (0.5 + slack)).all()


@given(symmetric=st.booleans(), seed=st.integers(0, 1000))
def test_values_of_a_grid_come_back_exactly(symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (4, 32), generator=generator)
    codes[:, ::8], codes[:, 1::8] = 0, 15  # both ends of every group are there
    weight = (codes - 8) * 0.25
    rounding = Rounding(group_size=8, symmetric=symmetric)
    assert torch.equal(round_to_nearest(weight, rounding).dequantize(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_never_hurts_and_helps_where_there_are_outliers(symmetric):
    weight = matrix(16, 128)
    weight[:, ::64] *= 6

    def errors(clip: bool) -> torch.Tensor:
        rounding = Rounding(group_size=64, symmetric=symmetric, clip=clip)
        difference = round_to_nearest(weight, rounding).dequantize() - weight
        return difference.unflatten(1, (-1, 64)).square().sum(-1)

    assert (errors(True) <= errors(False)).all()
    assert errors(True).sum() < 0.95 * errors(False).sum()


def test_clipping_spares_the_columns_that_matter():
    weight = matrix(16, 64)
    weight[:, 0] *= 5
    importance = torch.ones(64)
    importance[0] = 1e6
    rounding = Rounding(group_size=64)
    error = (round_to_nearest(weight, rounding, importance).dequantize() - weight)[:, 0]
    blind = (round_to_nearest(weight, rounding).dequantize() - weight)[:, 0]
    assert error.norm() < 0.5 * blind.norm()


@pytest.mark.parametrize("value", [0.0, 1e-30, -3.0, 70000.0])
def test_groups_of_one_value_stay_finite(value):
    weight = torch.full((2, 16), value)
    for symmetric in (True, False):
        rounding = Rounding(group_size=8, symmetric=symmetric)
        result = round_to_nearest(weight, rounding).dequantize()
        assert torch.isfinite(result).all()
        assert (result - weight).abs().max() <= max(0.05 * abs(value), 1e-4)


def test_a_group_size_of_minus_one_is_the_whole_row():
    assert round_to_nearest(matrix(4, 48), Rounding(group_size=-1)).scales.shape == (4, 1)


def test_a_hessian_is_the_mean_of_outer_products_however_it_is_fed():
    inputs = matrix(30, 8)
    whole, pieces = Hessian(8), Hessian(8)
    whole.add(inputs)
    for piece in inputs.split([1, 20, 9]):
        pieces.add(piece[None])
    torch.testing.assert_close(whole.matrix, inputs.T @ inputs / 30)
    torch.testing.assert_close(pieces.matrix, whole.matrix)
    assert pieces.num_tokens == 30


def test_the_output_error_is_that_of_the_outputs():
    inputs, weight, other = matrix(50, 8), matrix(6, 8, seed=1), matrix(6, 8, seed=2)
    hessian = Hessian(8)
    hessian.add(inputs)
    expected = (inputs @ (weight - other).T).norm() / (inputs @ weight.T).norm()
    assert hessian.output_error(weight, other) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("group_size", [8, 32, 96, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_moves_outputs_far_less_than_rounding_does(group_size, symmetric):
    weight, inputs = matrix(24, 192), correlated_inputs(600, 192)
    hessian = Hessian(192)
    hessian.add(inputs)
    rounding = Rounding(group_size=group_size, symmetric=symmetric, clip=False)
    plain = hessian.output_error(weight, round_to_nearest(weight, rounding).dequantize())
    better = hessian.output_error(weight, gptq(weight, hessian, rounding).dequantize())
    assert better < 0.6 * plain


def test_gptq_of_independent_inputs_is_rounding():
    weight = matrix(8, 32)
    hessian = Hessian(32)
    hessian.add(torch.eye(32))
    rounding = Rounding(group_size=8)
    found, plain = gptq(weight, hessian, rounding), round_to_nearest(weight, rounding)
    assert torch.equal(found.packed, plain.packed)
    assert torch.equal(found.scales, plain.scales)


def test_gptq_takes_features_that_never_occur_and_fewer_tokens_than_features():
    weight, inputs = matrix(8, 64), matrix(5, 64)
    inputs[:, 7] = 0
    hessian = Hessian(64)
    hessian.add(inputs)
    quantised = gptq(weight, hessian, Rounding(group_size=16)).dequantize()
    assert torch.isfinite(quantised).all()
    assert (quantised[:, 7] == 0).all()
    assert hessian.output_error(weight, quantised) < 0.1


def test_gptq_refuses_inputs_that_are_not_finite():
    hessian = Hessian(8)
    hessian.add(torch.full((2, 8), torch.inf))
    with pytest.raises(QuantError, match="not all finite"):
        gptq(matrix(4, 8), hessian, Rounding(group_size=8))
