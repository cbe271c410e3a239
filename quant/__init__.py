"""4-bit weights: checkpoints read into one canonical form, and the kernels that multiply by it."""

from ..vmem.errors import QuantError, UnsupportedQuantization
from .formats.scheme import FormatName, Scheme
from .linear import Int4Linear
from .loading import adopt, int4_linears
from .output_layer import Int8Linear, quantize_output
from .weight import Int4Weight, can_concatenate, concatenate, pack, split, unpack
from .weight_memory import empty_apart, trim_heap

__all__ = [
    "FormatName",
    "Int4Linear",
    "Int4Weight",
    "Int8Linear",
    "QuantError",
    "Scheme",
    "UnsupportedQuantization",
    "adopt",
    "can_concatenate",
    "concatenate",
    "empty_apart",
    "int4_linears",
    "pack",
    "quantize_output",
    "split",
    "trim_heap",
    "unpack",
]
