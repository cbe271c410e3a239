"""8-bit weights as two of four bits, which the 4-bit kernels multiply by.

With an unsigned code `16 high + low`, and its zero point likewise, `(code - zero) * scale` is
`(high - high_zero) * 16 scale` and `(low - low_zero) * scale`, exactly. So a weight of twice the
columns computes the product, over the inputs twice.
"""

import torch

from ..vmem.errors import QuantError
from .weight import Int4Weight, pack

SYMMETRIC_ZERO_8 = 128  # the zero point of 8-bit codes that are a signed value plus 128


def int8_weight(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    permutation: torch.Tensor | None = None,
) -> Int4Weight:
    """The weight `(code - zero) * scale`, for an `Int4Linear` like any other.

    Args:
        codes: uint8 [out_features, in_features], or int8 values, which are codes less 128.
        scales: floating point [out_features, groups].
        zeros: uint8 [out_features, groups]; None means 128, so that int8 values are the weight.
        permutation: int64 [in_features], of the columns, as in `Int4Weight`.

    Raises QuantError if shapes or types contradict each other.
    """
    if codes.dtype == torch.int8:
        codes = codes.view(torch.uint8) ^ 0x80  # two's complement plus 128
    if codes.dtype != torch.uint8 or codes.dim() != 2 or scales.dim() != 2 or not scales.shape[1]:
        raise QuantError(
            "8-bit codes are uint8 or int8 [N, K], and scales [N, groups], not "
            f"{codes.dtype} {list(codes.shape)} and {list(scales.shape)}"
        )
    if zeros is None:
        zeros = torch.full_like(scales, SYMMETRIC_ZERO_8, dtype=torch.uint8)
    wide = scales.double() if scales.dtype == torch.float64 else scales.float()
    return Int4Weight(
        packed=pack(torch.cat((codes >> 4, codes & 0xF), dim=1)),
        scales=torch.cat((16 * wide, wide), dim=1),
        zeros=torch.cat((zeros >> 4, zeros & 0xF), dim=1),
        group_size=codes.shape[1] // scales.shape[1],
        permutation=permutation,
        bits=8,
    )
