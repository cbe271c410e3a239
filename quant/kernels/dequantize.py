"""The product by the dequantised weight: right on every device, for every dtype, and slow."""

import torch
from torch.nn import functional

from ..weight import Int4Weight
from .table import Int4Kernel


class DequantizeKernel(Int4Kernel):
    """Dequantises the whole weight at every call and hands it to the dense library."""

    name = "dequantize"

    def accepts(
        self, weight: Int4Weight, device: torch.device, dtype: torch.dtype, num_rows: int
    ) -> bool:
        return True

    def prepare(self, weight: Int4Weight) -> Int4Weight:
        return weight

    def multiply(self, layout: Int4Weight, inputs: torch.Tensor) -> torch.Tensor:
        return functional.linear(inputs, layout.dequantize(inputs.dtype))
