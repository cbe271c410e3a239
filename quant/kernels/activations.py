"""Activations in 8 bits: inputs of 4-bit layers rounded, for products of small integers.

Every row rounds each of its stretches by itself, at most 256 inputs of a group, to -127 .. 127 of
the largest there. So its result depends on no other row. It is faster where products are the
limit, and costs what `rounded_inputs` measures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...vmem.errors import QuantError
from ..linear import Int4Linear
from .table import kernel

ACTIVATION_BITS = (8, 16)
KERNEL = "native-int8"
_LARGEST = 127
_STRETCH = 256  # of kernels/native/kernel.h


def use_8_bits(model: nn.Module, dtype: torch.dtype, run: Callable[[], object]) -> None:
    """Have the 4-bit layers of a model round their inputs, of `dtype`, to 8 bits.

    `run` runs a few tokens through the model, to see what its layers are given.

    Raises QuantError, with nothing changed, if there are none, no kernel for one of them, or inputs
    of another type for one of them.
    """
    linears = [(name, one) for name, one in model.named_modules() if isinstance(one, Int4Linear)]
    if not linears:
        raise QuantError("none of its layers is in 4 or 8 bits; use a quantised checkpoint")
    for name, linear in linears:
        if not kernel(KERNEL).accepts(linear.outline, linear.device, dtype, 1):
            raise QuantError(
                f"{name or 'the layer'} is in groups of {linear.outline.group_size}, on "
                f"{linear.device.type}, with inputs of {str(dtype).removeprefix('torch.')}, and "
                "8-bit activations are for groups of a multiple of 8, on a CPU, in bfloat16"
            )
    for name, given in _input_types(linears, run).items():
        if given != dtype:
            raise QuantError(
                f"{name or 'the layer'} is given inputs of {str(given).removeprefix('torch.')}, "
                "and 8-bit activations are for those in bfloat16"
            )
    for _, linear in linears:
        linear.pin(KERNEL)


def _input_types(
    linears: Sequence[tuple[str, nn.Module]], run: Callable[[], object]
) -> dict[str, torch.dtype]:
    """What linears are given while `run()` runs, by their names."""
    types: dict[str, torch.dtype] = {}

    def noting(name: str) -> Callable[[nn.Module, Any], None]:
        def note(_: nn.Module, args: Any) -> None:
            types[name] = args[0].dtype

        return note

    hooks = [linear.register_forward_pre_hook(noting(name)) for name, linear in linears]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return types


def round_to_8_bits(inputs: torch.Tensor, group_size: int) -> torch.Tensor:
    """What the kernel multiplies: [..., K] rounded stretch by stretch, in float32."""
    rounded = []
    for some in inputs.float().unflatten(-1, (-1, group_size)).split(_STRETCH, dim=-1):
        largest = some.abs().amax(-1, keepdim=True)
        shrink = torch.full_like(largest, _LARGEST) / largest  # a number over it is less exact
        shrink = shrink.where(shrink.isfinite(), 0)  # all are 0, or too small to divide by
        rounded.append((some * shrink).round() * (largest / _LARGEST))
    return torch.cat(rounded, dim=-1).flatten(-2)


@contextmanager
def rounded_inputs(linears: Mapping[nn.Module, int]) -> Iterator[None]:
    """Have linears, each with its group size, round their inputs as the kernel would.

    So their model's perplexity with 8-bit activations is measured in any type, on any device, with
    one difference: what was rounded is rounded once more, to the inputs' own type, where the kernel
    multiplies the integers themselves.
    """

    def rounding(group_size: int) -> Any:
        return lambda _, args: (round_to_8_bits(args[0], group_size).to(args[0].dtype),)

    hooks = [one.register_forward_pre_hook(rounding(size)) for one, size in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
