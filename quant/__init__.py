"""4-bit weights: checkpoints read into one canonical form, and the kernels that multiply by it."""

from .errors import QuantError, UnsupportedQuantization
from .weight import Int4Weight, concatenate, pack, unpack

__all__ = [
    "Int4Weight",
    "QuantError",
    "UnsupportedQuantization",
    "concatenate",
    "pack",
    "unpack",
]
