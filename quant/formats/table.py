"""The formats of checkpoints by name: what their configs say, and their readers and writers."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from ...vmem.errors import UnsupportedQuantization
from ..weight import Int4Weight
from . import awq, compressed_tensors, gptq
from .scheme import FormatName, LayerTensors, Scheme

_MODULES: dict[FormatName, ModuleType] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
}
_AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}


def parse_config(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a `quantization_config` describes, or None if another method wrote it.

    Raises UnsupportedQuantization for a kind of GPTQ, AWQ or compressed-tensors not read here.
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
    if method not in _MODULES:
        return None
    return _MODULES[method].parse_config(config)


def tensor_names(name: FormatName) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tensors that a layer must have, and those it may; the first marks a layer."""
    return _MODULES[name].REQUIRED, _MODULES[name].OPTIONAL


def features(scheme: Scheme, codes: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a layer, from the shape of the tensor that marks it, of two sizes."""
    return _MODULES[scheme.format].features(scheme, codes)


def read_layer(layer: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> Int4Weight:
    """The weight of the layer of that name from its tensors, by the last part of their names.

    Raises QuantError, which names the tensor that is missing or wrong.
    """
    return _MODULES[scheme.format].read(LayerTensors(layer, tensors), scheme)


def write_layer(weight: Int4Weight, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The inverse of `read_layer`, bit for bit."""
    return _MODULES[scheme.format].write(weight, scheme)
