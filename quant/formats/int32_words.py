"""Eight codes in an int32, the first in the lowest bits: how all checkpoints store them.

On a little-endian machine the bytes of such words are `pack`'s: two codes a byte, low one first.
"""

import torch

from ..weight import pack, unpack

CODES_PER_WORD = 8


def to_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 0 to 15, [..., 8 n], as int32 [..., n]."""
    return pack(codes).contiguous().view(torch.int32)


def from_words(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., n] as codes uint8 [..., 8 n]."""
    return unpack(words.contiguous().view(torch.uint8))
