"""Kernels against the float64 product of the dequantised weights, and the layer around them."""

from dataclasses import replace

import pytest
import torch
from parallel_calls import CountedParallel
from quantized import random_weight
from vkv.quant import Int4Linear, QuantError, quantize_output
from vkv.quant.kernels.activations import round_to_8_bits
from vkv.quant.kernels.native import NativeKernel, instruction_sets, int8_instruction_sets
from vkv.quant.kernels.table import choose_kernel, kernel_class, kernel_names

CPU = torch.device("cpu")
SHAPES = [  # N, K, group size
    (64, 128, 128),
    (100, 256, 32),
    (40, 1024, 1024),
    (96, 192, 64),
    (33, 120, 40),
    (1, 8, 8),
]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["native", "int4pack", "dequantize"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_on_a_cpu(name: str, symmetric: bool, shape: tuple[int, int, int]) -> None:
    if why := kernel_class(name).unavailable_reason():
        pytest.skip(why)
    weight = random_weight(*shape, symmetric=symmetric, act_order=True)
    linear = Int4Linear(weight, kernel_name=name)
    dense = weight.dequantize(torch.float64)
    for num_rows in (0, 1, 2, 3, 4, 5, 8, 11, 12, 13, 25, 64):
        if not linear.accepts(CPU, torch.bfloat16, num_rows):
            continue
        inputs = torch.randn(num_rows, shape[1], generator=torch.Generator().manual_seed(3))
        inputs = inputs.to(torch.bfloat16)
        found = linear(inputs)
        assert found.dtype == torch.bfloat16
        assert found.shape == (num_rows, shape[0])
        if num_rows:
            assert relative_error(found, inputs.double() @ dense.T) < 1e-2


@pytest.fixture(params=["avx2", "avx512_bf16", "int8_avx2", "int8_avx512_vnni"])
def instruction_set(request: pytest.FixtureRequest) -> str:
    """Of the native kernel, where this processor has it."""
    if why := NativeKernel.unavailable_reason():
        pytest.skip(why)
    if request.param not in (*instruction_sets(), *int8_instruction_sets()):
        pytest.skip("this processor lacks the instructions")
    return request.param


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(256, 512, 64), (100, 256, 32), (33, 1200, 400), (1, 8, 8)])
def test_the_native_kernel_rounds_no_weight(
    instruction_set: str, scales: torch.dtype, symmetric: bool, shape: tuple[int, int, int]
) -> None:
    """What it is off by is the rounding of results, and of inputs: with AVX2 to 16 bits, and where
    they are to be to 8."""
    weight = random_weight(*shape, symmetric=symmetric)
    weight = replace(weight, scales=weight.scales.to(scales))
    kernel = NativeKernel(instruction_set)
    layout = kernel.prepare(weight)
    generator = torch.Generator().manual_seed(5)
    for num_rows in (1, 2, 3, 4, 6, 7, 13, 40):
        inputs = torch.randn(num_rows, shape[1], generator=generator).to(torch.bfloat16)
        taken = inputs.double()
        if instruction_set.startswith("int8"):
            taken = round_to_8_bits(inputs, shape[2]).double()
        exact = taken @ weight.dequantize(torch.float64).T
        found = kernel.multiply(layout, inputs)
        # Weights rounded to bfloat16 would be off by 0.014 to 0.034 beyond the results' rounding.
        torch.testing.assert_close(found.double(), exact, rtol=2**-8 + 1e-5, atol=2e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(256, 512, 64), (33, 1200, 400), (40, 192, 64)], ids=str)
def test_a_row_has_one_result_to_the_bit(
    instruction_set: str, symmetric: bool, shape: tuple[int, int, int]
) -> None:
    """Beside however many others: in a block, in blocks that share weights, in several passes."""
    kernel = NativeKernel(instruction_set)
    layout = kernel.prepare(random_weight(*shape, symmetric=symmetric))
    inputs = torch.randn(130, shape[1]).to(torch.bfloat16)
    all_rows = kernel.multiply(layout, inputs)
    for count in (*range(1, 15), 25, 49, 61):
        for first in (0, 3, 130 - count):
            some = slice(first, first + count)
            assert torch.equal(kernel.multiply(layout, inputs[some]), all_rows[some]), (
                count,
                first,
            )


@pytest.mark.skipif(
    NativeKernel.unavailable_reason() is not None or len(int8_instruction_sets()) < 2,
    reason="one way to multiply integers at most",
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_in_8_bits_have_one_result_on_all_processors(symmetric: bool) -> None:
    weight = random_weight(100, 384, 96, symmetric=symmetric)
    inputs = torch.randn(17, 384).to(torch.bfloat16)
    first, other = (NativeKernel(name) for name in int8_instruction_sets())
    found = first.multiply(first.prepare(weight), inputs)
    assert torch.equal(found, other.multiply(other.prepare(weight), inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(64, 128, 32), (33, 1200, 400), (1, 8, 8)], ids=str)
def test_a_layout_has_all_of_its_weight(
    instruction_set: str, dtype: torch.dtype, symmetric: bool, shape: tuple[int, int, int]
) -> None:
    weight = random_weight(*shape, symmetric=symmetric)
    weight = replace(weight, scales=weight.scales.to(dtype))
    kernel = NativeKernel(instruction_set)
    found = kernel.restore(kernel.prepare(weight), weight.to("meta"))
    assert torch.equal(found.packed, weight.packed)
    assert found.scales.dtype == dtype
    assert torch.equal(found.scales, weight.scales)
    assert (found.zeros is None) == symmetric
    if found.zeros is not None and weight.zeros is not None:
        assert torch.equal(found.zeros, weight.zeros)
    scaled = kernel.multiply(kernel.prepare(weight), torch.ones(1, shape[1]).to(torch.bfloat16))
    expected = weight.dequantize(torch.float64).sum(dim=1)
    torch.testing.assert_close(scaled[0].double(), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.skipif(NativeKernel.unavailable_reason() is not None, reason="no native kernel here")
def test_a_weight_is_kept_in_one_form() -> None:
    weight = random_weight(256, 512, 64, symmetric=False, act_order=True)
    linear = Int4Linear(weight)
    linear(torch.randn(2, 512).to(torch.bfloat16))
    assert not linear.is_settled
    assert linear.num_bytes < 1.1 * weight.num_bytes
    assert torch.equal(linear.weight_int4.dequantize(), weight.dequantize())
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in linear.weight_tensors()}
    assert sum(kept.values()) == linear.num_bytes - sum(one.nbytes for one in linear.buffers())
    linear(torch.randn(2, 512))  # by another kernel, whose layout is the weight
    assert torch.equal(linear.weight_int4.dequantize(), weight.dequantize())


@pytest.mark.skipif(NativeKernel.unavailable_reason() is not None, reason="no native kernel here")
@pytest.mark.skipif(not int8_instruction_sets(), reason="no products of integers here")
def test_a_kernel_that_is_pinned_late_leaves_one_form_too() -> None:
    weight, inputs = random_weight(256, 512, 64), torch.randn(2, 512).to(torch.bfloat16)
    linear = Int4Linear(weight)
    linear(inputs)
    kept = [tensor.data_ptr() for tensor in linear.weight_tensors()]
    linear.pin("native-int8")
    found = linear(inputs)
    assert [tensor.data_ptr() for tensor in linear.weight_tensors()] == kept, "one layout for both"
    assert torch.equal(found, Int4Linear(weight, kernel_name="native-int8")(inputs))
    assert linear.num_bytes < 1.1 * weight.num_bytes
    with pytest.raises(QuantError, match=r"'native-int8' takes .*bfloat16, and these are .*32"):
        linear(inputs.float())


def test_threads_do_not_change_the_native_kernel(instruction_set: str) -> None:
    kernel = NativeKernel(instruction_set)
    # Tiles enough for shares of several, and a last share with fewer.
    weight = random_weight(1590, 512, 64, symmetric=False)
    inputs = torch.randn(200, 512).to(torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        layout = kernel.prepare(weight)
        alone = kernel.multiply(layout, inputs)
        torch.set_num_threads(3)
        together = kernel.multiply(layout, inputs)
        assert torch.equal(kernel.prepare(weight).codes, layout.codes)
        assert torch.equal(kernel.restore(layout, weight.to("meta")).packed, weight.packed)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@pytest.mark.skipif(NativeKernel.unavailable_reason() is not None, reason="no native kernel here")
def test_groups_that_the_native_kernel_cannot_read_are_refused() -> None:
    weight, inputs = random_weight(32, 24, 12), torch.randn(2, 24).to(torch.bfloat16)
    with pytest.raises(QuantError, match=r"groups of 12, and int4 kernel 'native'.*dequantize"):
        Int4Linear(weight, kernel_name="native")(inputs)
    exact = inputs.double() @ weight.dequantize(torch.float64).T
    assert relative_error(Int4Linear(weight)(inputs), exact) < 1e-2


def test_threads_are_called_for_what_several_can_do(instruction_set: str) -> None:
    kernel, parallel = NativeKernel(instruction_set), CountedParallel()
    inputs = torch.randn(73, 16640).to(torch.bfloat16)
    threads = torch.get_num_threads()
    cases = ((64, 4, [3]), (64, 25, [3]), (64, 25, [5, 5]), (64, 73, [3, 3]), (32, 4, []))
    try:
        for outputs, rows, expected in cases:
            torch.set_num_threads(max(expected, default=3))
            layout = kernel.prepare(random_weight(outputs, 16640, 128))
            exact = kernel.multiply(layout, inputs[:rows])
            layout.args.parallel = parallel.address
            parallel.teams.clear()
            assert torch.equal(kernel.multiply(layout, inputs[:rows]), exact)
            assert parallel.teams == expected, "to arrange many rows together, then to multiply"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("special", [0.0, float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(instruction_set: str, special: float) -> None:
    kernel = NativeKernel(instruction_set)
    layout = kernel.prepare(random_weight(64, 128, 32, symmetric=False))
    inputs = torch.randn(4, 128).to(torch.bfloat16)
    expected = kernel.multiply(layout, inputs)
    inputs[2] = 0
    inputs[2, 70] = special
    found = kernel.multiply(layout, inputs)
    if special == 0:
        assert not found[2].any()
    else:
        assert not found[2].isfinite().any()
    others = [0, 1, 3]
    assert torch.equal(found[others], expected[others])


def test_inputs_too_small_to_be_rounded_are_zeros(instruction_set: str) -> None:
    """A stretch is divided by its largest, and there are bfloat16 whose inverse is infinite."""
    if instruction_set == "avx512_bf16":
        pytest.skip("rounds no inputs")
    kernel = NativeKernel(instruction_set)
    layout = kernel.prepare(random_weight(64, 128, 32, symmetric=False))
    inputs = torch.randn(3, 128).to(torch.bfloat16)
    inputs[:, 32:64] = 0
    expected = kernel.multiply(layout, inputs)
    inputs[1, 32:64] = 2e-37
    assert torch.equal(kernel.multiply(layout, inputs), expected)
    inputs[:] = -2e-37
    assert not kernel.multiply(layout, inputs).any()
    assert not round_to_8_bits(inputs, 32).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_are_computed_too(dtype: torch.dtype) -> None:
    weight = random_weight(48, 64, 32, symmetric=False, act_order=True)
    inputs = torch.randn(5, 64).to(dtype)
    expected = inputs.double() @ weight.dequantize(torch.float64).T
    assert relative_error(Int4Linear(weight)(inputs), expected) < 1e-3


def test_bias_and_leading_dimensions() -> None:
    weight, bias = random_weight(24, 32, 16), torch.randn(24)
    inputs = torch.randn(2, 3, 32)
    expected = inputs @ weight.dequantize().T + bias
    torch.testing.assert_close(Int4Linear(weight, bias)(inputs), expected)


def test_the_weight_is_kept_until_it_settles() -> None:
    weight = random_weight(64, 128, 32, symmetric=False, act_order=True)
    linear = Int4Linear(weight)
    inputs = torch.randn(4, 128).to(torch.bfloat16)
    before = linear(inputs)
    kept = linear.weight_int4
    assert torch.equal(kept.dequantize(), weight.dequantize())
    linear.settle(torch.bfloat16)
    assert torch.equal(linear(inputs), before)
    with pytest.raises(QuantError, match="before `settle`"):
        linear.weight_int4  # noqa: B018 - it raises
    assert linear.num_bytes < 2 * weight.num_bytes


def test_types_that_models_are_moved_to_do_not_reach_scales() -> None:
    weight = random_weight(16, 32, 16)
    linear = Int4Linear(weight, torch.zeros(16)).to(torch.bfloat16)
    assert linear.weight_int4.scales.dtype == torch.float16
    assert linear.bias is not None
    assert linear.bias.dtype == torch.bfloat16


def test_unknown_kernels_are_named() -> None:
    with pytest.raises(QuantError, match=r"'cutlass'.*native"):
        Int4Linear(random_weight(8, 8, 8), kernel_name="cutlass")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_something_accepts_every_product(dtype: torch.dtype) -> None:
    assert kernel_names()[-1] == "dequantize"
    for num_rows in (1, 7, 300):
        chosen = choose_kernel(random_weight(8, 64, 64), CPU, dtype, num_rows)
        assert chosen.accepts(random_weight(8, 64, 64), CPU, dtype, num_rows)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.09), (8, 0.006)])
def test_output_layers(bits: int, tolerance: float) -> None:
    """The error is that of the steps: a sixteenth of the precision with half of the bits."""
    torch.manual_seed(0)
    dense = torch.nn.Linear(96, 200)
    inputs = torch.randn(5, 96)
    found, exact = quantize_output(dense, bits)(inputs), dense(inputs)
    error = relative_error(found, exact.double())
    assert tolerance / 10 < error < tolerance


def test_output_layers_that_do_not_divide() -> None:
    with pytest.raises(QuantError, match="40 inputs"):
        quantize_output(torch.nn.Linear(40, 8), 8)
