"""A 4-bit linear whose groups begin anywhere: GGUF's Q4_1, scale times code plus an offset."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from .linear import Int4Linear
from .weight import Int4Weight


class OffsetLinear(nn.Module):
    """[..., in_features] to [..., out_features] by `scale * (code - zero) + offset`.

    The codes are multiplied as any in 4 bits, and a group's offset by the sum of its inputs, in
    float32. No weight is rounded.

    Args:
        weight: the codes, their scales and zeros.
        offsets: float [out_features, groups].
        bias: [out_features] or None.
    """

    def __init__(
        self, weight: Int4Weight, offsets: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.codes = Int4Linear(weight, bias)
        self.offsets = nn.Parameter(offsets.float(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        sums = inputs.float().unflatten(-1, (self.offsets.shape[1], -1)).sum(dim=-1)
        return (self.codes(inputs) + functional.linear(sums, self.offsets)).to(inputs.dtype)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "OffsetLinear":
        """Follow the module to another device. Offsets keep their type."""
        offsets = self.offsets.data
        super()._apply(fn, recurse)
        self.offsets.data = offsets.to(self.offsets.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
