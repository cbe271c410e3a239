"""bitsandbytes in 8 bits (`LLM.int8()`): a layer to a weight in 8 bits.

weight         int8 [N, K]
SCB            float32 [N]    the largest of each row, which stands for 127
weight_format  uint8 []       0 for rows in order, the only one there has been since version 0.45

Outliers among activations, which bitsandbytes multiplies by more exact weights, need nothing of
their own where no activation is rounded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...vmem.errors import UnsupportedQuantization
from ..int8 import int8_weight
from ..weight import Int4Weight
from .keys import refuse_unknown
from .scheme import LayerTensors, Scheme

CODES = "weight"
REQUIRED = ("SCB", "weight")
OPTIONAL = ("weight_format",)
_HONOURED = {
    "_load_in_4bit",
    "_load_in_8bit",
    "bnb_4bit_quant_type",  # which each layer says itself, as it does the next
    "bnb_4bit_use_double_quant",
    "load_in_4bit",
    "load_in_8bit",
    "quant_method",
}
_HARMLESS = {
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",  # the type that bytes are stored as
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",  # of training
    "llm_int8_skip_modules",  # which the files show
    "llm_int8_threshold",
}


def parse_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`, of this file's kind or of `bitsandbytes_4bit`'s."""
    where = "quantization_config"
    refuse_unknown(config, where, _HONOURED, _HARMLESS)
    four = bool(config.get("load_in_4bit", config.get("_load_in_4bit")))
    eight = bool(config.get("load_in_8bit", config.get("_load_in_8bit")))
    if four == eight:
        raise UnsupportedQuantization(
            f"{where} has load_in_4bit={four} and load_in_8bit={eight}, of which one is expected; "
            "use the config.json that was written with the weights"
        )
    if four:
        return Scheme(format="bitsandbytes-4bit")
    return Scheme(format="bitsandbytes", bits=8, symmetric=True)


def features(scheme: Scheme, weight: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs of a layer whose `weight` has this shape."""
    return weight[0], weight[1]


def read(tensors: LayerTensors, scheme: Scheme) -> Int4Weight:
    """The weight of one layer; raises QuantError, which names the tensor."""
    values = tensors.get("weight", torch.int8, None, None)
    largest = tensors.finite("SCB", tensors.get("SCB", None, len(values)))
    if "weight_format" in tensors and (kind := int(tensors.single("weight_format", torch.uint8))):
        raise tensors.refuse(
            "weight_format",
            f"is {kind}, a GPU's order of rows; save the model again, by a newer bitsandbytes",
        )
    return int8_weight(values, largest.float().unsqueeze(1) / 127)
