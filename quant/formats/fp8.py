"""compressed-tensors' `float-quantized`, 8-bit floats with scales: a layer to a dense weight.

weight        float8_e4m3fn [N, K]
weight_scale  float [N, groups], or one for all, or one a block of rows and columns

An 8-bit float is no 8-bit integer, but every one is a bfloat16. Here they are multiplied by their
scales and rounded once, to the type of the model.
"""

from collections.abc import Sequence

import torch

from .compressed_tensors import OF_ACTIVATIONS, row_scales
from .scheme import LayerTensors, Scheme, groups_of

CODES = "weight"
REQUIRED = ("weight_scale", "weight")
OPTIONAL = ("weight_zero_point", *OF_ACTIVATIONS)


def features(scheme: Scheme, weight: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a layer whose `weight` has this shape."""
    return weight[0], weight[1]


def read(tensors: LayerTensors, scheme: Scheme) -> torch.Tensor:
    """The weight of one layer, float32 [N, K]; raises QuantError, which names the tensor."""
    stored = tensors.get("weight", torch.float8_e4m3fn, None, None)
    values = tensors.finite("weight", stored.float())
    name = "weight_zero_point"
    if name in tensors and tensors.any_of(name).float().any():
        raise tensors.refuse(name, "holds zero points, which 8-bit floats have none of")
    if scheme.block is not None:
        return values * _of_blocks(tensors, scheme.block, values.shape)
    scales = row_scales(tensors, len(values)).float()
    groups = groups_of(
        scheme, values.shape[1], tensors, "weight_scale", scales.shape[1], short=False
    )
    return values * scales.repeat_interleave(groups.size, dim=1)


def _of_blocks(tensors: LayerTensors, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Scales [N, K] from one a block; the last blocks may be smaller."""
    rows, columns = (-(-size // side) for size, side in zip(shape, block, strict=True))
    scales = tensors.finite("weight_scale", tensors.get("weight_scale", None, rows, columns))
    spread = scales.float().repeat_interleave(block[0], dim=0)[: shape[0]]
    return spread.repeat_interleave(block[1], dim=1)[:, : shape[1]]
