"""4-bit weights: checkpoints read into one canonical form, and the kernels that multiply by it."""

from .errors import QuantError, UnsupportedQuantization
from .linear import Int4Linear
from .loading import adopt, int4_linears
from .scheme import FormatName, Scheme
from .weight import Int4Weight, concatenate, pack, unpack

__all__ = [
    "FormatName",
    "Int4Linear",
    "Int4Weight",
    "QuantError",
    "Scheme",
    "UnsupportedQuantization",
    "adopt",
    "concatenate",
    "int4_linears",
    "pack",
    "unpack",
]
