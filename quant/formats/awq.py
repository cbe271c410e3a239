"""AWQ checkpoints of the `gemm` version: a layer's tensors to `Int4Weight` and back.

qweight  int32 [K, N/8]       eight columns a word, in the order 0 2 4 6 1 3 5 7
qzeros   int32 [groups, N/8]  in the same order
scales   float [groups, N]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...vmem.errors import QuantError, UnsupportedQuantization
from ..weight import SYMMETRIC_ZERO, Int4Weight, pack
from .int32_words import codes_per_word, from_words, to_words
from .keys import (
    HARMLESS,
    group_size,
    refuse_activations,
    refuse_mixed,
    refuse_unknown,
    require,
)
from .scheme import LayerTensors, Scheme, check_zeros, groups_of, require_bits

CODES = "qweight"
REQUIRED = ("qweight", "qzeros", "scales")
OPTIONAL = ()
_HONOURED = {
    "backend",
    "bits",
    "data_type",
    "desc_act",
    "format",
    "group_size",
    "pack_dtype",
    "q_group_size",
    "quant_method",
    "sym",  # transformers writes it beside zero_point, which counts
    "version",
    "w_bit",
    "zero_point",
}
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # the column of each nibble, lowest first
_PLACES = torch.argsort(_ORDER)  # the nibble of each column


def parse_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`; raises UnsupportedQuantization for other kinds."""
    where = "quantization_config"
    require_bits(config.get("bits", config.get("w_bit")), f"{where}.bits", 4)
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if version != "gemm":
        raise UnsupportedQuantization(
            f"{where}.version is {version!r}; there is a reader for 'gemm'"
        )
    known = refuse_activations(config, where) | refuse_mixed(config, where)
    require(config, where, "backend", "auto", "autoawq", "auto_awq", "gptqmodel")  # not llm-awq
    require(config, where, "data_type", "int")
    require(config, where, "desc_act")
    require(config, where, "pack_dtype", "int32", "torch.int32")
    refuse_unknown(config, where, _HONOURED | known, HARMLESS | {"scale_dtype"})
    size = config.get("group_size", config.get("q_group_size"))
    points = config.get("zero_point")
    return Scheme(
        format="awq",
        group_size=group_size(size, f"{where}.group_size"),
        symmetric=config.get("sym") if points is None else not points,
    )


def features(scheme: Scheme, qweight: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a layer whose `qweight` has this shape."""
    return qweight[1] * codes_per_word(scheme.bits), qweight[0]


def read(tensors: LayerTensors, scheme: Scheme) -> Int4Weight:
    """The weight of one layer; raises QuantError, which names the tensor."""
    qweight = tensors.get("qweight", torch.int32, None, None)
    out_features, in_features = features(scheme, qweight.shape)
    scales = tensors.finite("scales", tensors.get("scales", None, None, out_features))
    stored = scales.shape[0]
    groups = groups_of(scheme, in_features, tensors, "scales", stored, short=False)
    zeros = _from_awq(tensors.get("qzeros", torch.int32, stored, qweight.shape[1]))
    asymmetric = check_zeros(scheme, tensors, "qzeros", zeros)
    return Int4Weight(
        packed=pack(_from_awq(qweight).T),
        scales=groups.spread(scales.T),
        zeros=groups.spread(zeros.T) if asymmetric else None,
        group_size=groups.even,
    )


def write(weight: Int4Weight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of one layer; N is a multiple of 8. Raises QuantError for a permutation."""
    if weight.permutation is not None:
        raise QuantError("AWQ has no place for a permutation; write GPTQ instead")
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, SYMMETRIC_ZERO, dtype=torch.uint8)
    return {
        "qweight": _to_awq(weight.codes().T),
        "qzeros": _to_awq(zeros.T),
        "scales": weight.scales.T.contiguous(),
    }


def _from_awq(words: torch.Tensor) -> torch.Tensor:
    places = _PLACES.to(words.device)
    return from_words(words).unflatten(-1, (-1, len(_ORDER)))[..., places].flatten(-2)


def _to_awq(codes: torch.Tensor) -> torch.Tensor:
    order = _ORDER.to(codes.device)
    return to_words(codes.unflatten(-1, (-1, len(_ORDER)))[..., order].flatten(-2))
