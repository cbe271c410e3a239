"""`humming-kernels`, the maintained line of MARLIN, as one of the table's kernels.

Unproven: written from the package's sources (0.1.19) and tested for the arguments it is given; it
has not run on a GPU yet.

The package takes `weight`, int32 [N, K/8], codes in the order of the columns, the first in the
lowest bits; `weight_scale` [N, groups]; and `zero_point`, int32 [N/8, groups], eight rows a word.
Without zero points codes stand for themselves less 8. It compiles its kernels when they are first
used, with NVRTC where `cuda.bindings` imports and with `nvcc` elsewhere.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from ..formats.int32_words import to_words
from ..weight import Int4Weight
from .table import Int4Kernel

_MIN_CAPABILITY = (7, 5)
_MIN_BFLOAT16 = (8, 0)
_ALIGNMENT = 64  # of both sides, so that none is padded


class HummingLayout:
    """A weight on its way into humming's layout, which depends on the dtype of the inputs.

    The canonical weight is let go of when a first product says which it is.
    """

    def __init__(self, weight: Int4Weight) -> None:
        self._weight: Int4Weight | None = weight
        self._layer: Any = None
        self._dtype: torch.dtype | None = None

    def __iter__(self) -> Iterator[Any]:
        """The tensors that it holds."""
        if self._weight is not None:
            yield self._weight
        if self._layer is not None:
            yield from self._layer.parameters()
            yield from self._layer.buffers()

    def layer(self, dtype: torch.dtype) -> Any:
        """The package's layer, for inputs of `dtype`; always the same one."""
        if self._weight is not None:
            self._layer, self._dtype, self._weight = _build(self._weight, dtype), dtype, None
        assert dtype == self._dtype, f"laid out for {self._dtype}, asked for {dtype}"
        return self._layer


class HummingKernel(Int4Kernel):
    """MARLIN's descendants: 4-bit weights by float16 or bfloat16 on NVIDIA cards since Turing."""

    name = "humming"

    @classmethod
    def unavailable_reason(cls) -> str | None:
        if find_spec("humming") is None:
            return "humming-kernels is not installed; pip install 'vkv[marlin]'"
        if not torch.cuda.is_available():
            return "no NVIDIA GPU that PyTorch sees"
        if torch.cuda.get_device_capability() < _MIN_CAPABILITY:
            return "this GPU is older than Turing (compute capability 7.5)"
        return None

    def accepts(
        self, weight: Int4Weight, device: torch.device, dtype: torch.dtype, num_rows: int
    ) -> bool:
        if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
            return False
        if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < _MIN_BFLOAT16:
            return False
        aligned = not (weight.in_features % _ALIGNMENT or weight.out_features % _ALIGNMENT)
        fitting_group = weight.group_size in (32, 64, 128, 256, weight.in_features)
        # Any number of rows: a second layout, for large batches, would double the memory.
        return aligned and fitting_group

    def prepare(self, weight: Int4Weight) -> HummingLayout:
        return HummingLayout(weight)

    def multiply(self, layout: HummingLayout, inputs: torch.Tensor) -> torch.Tensor:
        return layout.layer(inputs.dtype)(inputs.contiguous())


def layer_options(weight: Int4Weight, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `humming.layer.HummingLayer` for this weight."""
    whole_rows = weight.group_size == weight.in_features
    return {
        "shape_n": weight.out_features,
        "shape_k": weight.in_features,
        "weight_config": {
            "dtype": "uint4",
            "group_size": 0 if whole_rows else weight.group_size,
            "has_zero_point": weight.zeros is not None,
        },
        "torch_dtype": dtype,
    }


def layer_tensors(weight: Int4Weight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of `HummingLayer.load_from_tensors` for this weight."""
    tensors = {
        "weight": weight.packed.contiguous().view(torch.int32),  # bytes are in its order already
        "weight_scale": weight.scales.to(dtype),
    }
    if weight.zeros is not None:
        tensors["zero_point"] = to_words(weight.zeros.T).T.contiguous()
    return tensors


def _build(weight: Int4Weight, dtype: torch.dtype) -> Any:
    from humming.layer import HummingLayer  # pyright: ignore[reportMissingImports] - an extra

    layer = HummingLayer(**layer_options(weight, dtype)).to(weight.packed.device)
    layer.load_from_tensors(layer_tensors(weight, dtype))
    layer.transform()
    return layer
