"""2:4 sparsity with 4-bit codes: two weights of every four, in 3 bits an element. Experimental.

Half the codes and two bits of place for each that is kept: a quarter less to read than dense
4-bit weights. No kernel here reads this form directly. On a GPU the weight is dequantised into
PyTorch's semi-structured tensors, which multiply at up to twice the dense rate where products are
limited by arithmetic, and read more bytes than dense 4-bit weights where they are limited by
memory. It has not been measured faster than anything, so no model is run this way.

Sources: Sparse-MARLIN, arXiv:2408.11743, section 5; SparseGPT, arXiv:2301.00774.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from ..vmem.errors import QuantError
from .quantise.gptq import Hessian, gptq
from .quantise.rounding import Rounding, round_to_nearest
from .weight import SYMMETRIC_ZERO, Int4Weight, pack, unpack


@dataclass(frozen=True, kw_only=True, eq=False)
class Sparse24Weight:
    """A symmetric 4-bit weight of which every four adjacent columns keep two at most.

    Attributes:
        packed: uint8 [N, K/4], the kept codes, two a byte, the first in the low nibble.
        places: uint8 [N, K/8], two bits for each kept code, its column among the four; the first
            in the lowest bits. Within four columns places ascend.
        scales: floating point [N, K / group_size].
        group_size: columns of the dense weight that share a scale.
    """

    packed: torch.Tensor
    places: torch.Tensor
    scales: torch.Tensor
    group_size: int

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        return 4 * self.packed.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.packed.nbytes + self.places.nbytes + self.scales.nbytes

    def unpack(self) -> Int4Weight:
        """The same weight with its zeros, exactly."""
        kept = unpack(self.packed).unflatten(1, (-1, 2))  # [N, K/4, 2]
        shifts = torch.arange(0, 8, 2, device=self.places.device)
        places = (self.places.unsqueeze(-1) >> shifts) & 3  # [N, K/8, 4]
        codes = torch.full(
            (self.out_features, self.in_features // 4, 4),
            SYMMETRIC_ZERO,
            dtype=torch.uint8,
            device=self.packed.device,
        )
        codes.scatter_(2, places.view_as(kept).long(), kept)
        return Int4Weight(
            packed=pack(codes.flatten(1)),
            scales=self.scales,
            zeros=None,
            group_size=self.group_size,
        )

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., K] by the dequantised weight, in the inputs' dtype: the reference."""
        return functional.linear(inputs, self.unpack().dequantize(inputs.dtype))


def pack_sparse(weight: Int4Weight) -> Sparse24Weight:
    """The two codes that count of every four, and where they stand; `unpack` is the inverse.

    Raises QuantError unless the weight is symmetric, in its own column order, with a multiple of
    8 columns, and zero in two of every four.
    """
    if weight.zeros is not None or weight.permutation is not None:
        raise QuantError("2:4 packing takes symmetric weights without a permutation")
    if weight.in_features % 8:
        raise QuantError(f"2:4 packing takes a multiple of 8 columns, not {weight.in_features}")
    codes = weight.codes().unflatten(1, (-1, 4))  # [N, K/4, 4]
    counts = codes != SYMMETRIC_ZERO
    if bool((counts.sum(-1) > 2).any()):
        row, quad = torch.nonzero(counts.sum(-1) > 2)[0].tolist()
        raise QuantError(
            f"row {row} has more than two values in columns {4 * quad} to {4 * quad + 3}; prune "
            "it first, with `prune_magnitude` or `gptq(..., sparse=True)`"
        )
    # Those that count first, each lot in its own order; then the two by place.
    order = torch.argsort((~counts).to(torch.uint8), dim=-1, stable=True)[..., :2]
    places = order.sort(dim=-1).values
    kept = codes.gather(2, places)
    bits = places.to(torch.uint8).flatten(1).unflatten(1, (-1, 4))  # [N, K/8, 4]
    shifts = torch.arange(0, 8, 2, device=bits.device)
    return Sparse24Weight(
        packed=pack(kept.flatten(1)),
        places=(bits << shifts).sum(-1).to(torch.uint8),
        scales=weight.scales,
        group_size=weight.group_size,
    )


def prune_magnitude(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [N, K] with the two smallest of every four adjacent columns set to 0.

    Raises QuantError if K is no multiple of 4.
    """
    if weight.shape[1] % 4:
        raise QuantError(f"2:4 sparsity takes a multiple of 4 columns, not {weight.shape[1]}")
    quads = weight.unflatten(1, (-1, 4))
    largest = quads.abs().topk(2, dim=-1).indices
    return torch.zeros_like(quads).scatter_(2, largest, quads.gather(2, largest)).flatten(1)


def quantize_sparse(
    weight: torch.Tensor, rounding: Rounding, hessian: Hessian | None = None
) -> Sparse24Weight:
    """Prune `weight` [N, K] to 2:4 and quantise what is left.

    With a Hessian both are done column by column, and every error, of pruning as of rounding, is
    made up for by the columns to come (SparseGPT with GPTQ); without one, the smallest go.
    """
    if not rounding.symmetric:
        raise QuantError("2:4 sparsity needs a symmetric rounding, whose grid holds zero")
    if weight.shape[1] % 8:
        raise QuantError(f"2:4 packing takes a multiple of 8 columns, not {weight.shape[1]}")
    if hessian is None:
        return pack_sparse(round_to_nearest(prune_magnitude(weight), rounding))
    return pack_sparse(gptq(weight, hessian, rounding, sparse=True))


def semi_structured(weight: Sparse24Weight, dtype: torch.dtype) -> torch.Tensor:
    """The dequantised weight as PyTorch's semi-structured sparse tensor [N, K], on its GPU.

    `functional.linear(inputs, result)` then runs on sparse tensor cores. Takes an NVIDIA GPU since
    Ampere, float16 or bfloat16, and sides that are multiples of 64; raises QuantError otherwise.
    """
    if weight.packed.device.type != "cuda":
        raise QuantError("semi-structured products need an NVIDIA GPU; `multiply` runs anywhere")
    if dtype not in (torch.float16, torch.bfloat16):
        raise QuantError(f"semi-structured products take float16 or bfloat16, not {dtype}")
    if weight.out_features % 64 or weight.in_features % 64:
        raise QuantError(
            "semi-structured products take sides that are multiples of 64, not "
            f"[{weight.out_features}, {weight.in_features}]"
        )
    return torch.sparse.to_sparse_semi_structured(weight.unpack().dequantize(dtype))
