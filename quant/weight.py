"""One 4-bit weight, whatever checkpoint it came from, and the nibbles it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..vmem.errors import QuantError

SYMMETRIC_ZERO = 8  # the zero point of a weight that stores none


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte along the last dimension, the first in the low nibble.

    `codes` is an integer tensor [..., K] of values 0 to 15, K even; returns uint8 [..., K/2].
    """
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes of `pack`: uint8 [..., K/2] to uint8 [..., K]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Int4Weight:
    """The weight of a linear layer, in 4 bits an element, or in 8 as two of four (`int8`).

    Element (n, j) is `(codes[n, j] - zeros[n, g]) * scales[n, g]` with `g = j // group_size`. It
    belongs to input feature `j`, or to `permutation[j]` where the columns were sorted so that
    groups are contiguous (GPTQ's act-order). In 8 bits there are twice as many columns, the second
    half of them for the same inputs again, and an element is the sum of its two.

    Attributes:
        packed: uint8 [out_features, columns / 2], two codes a byte, low nibble first.
        scales: floating point [out_features, columns / group_size].
        zeros: uint8 [out_features, columns / group_size], values 0 to 15; None means 8.
        group_size: columns that share a scale; all inputs for one scale a row.
        permutation: int64 [in_features], or None for columns in their own order.
        bits: 4, or 8.

    Raises QuantError if shapes, types or the permutation contradict each other.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int
    permutation: torch.Tensor | None = None
    bits: int = 4

    def __post_init__(self) -> None:
        if self.packed.dtype != torch.uint8 or self.packed.dim() != 2:
            raise QuantError(f"packed codes are uint8 [N, K/2], not {_describe(self.packed)}")
        if self.group_size < 1 or self.in_features % self.group_size:
            raise QuantError(
                f"{self.in_features} input features do not divide into groups of {self.group_size}"
            )
        expected = (self.out_features, self.num_columns // self.group_size)
        if not self.scales.is_floating_point() or self.scales.shape != expected:
            raise QuantError(
                f"scales are floating point {list(expected)} for groups of {self.group_size}, "
                f"not {_describe(self.scales)}"
            )
        zeros = self.zeros
        if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != expected):
            raise QuantError(f"zeros are uint8 {list(expected)}, not {_describe(zeros)}")
        if self.bits == 8 and zeros is None:
            raise QuantError("a weight in 8 bits has zeros, since those of its halves differ")
        order = self.permutation
        if order is not None and (order.dtype != torch.int64 or order.shape != (self.in_features,)):
            raise QuantError(f"a permutation is int64 [{self.in_features}], not {_describe(order)}")

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        *,
        permutation: torch.Tensor | None = None,
    ) -> "Int4Weight":
        """From codes [N, K] of 0 to 15, one to an element; the group size follows from shapes."""
        if codes.dim() != 2 or scales.dim() != 2 or not scales.shape[1] or codes.shape[1] % 2:
            raise QuantError(
                "codes are [N, K] with K even, and scales [N, groups], not "
                f"{_describe(codes)} and {_describe(scales)}"
            )
        return cls(
            packed=pack(codes),
            scales=scales,
            zeros=zeros,
            group_size=codes.shape[1] // scales.shape[1],
            permutation=permutation,
        )

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def num_columns(self) -> int:
        return 2 * self.packed.shape[1]

    @property
    def in_features(self) -> int:
        return self.num_columns * 4 // self.bits

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales, zeros and permutation."""
        tensors = (self.packed, self.scales, self.zeros, self.permutation)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def codes(self) -> torch.Tensor:
        """The codes, one to an element: uint8 [N, K], columns in the order they are stored."""
        codes = unpack(self.packed)
        if self.bits == 4:
            return codes
        high, low = codes.chunk(2, dim=1)
        return (high << 4) | low

    def halves(self) -> "Int4Weight":
        """What kernels multiply by: every column an input of its own, in the stored order."""
        return replace(self, permutation=None, bits=4)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as [out_features, in_features] of `dtype`, in the order of the inputs.

        Products are taken in float32 (float64 if that is asked for) and rounded once.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        groups = self.codes().unflatten(1, (-1, self.group_size)).to(wide)  # [N, groups, group]
        scales, zeros = self.scales, self.zeros
        if self.bits == 8:
            assert zeros is not None
            high, low = zeros.chunk(2, dim=1)
            scales, zeros = scales.chunk(2, dim=1)[1], (high << 4) | low
        if zeros is None:
            groups -= SYMMETRIC_ZERO
        else:
            groups -= zeros.to(wide).unsqueeze(-1)
        groups *= scales.to(wide).unsqueeze(-1)
        weight = groups.flatten(1).to(dtype)
        if self.permutation is None:
            return weight
        ordered = torch.empty_like(weight)
        ordered[:, self.permutation] = weight
        return ordered

    def to(self, device: torch.device | str) -> "Int4Weight":
        """The same weight on another device."""
        return replace(
            self,
            packed=self.packed.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            permutation=None if self.permutation is None else self.permutation.to(device),
        )


def can_concatenate(first: Int4Weight, other: Int4Weight) -> bool:
    """Whether two weights can be one: the same bits, group size, and order of columns."""
    sizes = [(one.bits, one.group_size, one.in_features) for one in (first, other)]
    return sizes[0] == sizes[1] and _same_order(first.permutation, other.permutation)


def concatenate(weights: Sequence[Int4Weight]) -> Int4Weight:
    """One weight with the rows of all, for linears over the same input.

    Raises QuantError if they cannot be one (`can_concatenate`).
    """
    first = weights[0]
    if not all(can_concatenate(first, other) for other in weights[1:]):
        raise QuantError("weights with other groups or another order of columns cannot be one")
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        zeros = torch.cat([_stored_zeros(weight) for weight in weights])
    return replace(
        first,
        packed=torch.cat([weight.packed for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights]),
        zeros=zeros,
    )


def split(weight: Int4Weight, out_features: Sequence[int]) -> list[Int4Weight]:
    """The inverse of `concatenate`: weights of so many rows each, which share its memory."""
    sizes = list(out_features)
    zeros = [None] * len(sizes) if weight.zeros is None else weight.zeros.split(sizes)
    parts = zip(weight.packed.split(sizes), weight.scales.split(sizes), zeros, strict=True)
    return [replace(weight, packed=p, scales=s, zeros=z) for p, s, z in parts]


def _stored_zeros(weight: Int4Weight) -> torch.Tensor:
    if weight.zeros is not None:
        return weight.zeros
    return torch.full_like(weight.scales, SYMMETRIC_ZERO, dtype=torch.uint8)


def _same_order(first: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if first is None or other is None:
        return first is other
    return torch.equal(first, other)


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
