"""GPTQ checkpoints (AutoGPTQ, GPTQModel, auto-round): a layer's tensors to `Int4Weight` and back.

    qweight  int32 [K/8, N]       eight rows a word, the first in the lowest bits
    qzeros   int32 [groups, N/8]  eight columns a word; less one in the first version
    scales   float [groups, N]
    g_idx    int32 [K]            the group of each row; may be absent without act-order

The first version stores zeros less one, so that a zero of 0 wraps to 15. It is read back as 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...vmem.errors import UnsupportedQuantization
from ..weight import SYMMETRIC_ZERO, Int4Weight, pack
from .int32_words import CODES_PER_WORD, from_words, to_words
from .scheme import LayerTensors, Scheme, codes_in_order, group_index, require_bits, sort_groups

REQUIRED = ("qweight", "qzeros", "scales")
OPTIONAL = ("g_idx",)
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def parse_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`; raises UnsupportedQuantization for other kinds."""
    require_bits(config.get("bits"), "quantization_config.bits")
    if config.get("dynamic"):
        raise UnsupportedQuantization(
            "quantization_config.dynamic gives layers schemes of their own, which are not read; "
            "use a checkpoint with one scheme"
        )
    kind = config.get("checkpoint_format") or config.get("format") or "gptq"
    if kind not in _ZERO_OFFSETS:
        raise UnsupportedQuantization(
            f"quantization_config.checkpoint_format is {kind!r}; there are readers for "
            f"{', '.join(_ZERO_OFFSETS)}"
        )
    return Scheme(format="gptq", zero_offset=_ZERO_OFFSETS[kind])


def features(qweight: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a layer whose `qweight` has this shape."""
    return qweight[1], qweight[0] * CODES_PER_WORD


def read(tensors: LayerTensors, scheme: Scheme) -> Int4Weight:
    """The weight of one layer; raises QuantError, which names the tensor."""
    qweight = tensors.get("qweight", torch.int32, None, None)
    out_features, in_features = features(qweight.shape)
    scales = tensors.finite("scales", tensors.get("scales", None, None, out_features))
    groups = scales.shape[0]
    if not groups or in_features % groups:
        raise tensors.refuse("scales", f"has {groups} groups for {in_features} input features")
    shape = (groups, out_features // CODES_PER_WORD)
    zeros = (from_words(tensors.get("qzeros", torch.int32, *shape)) + scheme.zero_offset) & 0xF
    packed, order = qweight.T.contiguous().view(torch.uint8), None  # [N, K/2]
    if "g_idx" in tensors:
        index = tensors.get("g_idx", torch.int32, in_features)
        codes, order = sort_groups(from_words(qweight.T), index, tensors, "g_idx", groups)
        packed = packed if order is None else pack(codes)
    return Int4Weight(
        packed=packed,
        scales=scales.T.contiguous(),
        zeros=None if (zeros == SYMMETRIC_ZERO).all() else zeros.T.contiguous(),
        group_size=in_features // groups,
        permutation=order,
    )


def write(weight: Int4Weight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of one layer; K and N are multiples of 8."""
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, SYMMETRIC_ZERO, dtype=torch.uint8)
    return {
        "qweight": to_words(codes_in_order(weight)).T.contiguous(),
        "qzeros": to_words((zeros.T - scheme.zero_offset) & 0xF),
        "scales": weight.scales.T.contiguous(),
        "g_idx": group_index(weight),
    }
