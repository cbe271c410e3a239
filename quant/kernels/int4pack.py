"""PyTorch's own 4-bit product on a CPU, for few rows; what the others fall back to."""

import torch

from ..weight import SYMMETRIC_ZERO, Int4Weight
from .table import Int4Kernel

_GROUP_SIZES = (32, 64, 128, 256)
_MAX_ROWS = 12  # beyond, dequantising and oneDNN's product are faster
_COLUMNS = 16  # N is a multiple of it


class Int4PackKernel(Int4Kernel):
    """`aten::_weight_int4pack_mm_for_cpu`: bfloat16, a dequantised code is (code - 8) s + z."""

    name = "int4pack"

    @classmethod
    def unavailable_reason(cls) -> str | None:
        if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            return None
        return "this PyTorch has no _weight_int4pack_mm_for_cpu"

    def accepts(
        self, weight: Int4Weight, device: torch.device, dtype: torch.dtype, num_rows: int
    ) -> bool:
        right_type = device.type == "cpu" and dtype == torch.bfloat16
        right_shape = weight.group_size in _GROUP_SIZES and weight.out_features % _COLUMNS == 0
        return right_type and right_shape and num_rows <= _MAX_ROWS

    def prepare(self, weight: Int4Weight) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed codes, and bfloat16 scales and zeros [groups, N, 2]."""
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes().int(), 1)
        scales = weight.scales.float()
        shifts = torch.zeros_like(scales)
        if weight.zeros is not None:
            shifts = scales * (SYMMETRIC_ZERO - weight.zeros.float())
        both = torch.stack((scales, shifts), dim=-1).transpose(0, 1)
        return packed, both.to(torch.bfloat16).contiguous()

    def multiply(
        self, layout: tuple[torch.Tensor, torch.Tensor], inputs: torch.Tensor
    ) -> torch.Tensor:
        packed, scales = layout
        if not inputs.shape[0]:
            return inputs.new_empty(0, scales.shape[1])
        group_size = inputs.shape[1] // scales.shape[0]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            inputs.contiguous(), packed, group_size, scales
        )
