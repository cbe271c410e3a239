"""The formats of checkpoints by name: what their configs say, and their readers and writers."""

import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from ...vmem.errors import UnsupportedQuantization
from ..weight import Int4Weight
from . import (
    awq,
    bitsandbytes,
    bitsandbytes_4bit,
    compressed_tensors,
    finegrained_fp8,
    fp8,
    gptq,
    int8,
)
from .scheme import LayerTensors, ReadFormat, Scheme

_MODULES: dict[ReadFormat, ModuleType] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "compressed-tensors-int8": int8,
    "compressed-tensors-fp8": fp8,
    "fp8": finegrained_fp8,
    "bitsandbytes": bitsandbytes,
    "bitsandbytes-4bit": bitsandbytes_4bit,
}
_METHODS = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8")
_AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}


def parse_config(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a `quantization_config` describes, or None if another method wrote it.

    Raises UnsupportedQuantization for a kind of a known method that is not read here.
    """
    method = config.get("quant_method")
    if method == "auto-round":
        packing = config.get("packing_format")
        if packing not in _AUTO_ROUND:
            raise UnsupportedQuantization(
                f"quantization_config.packing_format is {packing!r}; of auto-round's there are "
                f"readers for {', '.join(_AUTO_ROUND)}"
            )
        method = _AUTO_ROUND[packing]
        config = {key: value for key, value in config.items() if key != "packing_format"}
    if method not in _METHODS:
        return None
    return _MODULES[method].parse_config(config)


def tensor_names(name: ReadFormat) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tensors that a layer must have, and those it may; the first marks a layer."""
    return _MODULES[name].REQUIRED, _MODULES[name].OPTIONAL


def renamings(name: ReadFormat) -> tuple[tuple[str, str], ...]:
    """Patterns of tensors' names in the files, and what to read in place of what they match."""
    return getattr(_MODULES[name], "RENAMED", ())


def renamed(full_name: str, name: ReadFormat) -> str:
    """What to read in place of a tensor's name in the files."""
    for pattern, replacement in renamings(name):
        full_name = re.sub(pattern, replacement, full_name)
    return full_name


def codes_name(name: ReadFormat) -> str:
    """The tensor that has a layer's codes."""
    return _MODULES[name].CODES


def features(scheme: Scheme, codes: Sequence[int]) -> tuple[int, int] | None:
    """Outputs and inputs of a layer, from the shape of its codes; None if that does not say."""
    return _MODULES[scheme.format].features(scheme, codes)


def read_layer(
    layer: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme
) -> Int4Weight | torch.Tensor:
    """The weight of the layer of that name from its tensors, by the last part of their names.

    What has no integers for codes is dense, float32 [out_features, in_features].

    Raises QuantError, which names the tensor that is missing or wrong.
    """
    return _MODULES[scheme.format].read(LayerTensors(layer, tensors), scheme)


def write_layer(weight: Int4Weight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The inverse of `read_layer`, bit for bit, of formats in 4 bits that can be quantised to."""
    return _MODULES[scheme.format].write(weight, scheme)
