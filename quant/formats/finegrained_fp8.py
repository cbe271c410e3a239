"""FP8 as DeepSeek and Qwen publish it (`quant_method: "fp8"`): a layer to a dense weight.

weight            float8_e4m3fn [N, K]
weight_scale_inv  float [N / rows, K / columns], one a block, of which the last may be smaller; or
                  one for all
activation_scale  float, by which activations are rounded where they are; not here

`weight_scale_inv` multiplies, as its name would not say. `transformers` takes the size of blocks
from the number of scales, which is another wherever they do not fill a weight.
"""

from collections.abc import Mapping
from typing import Any

from .fp8 import CODES, REQUIRED, features, read
from .keys import HARMLESS, block_of, refuse_unknown, require
from .scheme import Scheme

__all__ = ["CODES", "OPTIONAL", "RENAMED", "REQUIRED", "features", "parse_config", "read"]

OPTIONAL = ("activation_scale", "input_scale")
RENAMED = ((r"\.weight_scale_inv$", ".weight_scale"),)
_HONOURED = {"activation_scheme", "fmt", "quant_method", "weight_block_size"}
# Which layers are dense follows from the files.
_HARMLESS = HARMLESS | {"dequantize", "ignored_layers", "scale_fmt"}


def parse_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`; raises UnsupportedQuantization for other kinds."""
    where = "quantization_config"
    refuse_unknown(config, where, _HONOURED, _HARMLESS)
    require(config, where, "fmt", "e4m3", "float8_e4m3fn")
    require(config, where, "activation_scheme", "dynamic", "static")
    size = config.get("weight_block_size")
    block = None if size is None else block_of(size, f"{where}.weight_block_size")
    return Scheme(format="fp8", bits=8, symmetric=True, block=block)
