"""A model's output layer in 4 or 8 bits: in small models it is a large share of all bytes."""

import torch
from torch import nn

from ..vmem.errors import QuantError
from .int8 import int8_weight
from .linear import Int4Linear
from .quantise.rounding import Rounding, round_to_nearest
from .weight import Int4Weight, concatenate

BITS = (4, 8)
_GROUP_SIZE = 32
_ROWS = 1024  # quantised at a time: float32 copies of a whole vocabulary would be large


def quantize_output(linear: nn.Linear, bits: int) -> Int4Linear:
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
        return Int4Linear(concatenate([_in_8_bits(chunk) for chunk in chunks]), bias)
    rounding = Rounding(group_size=_GROUP_SIZE, symmetric=False)
    return Int4Linear(concatenate([round_to_nearest(c, rounding) for c in chunks]), bias)


def _in_8_bits(weight: torch.Tensor) -> Int4Weight:
    """[N, K] rounded to nearest, symmetric."""
    groups = weight.float().unflatten(1, (-1, _GROUP_SIZE))
    scales = (groups.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # [N, G]
    values = (groups / scales.unsqueeze(-1)).round().clamp(-127, 127).flatten(1)
    return int8_weight(values.to(torch.int8), scales)
