"""compressed-tensors' `int-quantized`, with int8 as it is: a layer to a weight in 8 bits.

weight             int8 [N, K]
weight_scale       float [N, groups]    or one for all
weight_zero_point  int8 [N, groups]     likewise; absent if symmetric
weight_g_idx       int32 [K]            only with activation order `group`
"""

from collections.abc import Sequence

import torch

from ..int8 import SYMMETRIC_ZERO_8, int8_weight
from ..weight import Int4Weight
from .compressed_tensors import OF_ACTIVATIONS, row_scales
from .scheme import LayerTensors, Scheme, check_zeros, groups_of, order_of

CODES = "weight"
REQUIRED = ("weight_scale", "weight")
OPTIONAL = ("weight_zero_point", "weight_g_idx", *OF_ACTIVATIONS)


def features(scheme: Scheme, weight: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a layer whose `weight` has this shape."""
    return weight[0], weight[1]


def read(tensors: LayerTensors, scheme: Scheme) -> Int4Weight:
    """The weight of one layer; raises QuantError, which names the tensor."""
    values = tensors.get("weight", torch.int8, None, None)
    out_features, in_features = values.shape
    scales = row_scales(tensors, out_features)
    stored = scales.shape[1]
    groups = groups_of(scheme, in_features, tensors, "weight_scale", stored, short=False)
    zeros = _zeros(tensors, out_features, stored)
    if zeros is None and scheme.symmetric is False:
        raise tensors.refuse("weight_zero_point", "is missing, and the config has zero points")
    if zeros is not None and not check_zeros(scheme, tensors, "weight_zero_point", zeros):
        zeros = None
    order = order_of(scheme, tensors, "weight_g_idx", groups)
    return int8_weight(
        values if order is None else values[:, order],
        groups.spread(scales),
        None if zeros is None else groups.spread(zeros),
        permutation=order,
    )


def _zeros(tensors: LayerTensors, out_features: int, groups: int) -> torch.Tensor | None:
    """Zero points of unsigned codes, uint8 [N, groups]."""
    name = "weight_zero_point"
    if name not in tensors:
        return None
    if tensors.is_single(name):
        values = tensors.single(name, torch.int8).expand(out_features, groups)
    else:
        values = tensors.get(name, torch.int8, out_features, groups)
    return (values.int() + SYMMETRIC_ZERO_8).to(torch.uint8)
