"""4-bit weights: checkpoints read into one canonical form, and the kernels that multiply by it.

What reads checkpoints is loaded when first used: `transformers` comes with it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ..vmem.errors import QuantError, UnsupportedQuantization
from .experts import Expert, Experts
from .formats.scheme import FormatName, Scheme
from .int8 import int8_weight
from .linear import Int4Linear
from .output_layer import quantize_output
from .weight import Int4Weight, can_concatenate, concatenate, pack, split, unpack
from .weight_memory import empty_apart, trim_heap

if TYPE_CHECKING:
    from .loading import adopt, int4_linears

__all__ = [
    "Expert",
    "Experts",
    "FormatName",
    "Int4Linear",
    "Int4Weight",
    "QuantError",
    "Scheme",
    "UnsupportedQuantization",
    "adopt",
    "can_concatenate",
    "concatenate",
    "empty_apart",
    "int4_linears",
    "int8_weight",
    "pack",
    "quantize_output",
    "split",
    "trim_heap",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in ("adopt", "int4_linears"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".loading", __name__), name)
