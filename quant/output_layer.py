"""A model's output layer in 4 or 8 bits: in small models it is a large share of all bytes.

Eight bits are two weights of four: with an unsigned code `16 high + low` for `value / scale + 128`,
the product is that of `high - 8` by `16 scale` and of `low` by `scale`, over the same inputs. So
one layer of twice the inputs computes it, by the same kernels.
"""

import torch
from torch import nn

from ..vmem.errors import QuantError
from .linear import Int4Linear
from .quantise.rounding import Rounding, round_to_nearest
from .weight import SYMMETRIC_ZERO, Int4Weight, concatenate

BITS = (4, 8)
_GROUP_SIZE = 32
_ROWS = 8192  # quantised at a time: float32 copies of a whole vocabulary would be large


class Int8Linear(nn.Module):
    """[..., in_features] to [..., out_features], with an 8-bit weight as two of four bits."""

    def __init__(self, halves: Int4Weight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.halves = Int4Linear(halves, bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.halves(torch.cat((inputs, inputs), dim=-1))


def quantize_output(linear: nn.Linear, bits: int) -> Int4Linear | Int8Linear:
    """The layer, rounded to nearest in groups of 32 columns, asymmetric in 4 bits.

    Raises QuantError if the inputs do not divide into groups.
    """
    assert bits in BITS
    if linear.in_features % _GROUP_SIZE:
        raise QuantError(
            f"the output layer has {linear.in_features} inputs, which do not divide into groups "
            f"of {_GROUP_SIZE}; leave it as it is"
        )
    bias = None if linear.bias is None else linear.bias.detach()
    chunks = linear.weight.detach().split(_ROWS)
    if bits == 8:
        return Int8Linear(concatenate([_as_halves(chunk) for chunk in chunks]), bias)
    rounding = Rounding(group_size=_GROUP_SIZE, symmetric=False)
    return Int4Linear(concatenate([round_to_nearest(c, rounding) for c in chunks]), bias)


def _as_halves(weight: torch.Tensor) -> Int4Weight:
    """[N, K] as 4-bit [N, 2 K]: the high halves of 8-bit codes, then the low ones."""
    groups = weight.float().unflatten(1, (-1, _GROUP_SIZE))
    scales = (groups.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # [N, G]
    codes = (groups / scales.unsqueeze(-1)).round().clamp(-127, 127).flatten(1) + 128
    codes = codes.to(torch.uint8)
    zeros = torch.zeros_like(scales, dtype=torch.uint8)
    return Int4Weight.from_codes(
        torch.cat((codes >> 4, codes & 0xF), dim=1),
        torch.cat((16 * scales, scales), dim=1),
        torch.cat((zeros + SYMMETRIC_ZERO, zeros), dim=1),
    )
