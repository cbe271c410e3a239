"""Codes in int32 words, the first in the lowest bits: how most checkpoints store them.

On a little-endian machine the bytes of words of 4-bit codes are `pack`'s: two codes a byte, low one
first. Those of 8-bit codes are the codes.
"""

import torch

from ..weight import pack, unpack


def codes_per_word(bits: int) -> int:
    """How many codes of 4 or 8 bits there are in a word."""
    return 32 // bits


def to_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 0 to 15, [..., 8 n], as int32 [..., n]."""
    return pack(codes).contiguous().view(torch.int32)


def from_words(words: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """int32 [..., n] as codes uint8 [..., 32 n / bits]."""
    bytes_ = words.contiguous().view(torch.uint8)
    return unpack(bytes_) if bits == 4 else bytes_
