"""bitsandbytes in 4 bits (NF4, FP4): a layer to a dense weight.

weight                   bytes        two codes each, the first in the high nibble; of any type
weight_quant_map         float32 [16] the number of each code
weight_absmax            float32 [b]  by block of the flattened weight; or uint8, codes themselves:
weight_nested_quant_map  float32 [256]
weight_nested_absmax     float32 [c]  by block of the blocks
weight_quant_state       uint8 [n]    JSON: the shape, blocks, and what was subtracted from absmax

In the files there is a point behind each `weight`.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from .scheme import LayerTensors, Scheme

CODES = "weight"
REQUIRED = ("weight_absmax", "weight", "weight_quant_map", "weight_quant_state")
OPTIONAL = ("weight_nested_absmax", "weight_nested_quant_map")
RENAMED = (
    (r"\.weight\.absmax$", ".weight_absmax"),
    (r"\.weight\.quant_map$", ".weight_quant_map"),
    (r"\.weight\.nested_absmax$", ".weight_nested_absmax"),
    (r"\.weight\.nested_quant_map$", ".weight_nested_quant_map"),
    (r"\.weight\.quant_state\.bitsandbytes__nf4$", ".weight_quant_state"),
    (r"\.weight\.quant_state\.bitsandbytes__fp4$", ".weight_quant_state"),
)
_KEYS = {
    "blocksize",
    "dtype",  # to which bitsandbytes rounds it; here it is the model's
    "nested_blocksize",
    "nested_dtype",  # of absmax, before it was rounded
    "nested_offset",
    "quant_type",  # the map has its numbers
    "shape",
}


def features(scheme: Scheme, weight: Sequence[int]) -> None:
    """Unknown: codes are stored flat."""


def read(tensors: LayerTensors, scheme: Scheme) -> torch.Tensor:
    """The weight of one layer, float32 [N, K]; raises QuantError, which names the tensor."""
    state = _state(tensors)
    shape, block = state["shape"], state["blocksize"]
    count = math.prod(shape)
    stored = tensors.any_of("weight").contiguous().view(torch.uint8).flatten()
    if 2 * len(stored) != count:
        raise tensors.refuse(
            "weight", f"holds {2 * len(stored)} codes, and its quant_state says {shape}"
        )
    codes = torch.stack((stored >> 4, stored & 0xF), dim=-1).flatten()
    numbers = tensors.finite("weight_quant_map", tensors.get("weight_quant_map", None, 16)).float()
    absmax = _absmax(tensors, state, -(-count // block))
    values = numbers[codes.int()]
    return (values * absmax.repeat_interleave(block)[:count]).view(shape)


def _absmax(tensors: LayerTensors, state: dict[str, Any], blocks: int) -> torch.Tensor:
    """The largest of each block, float32 [blocks]."""
    if "nested_blocksize" not in state:
        return tensors.finite("weight_absmax", tensors.get("weight_absmax", None, blocks)).float()
    codes = tensors.get("weight_absmax", torch.uint8, blocks)
    size = state["nested_blocksize"]
    numbers = tensors.get("weight_nested_quant_map", None, 256).float()
    name = "weight_nested_absmax"
    outer = tensors.finite(name, tensors.get(name, None, -(-blocks // size))).float()
    inner = numbers[codes.int()] * outer.repeat_interleave(size)[:blocks]
    return inner + torch.tensor(state["nested_offset"], dtype=torch.float32)


def _state(tensors: LayerTensors) -> dict[str, Any]:
    """What the layer says of itself, checked."""
    name = "weight_quant_state"
    stored = tensors.get(name, torch.uint8, None)
    try:
        state = json.loads(bytes(stored.tolist()))
    except ValueError as error:
        raise tensors.refuse(name, f"is no JSON: {error}") from error
    if unknown := sorted(state.keys() - _KEYS):
        raise tensors.refuse(name, f"says {unknown[0]}, which is not understood here")
    sizes = [state.get("blocksize"), *state.get("shape", [None])]
    if "nested_blocksize" in state:
        sizes.append(state["nested_blocksize"])
        if not isinstance(state.get("nested_offset"), float):
            raise tensors.refuse(name, "has no number for nested_offset")
    if len(state.get("shape", ())) != 2 or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise tensors.refuse(name, f"has no sizes of a matrix and its blocks: {state}")
    return state
