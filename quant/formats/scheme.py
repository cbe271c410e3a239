"""What a checkpoint's config says of its quantised weights, and the tensors of one layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal, TypeAlias

import torch

from ...vmem.errors import QuantError, UnsupportedQuantization
from ..int8 import int8_weight
from ..weight import Int4Weight, pack
from .int32_words import from_words

FormatName = Literal["gptq", "awq", "compressed-tensors"]  # which are written, too
ReadFormat: TypeAlias = (
    FormatName
    | Literal[
        "compressed-tensors-int8",
        "compressed-tensors-fp8",
        "fp8",
        "bitsandbytes",
        "bitsandbytes-4bit",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the layers of a checkpoint are stored.

    Attributes:
        format: whose tensors they are.
        bits: 4 or 8, of a code.
        zero_offset: what the stored zeros lack: 1 in GPTQ's first version.
        group_size: columns that share a scale; None for one scale a row.
        symmetric: True if all zeros are the middle code; None if the config says nothing, and the
            zeros all.
        act_order: whether columns were dealt to groups out of order; None as above.
        block: rows and columns that share a scale, instead of groups.
        rounds_kv: keys and values were to be rounded too, and the checkpoint has their scales.
    """

    format: ReadFormat
    bits: int = 4
    zero_offset: int = 0
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool | None = None
    block: tuple[int, int] | None = None
    rounds_kv: bool = False

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight."""
        return 1 << (self.bits - 1)


class LayerTensors:
    """The tensors of one quantised layer, by the last part of their names.

    Every access checks; the errors name the tensor in full.
    """

    def __init__(self, layer: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.layer = layer
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str, dtype: torch.dtype | None, *shape: int | None) -> torch.Tensor:
        """The tensor of that name; `dtype` None is any floating point, and None any size.

        Raises QuantError if it is missing or otherwise.
        """
        tensor = self.any_of(name)
        right_type = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        sizes = zip(tensor.shape, shape, strict=False)
        right_shape = tensor.dim() == len(shape) and all(b is None or a == b for a, b in sizes)
        if not right_type or not right_shape:
            expected = "floating point" if dtype is None else str(dtype).removeprefix("torch.")
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise QuantError(
                f"tensor {self.layer}.{name} is {str(tensor.dtype).removeprefix('torch.')} "
                f"{list(tensor.shape)}, and should be {expected} [{wanted}]"
            )
        return tensor

    def any_of(self, name: str) -> torch.Tensor:
        """The tensor of that name, of any type and shape. Raises QuantError if it is missing."""
        if name not in self._tensors:
            raise QuantError(f"tensor {self.layer}.{name} is missing")
        return self._tensors[name]

    def is_single(self, name: str) -> bool:
        """Whether the tensor of that name has one number, in any shape."""
        return self.any_of(name).numel() == 1

    def single(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        """The tensor of that name, as [1, 1]. Raises QuantError as `get` does."""
        return self.get(name, dtype, *([1] * self.any_of(name).dim())).reshape(1, 1)

    def refuse(self, name: str, why: str) -> QuantError:
        """The error for a tensor whose values are wrong."""
        return QuantError(f"tensor {self.layer}.{name} {why}")

    def finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, if all of it is finite."""
        if not torch.isfinite(tensor).all():
            raise self.refuse(name, "holds values that are not finite")
        return tensor


def require_bits(bits: Any, where: str, *allowed: int) -> int:
    """The bits of a code; raises UnsupportedQuantization for others than those allowed."""
    if isinstance(bits, bool) or bits not in allowed:
        read = " and ".join(f"{some}-bit" for some in allowed)
        raise UnsupportedQuantization(
            f"{where} is {bits!r}, and only {read} weights are read; use a {read.split()[0]} "
            "checkpoint"
        )
    return bits


@dataclass(frozen=True)
class Groups:
    """The groups of a layer's columns, as its checkpoint's config says.

    Attributes:
        size: columns of a group; the last may be shorter.
        even: columns of the groups they are read as, all alike: a short last group is a whole
            one of these, and every other some.
        columns: of the layer.
    """

    size: int
    even: int
    columns: int

    @property
    def num_stored(self) -> int:
        return -(-self.columns // self.size)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Scales or zeros [N, num_stored] as [N, columns / even], each value unchanged."""
        if self.even == self.size:
            return values.contiguous()
        repeated = values.repeat_interleave(self.size // self.even, dim=1)
        return repeated[:, : self.columns // self.even].contiguous()


def groups_of(
    scheme: Scheme, columns: int, tensors: LayerTensors, name: str, stored: int, *, short: bool
) -> Groups:
    """The groups of a layer with `stored` of them in its tensor `name`.

    `short` says whether the format knows of a last group that is shorter than the others. Raises
    QuantError if config and tensors disagree.
    """
    size = columns if scheme.group_size is None else scheme.group_size
    groups = Groups(size=size, even=gcd(size, columns), columns=columns)
    stated = "whole rows" if scheme.group_size is None else f"groups of {size}"
    if stored != groups.num_stored:
        raise tensors.refuse(
            name,
            f"has {stored} groups for {columns} input features, and the config's {stated} make "
            f"{groups.num_stored}; use weights and config.json of one checkpoint",
        )
    if groups.even % 2 or (columns % size and not short):
        raise tensors.refuse(
            name,
            f"is of {columns} input features, which the config's {stated} do not divide; use a "
            "checkpoint whose group size does",
        )
    return groups


def check_zeros(scheme: Scheme, tensors: LayerTensors, name: str, zeros: torch.Tensor) -> bool:
    """Whether any zero is not the middle code; raises QuantError if the config says none is."""
    symmetric = bool((zeros == scheme.middle).all())
    if scheme.symmetric and not symmetric:
        raise tensors.refuse(
            name,
            "holds zero points, and the config says that weights are symmetric; use weights and "
            "config.json of one checkpoint",
        )
    return not symmetric


def order_of(
    scheme: Scheme, tensors: LayerTensors, name: str, groups: Groups
) -> torch.Tensor | None:
    """The order of columns, int64 [K], in which groups are contiguous; None if they are.

    The tensor `name`, int32 [K], has the group of each column (GPTQ's act-order). Raises QuantError
    if it contradicts the groups, or the config.
    """
    if name not in tensors:
        if scheme.act_order and groups.num_stored > 1:
            raise tensors.refuse(name, "is missing, and the config says that columns are reordered")
        return None
    index = tensors.get(name, torch.int32, groups.columns).long()
    in_order = torch.arange(groups.columns, device=index.device) // groups.size
    if torch.equal(index, in_order):
        return None
    if scheme.act_order is False:
        raise tensors.refuse(
            name,
            "deals columns to groups out of order, and the config says that none are reordered; "
            "use weights and config.json of one checkpoint",
        )
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order], in_order):
        raise tensors.refuse(
            name, f"does not deal the columns evenly to {groups.num_stored} groups"
        )
    return order


def weight_of(
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    groups: Groups,
    *,
    bits: int,
    order: torch.Tensor | None = None,
) -> Int4Weight:
    """The weight of a layer: words int32 [N, words], scales and zeros [N, stored groups].

    `order` is that of the columns, which are stored as the inputs are.
    """
    scales = groups.spread(scales)
    zeros = None if zeros is None else groups.spread(zeros)
    if bits == 4 and order is None:
        packed = words.contiguous().view(torch.uint8)
    else:
        codes = from_words(words, bits)
        codes = codes if order is None else codes[:, order]
        if bits == 8:
            return int8_weight(codes, scales, zeros, permutation=order)
        packed = pack(codes)
    return Int4Weight(
        packed=packed, scales=scales, zeros=zeros, group_size=groups.even, permutation=order
    )


def group_index(weight: Int4Weight) -> torch.Tensor:
    """The group of each input feature, int32 [K]: the inverse of `order_of`."""
    columns = torch.arange(weight.in_features, device=weight.packed.device)
    groups = (columns // weight.group_size).to(torch.int32)
    if weight.permutation is None:
        return groups
    ordered = torch.empty_like(groups)
    ordered[weight.permutation] = groups
    return ordered


def codes_in_order(weight: Int4Weight) -> torch.Tensor:
    """Codes [N, K] in the order of the input features, as checkpoints store them."""
    codes = weight.codes()
    if weight.permutation is None:
        return codes
    ordered = torch.empty_like(codes)
    ordered[:, weight.permutation] = codes
    return ordered
