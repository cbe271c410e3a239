"""GPTQ checkpoints (AutoGPTQ, GPTQModel, auto-round): a layer's tensors to `Int4Weight` and back.

    qweight  int32 [K/8, N]       eight rows a word (four in 8 bits), the first in the lowest bits
    qzeros   int32 [groups, N/8]  eight columns a word (four); less one in the first version
    scales   float [groups, N]    the last group is shorter if the others do not fill K
    g_idx    int32 [K]            the group of each row; may be absent without act-order

The first version stores zeros less one, so that a zero of 0 wraps to the largest code. It is
read back as 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...vmem.errors import UnsupportedQuantization
from ..weight import SYMMETRIC_ZERO, Int4Weight
from .int32_words import codes_per_word, from_words, to_words
from .keys import (
    HARMLESS,
    group_size,
    refuse_activations,
    refuse_mixed,
    refuse_unknown,
    require,
)
from .scheme import (
    LayerTensors,
    Scheme,
    check_zeros,
    codes_in_order,
    group_index,
    groups_of,
    order_of,
    require_bits,
    weight_of,
)

CODES = "qweight"
REQUIRED = ("qweight", "qzeros", "scales")
OPTIONAL = ("g_idx",)
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_HONOURED = {
    "bits",
    "checkpoint_format",
    "data_type",
    "desc_act",
    "dynamic",
    "format",
    "group_size",
    "pack_dtype",
    "quant_method",
    "sym",
}


def parse_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`; raises UnsupportedQuantization for other kinds."""
    where = "quantization_config"
    bits = require_bits(config.get("bits"), f"{where}.bits", 4, 8)
    for pattern in config.get("dynamic") or {}:
        if not pattern.startswith("-:"):  # which leaves layers out, as the files show
            raise UnsupportedQuantization(
                f"{where}.dynamic gives layers like {pattern!r} a scheme of their own, which is "
                "not read; use a checkpoint with one scheme"
            )
    kind = config.get("checkpoint_format") or config.get("format") or "gptq"
    if kind not in _ZERO_OFFSETS:
        raise UnsupportedQuantization(
            f"{where}.checkpoint_format is {kind!r}; there are readers for "
            f"{', '.join(_ZERO_OFFSETS)}"
        )
    known = refuse_activations(config, where) | refuse_mixed(config, where)
    require(config, where, "data_type", "int")
    require(config, where, "pack_dtype", "int32", "torch.int32")
    refuse_unknown(config, where, _HONOURED | known, HARMLESS | {"backend", "scale_dtype"})
    return Scheme(
        format="gptq",
        bits=bits,
        zero_offset=_ZERO_OFFSETS[kind],
        group_size=group_size(config.get("group_size"), f"{where}.group_size"),
        symmetric=config.get("sym"),
        act_order=config.get("desc_act"),
    )


def features(scheme: Scheme, qweight: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a layer whose `qweight` has this shape."""
    return qweight[1], qweight[0] * codes_per_word(scheme.bits)


def read(tensors: LayerTensors, scheme: Scheme) -> Int4Weight:
    """The weight of one layer; raises QuantError, which names the tensor."""
    qweight = tensors.get("qweight", torch.int32, None, None)
    out_features, in_features = features(scheme, qweight.shape)
    scales = tensors.finite("scales", tensors.get("scales", None, None, out_features))
    stored = scales.shape[0]
    groups = groups_of(scheme, in_features, tensors, "scales", stored, short=True)
    shape = (stored, out_features // codes_per_word(scheme.bits))
    zeros = from_words(tensors.get("qzeros", torch.int32, *shape), scheme.bits)
    zeros = (zeros + scheme.zero_offset) & (2 * scheme.middle - 1)
    asymmetric = check_zeros(scheme, tensors, "qzeros", zeros)
    return weight_of(
        qweight.T,
        scales.T,
        zeros.T if asymmetric else None,
        groups,
        bits=scheme.bits,
        order=order_of(scheme, tensors, "g_idx", groups),
    )


def write(weight: Int4Weight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of one layer in 4 bits; K and N are multiples of 8."""
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, SYMMETRIC_ZERO, dtype=torch.uint8)
    return {
        "qweight": to_words(codes_in_order(weight)).T.contiguous(),
        "qzeros": to_words((zeros.T - scheme.zero_offset) & 0xF),
        "scales": weight.scales.T.contiguous(),
        "g_idx": group_index(weight),
    }
