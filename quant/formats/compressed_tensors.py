"""compressed-tensors' `pack-quantized` (llm-compressor): a layer to `Int4Weight` and back.

weight_packed      int32 [N, K/8]       eight columns a word; a code is its value plus 8
weight_scale       float [N, groups]    one group for the strategy `channel`
weight_zero_point  int32 [N/8, groups]  eight rows a word, plus 8; absent if symmetric
weight_shape       int64 [2]            N and K
weight_g_idx       int32 [K]            only with activation order `group`
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...vmem.errors import QuantError, UnsupportedQuantization
from ..weight import SYMMETRIC_ZERO, Int4Weight, pack
from .int32_words import CODES_PER_WORD, from_words, to_words
from .scheme import LayerTensors, Scheme, codes_in_order, group_index, require_bits, sort_groups

REQUIRED = ("weight_packed", "weight_scale", "weight_shape")
OPTIONAL = ("weight_zero_point", "weight_g_idx")
_FORMAT = "pack-quantized"
_STRATEGIES = ("group", "channel", "tensor")


def parse_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`; raises UnsupportedQuantization for other kinds."""
    groups = config.get("config_groups") or {}
    if not groups:
        raise QuantError("quantization_config.config_groups is empty")
    if config.get("kv_cache_scheme"):
        raise UnsupportedQuantization(
            "quantization_config.kv_cache_scheme quantises keys and values, which is not read; "
            "use a checkpoint that quantises weights alone"
        )
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{name}"
        kind = group.get("format") or config.get("format")
        weights = group.get("weights") or {}
        require_bits(weights.get("num_bits"), f"{where}.weights.num_bits")
        if kind != _FORMAT or weights.get("type", "int") != "int":
            raise UnsupportedQuantization(
                f"{where} is {kind!r} of type {weights.get('type')!r}; there is a reader for "
                f"{_FORMAT!r} of type 'int'"
            )
        if weights.get("strategy") not in _STRATEGIES:
            raise UnsupportedQuantization(
                f"{where}.weights.strategy is {weights.get('strategy')!r}; there are readers for "
                f"{', '.join(_STRATEGIES)}"
            )
        if group.get("input_activations") or group.get("output_activations"):
            raise UnsupportedQuantization(
                f"{where} quantises activations too; use a checkpoint that quantises weights alone"
            )
    return Scheme(format="compressed-tensors")


def features(weight_packed: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a layer whose `weight_packed` has this shape."""
    return weight_packed[0], weight_packed[1] * CODES_PER_WORD


def read(tensors: LayerTensors, scheme: Scheme) -> Int4Weight:
    """The weight of one layer; raises QuantError, which names the tensor."""
    words = tensors.get("weight_packed", torch.int32, None, None)
    out_features, in_features = features(words.shape)
    shape = tensors.get("weight_shape", torch.int64, 2).tolist()
    if shape != [out_features, in_features]:
        raise tensors.refuse(
            "weight_shape", f"says {shape}, and weight_packed holds {[out_features, in_features]}"
        )
    scales = _scales(tensors, out_features)
    groups = scales.shape[1]
    if not groups or in_features % groups:
        raise tensors.refuse("weight_scale", f"has {groups} groups for {in_features} columns")
    zeros = _zeros(tensors, out_features, groups)
    packed, order = words.contiguous().view(torch.uint8), None  # [N, K/2]
    if "weight_g_idx" in tensors:
        index = tensors.get("weight_g_idx", torch.int32, in_features)
        codes, order = sort_groups(from_words(words), index, tensors, "weight_g_idx", groups)
        packed = packed if order is None else pack(codes)
    return Int4Weight(
        packed=packed,
        scales=scales,
        zeros=None if zeros is None or (zeros == SYMMETRIC_ZERO).all() else zeros,
        group_size=in_features // groups,
        permutation=order,
    )


def write(weight: Int4Weight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of one layer; K and, with zeros, N are multiples of 8."""
    tensors = {
        "weight_packed": to_words(codes_in_order(weight)),
        "weight_scale": weight.scales.contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = to_words(weight.zeros.T).T.contiguous()
    if weight.permutation is not None:
        tensors["weight_g_idx"] = group_index(weight)
    return tensors


def _scales(tensors: LayerTensors, out_features: int) -> torch.Tensor:
    """[N, groups], also where one scale serves all rows."""
    try:
        scales = tensors.get("weight_scale", None, out_features, None)
    except QuantError:
        if "weight_scale" not in tensors:
            raise
        scales = tensors.get("weight_scale", None, 1).expand(out_features, 1).contiguous()
    return tensors.finite("weight_scale", scales)


def _zeros(tensors: LayerTensors, out_features: int, groups: int) -> torch.Tensor | None:
    if "weight_zero_point" not in tensors:
        return None
    words = tensors.get("weight_zero_point", torch.int32, out_features // CODES_PER_WORD, groups)
    return from_words(words.T).T.contiguous()  # [N, groups]
