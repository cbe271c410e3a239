"""compressed-tensors' `pack-quantized` (llm-compressor): a layer to `Int4Weight` and back.

weight_packed      int32 [N, K/8]       eight columns a word; a code is its value plus 8
weight_scale       float [N, groups]    one group for the strategy `channel`
weight_zero_point  int32 [N/8, groups]  eight rows a word, plus 8; absent if symmetric
weight_shape       int64 [2]            N and K
weight_g_idx       int32 [K]            only with activation order `group`

In 8 bits there are four to a word, and 128 is added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...vmem.errors import QuantError, UnsupportedQuantization
from ..weight import Int4Weight
from .int32_words import codes_per_word, from_words, to_words
from .keys import HARMLESS, block_of, group_size, is_empty, refuse_unknown, require
from .scheme import (
    LayerTensors,
    ReadFormat,
    Scheme,
    check_zeros,
    codes_in_order,
    group_index,
    groups_of,
    order_of,
    require_bits,
    weight_of,
)

CODES = "weight_packed"
REQUIRED = ("weight_packed", "weight_scale", "weight_shape")
# By what activations are rounded where a checkpoint is run as it was meant to be. Not here.
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
OPTIONAL = ("weight_zero_point", "weight_g_idx", *OF_ACTIVATIONS)
_FORMATS: dict[tuple[Any, Any, Any], ReadFormat] = {  # by format, type and bits
    ("pack-quantized", "int", 4): "compressed-tensors",
    ("pack-quantized", "int", 8): "compressed-tensors",
    ("int-quantized", "int", 8): "compressed-tensors-int8",
    ("naive-quantized", "int", 8): "compressed-tensors-int8",
    ("float-quantized", "float", 8): "compressed-tensors-fp8",
    ("naive-quantized", "float", 8): "compressed-tensors-fp8",
}
_STRATEGIES = ("group", "channel", "tensor")
# Whether columns are dealt to groups out of order, or were only rounded out of order.
_ACT_ORDERS = {"group": True, "dynamic": True, True: True, "weight": False, "static": False}
_HONOURED = {"config_groups", "format", "kv_cache_scheme", "quant_method", "sparsity_config"}
_HARMLESS = {
    "global_compression_ratio",  # a statistic
    "quantization_status",  # that the tensors are packed, their names say
}
_HONOURED_OF_GROUP = {"format", "input_activations", "output_activations", "weights"}
_HONOURED_OF_ACTIVATIONS = {
    "block_structure",
    "dynamic",
    "group_size",
    "num_bits",
    "strategy",
    "symmetric",
    "type",
}
_HONOURED_OF_WEIGHTS = _HONOURED_OF_ACTIVATIONS | {"actorder"}
_HARMLESS_TYPES = {"scale_dtype", "zp_dtype"}  # the tensors have theirs


def parse_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`; raises UnsupportedQuantization for other kinds."""
    where = "quantization_config"
    groups = config.get("config_groups") or {}
    if not groups:
        raise QuantError(f"{where}.config_groups is empty")
    rounds_kv = _rounds_alone(config.get("kv_cache_scheme"), f"{where}.kv_cache_scheme")
    sparsity = config.get("sparsity_config") or {}
    if not is_empty(sparsity) and sparsity.get("format") != "dense":
        raise UnsupportedQuantization(
            f"{where}.sparsity_config.format is {sparsity.get('format')!r}, and zeros that are "
            "left out are not read; use a checkpoint without sparsity"
        )
    refuse_unknown(config, where, _HONOURED, HARMLESS | _HARMLESS)
    schemes = {
        name: _group_scheme(group, config.get("format"), f"{where}.config_groups.{name}")
        for name, group in groups.items()
    }
    first, *others = schemes
    for name in others:
        if schemes[name] != schemes[first]:
            raise UnsupportedQuantization(
                f"{where}.config_groups.{first} and .{name} differ in group size, symmetry or "
                "order; use a checkpoint with one scheme"
            )
    return replace(schemes[first], rounds_kv=rounds_kv)


def _rounds_alone(args: Mapping[str, Any] | None, where: str) -> bool:
    """Whether activations were to be rounded; here they stay in the model's type, more exact.

    Raises UnsupportedQuantization for what is coarser, or does more than to round.
    """
    if not args or is_empty(args):
        return False
    bits = args.get("num_bits")
    if not isinstance(bits, int) or bits < 8:
        raise UnsupportedQuantization(
            f"{where}.num_bits is {bits!r}, and activations are not rounded to fewer than 8 bits "
            "here; use a checkpoint that quantises weights alone"
        )
    refuse_unknown(args, where, _HONOURED_OF_ACTIVATIONS, HARMLESS | _HARMLESS_TYPES)
    return True


def _group_scheme(group: Mapping[str, Any], kind: str | None, where: str) -> Scheme:
    """The scheme of one of the config's groups of layers."""
    kind = group.get("format") or kind
    weights = group.get("weights") or {}
    bits = require_bits(weights.get("num_bits"), f"{where}.weights.num_bits", 4, 8)
    stored = _FORMATS.get((kind, weights.get("type", "int"), bits))
    if stored is None:
        known = ", ".join(f"{name!r} of type {kind!r} in {n} bits" for name, kind, n in _FORMATS)
        raise UnsupportedQuantization(
            f"{where} is {kind!r} of type {weights.get('type')!r} in {bits} bits; there are "
            f"readers for {known}"
        )
    strategy, block = weights.get("strategy"), None
    strategies = (*_STRATEGIES, "block") if stored == "compressed-tensors-fp8" else _STRATEGIES
    if strategy not in strategies:
        raise UnsupportedQuantization(
            f"{where}.weights.strategy is {strategy!r}; there are readers for "
            f"{', '.join(strategies)}"
        )
    if strategy == "block":
        block = block_of(weights.get("block_structure"), f"{where}.weights.block_structure")
    else:
        require(weights, f"{where}.weights", "block_structure")
    for which in ("input_activations", "output_activations"):
        _rounds_alone(group.get(which), f"{where}.{which}")
    order = weights.get("actorder")
    require(weights, f"{where}.weights", "actorder", *_ACT_ORDERS)
    require(weights, f"{where}.weights", "dynamic")
    refuse_unknown(group, where, _HONOURED_OF_GROUP, HARMLESS)
    refuse_unknown(weights, f"{where}.weights", _HONOURED_OF_WEIGHTS, HARMLESS | _HARMLESS_TYPES)
    size = weights.get("group_size") if strategy == "group" else -1
    return Scheme(
        format=stored,
        bits=bits,
        group_size=group_size(size, f"{where}.weights.group_size"),
        symmetric=weights.get("symmetric", True),
        act_order=_ACT_ORDERS[order] if order else False,
        block=block,
    )


def features(scheme: Scheme, weight_packed: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a layer whose `weight_packed` has this shape."""
    return weight_packed[0], weight_packed[1] * codes_per_word(scheme.bits)


def read(tensors: LayerTensors, scheme: Scheme) -> Int4Weight:
    """The weight of one layer; raises QuantError, which names the tensor."""
    words = tensors.get("weight_packed", torch.int32, None, None)
    out_features, in_features = features(scheme, words.shape)
    shape = tensors.get("weight_shape", torch.int64, 2).tolist()
    if shape != [out_features, in_features]:
        raise tensors.refuse(
            "weight_shape", f"says {shape}, and weight_packed holds {[out_features, in_features]}"
        )
    scales = row_scales(tensors, out_features)
    stored = scales.shape[1]
    groups = groups_of(scheme, in_features, tensors, "weight_scale", stored, short=False)
    zeros = _zeros(scheme, tensors, out_features, stored)
    if zeros is None and scheme.symmetric is False:
        raise tensors.refuse("weight_zero_point", "is missing, and the config has zero points")
    order = order_of(scheme, tensors, "weight_g_idx", groups)
    if zeros is not None and not check_zeros(scheme, tensors, "weight_zero_point", zeros):
        zeros = None
    return weight_of(words, scales, zeros, groups, bits=scheme.bits, order=order)


def write(weight: Int4Weight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of one layer in 4 bits; K and, with zeros, N are multiples of 8."""
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


def row_scales(tensors: LayerTensors, out_features: int) -> torch.Tensor:
    """Scales of rows, [N, groups], also where one serves all."""
    if tensors.is_single("weight_scale"):
        scales = tensors.single("weight_scale", None).expand(out_features, 1).contiguous()
    else:
        scales = tensors.get("weight_scale", None, out_features, None)
    return tensors.finite("weight_scale", scales)


def _zeros(
    scheme: Scheme, tensors: LayerTensors, out_features: int, groups: int
) -> torch.Tensor | None:
    if "weight_zero_point" not in tensors:
        return None
    num_words = out_features // codes_per_word(scheme.bits)
    words = tensors.get("weight_zero_point", torch.int32, num_words, groups)
    return from_words(words.T, scheme.bits).T.contiguous()  # [N, groups]
