"""What a checkpoint's config says of its 4-bit weights, and the tensors of one layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...vmem.errors import QuantError, UnsupportedQuantization
from ..weight import Int4Weight

FormatName = Literal["gptq", "awq", "compressed-tensors"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the layers of a checkpoint are stored.

    Attributes:
        format: whose tensors they are.
        zero_offset: what the stored zeros lack: 1 in GPTQ's first version.
    """

    format: FormatName
    zero_offset: int = 0


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
        if name not in self._tensors:
            raise QuantError(f"tensor {self.layer}.{name} is missing")
        tensor = self._tensors[name]
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

    def refuse(self, name: str, why: str) -> QuantError:
        """The error for a tensor whose values are wrong."""
        return QuantError(f"tensor {self.layer}.{name} {why}")

    def finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, if all of it is finite."""
        if not torch.isfinite(tensor).all():
            raise self.refuse(name, "holds values that are not finite")
        return tensor


def require_bits(bits: Any, where: str) -> None:
    """Refuse all but four bits."""
    if bits != 4:
        raise UnsupportedQuantization(
            f"{where} is {bits!r}, and only 4-bit weights are read; use a 4-bit checkpoint"
        )


def sort_groups(
    codes: torch.Tensor, group_index: torch.Tensor, tensors: LayerTensors, name: str, groups: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Columns sorted so that groups are contiguous, and their order; None if they were.

    `codes` is [N, K] and `group_index`, int32 [K], the group of each column (GPTQ's act-order).
    """
    num_columns = codes.shape[1]
    in_order = torch.arange(num_columns, device=codes.device) // (num_columns // groups)
    if torch.equal(group_index.long(), in_order):
        return codes, None
    order = torch.argsort(group_index, stable=True)
    if not torch.equal(group_index[order].long(), in_order):
        raise tensors.refuse(name, f"does not deal the columns evenly to {groups} groups")
    return codes[:, order], order


def group_index(weight: Int4Weight) -> torch.Tensor:
    """The group of each input feature, int32 [K]: the inverse of `sort_groups`."""
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
