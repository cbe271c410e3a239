"""vkv's own CPU kernel: a small C library (`native/`) for processors with AVX512-BF16 or AVX2.

It serves every batch. Codes become numbers in registers, so no dequantised weight is ever written
to memory.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ...vmem.errors import NativeUnavailable
from ...vmem.native_function import NativeFunction
from ...vmem.native_library import load_library, openmp_parallel
from ..weight import Int4Weight, pack
from ..weight_memory import empty_apart
from .table import Int4Kernel

_TILE = 32  # outputs of a tile
_BLOCK = 8  # inputs of a block


class Int4Args(ctypes.Structure):
    """`struct vkv_int4` of `native/int4.h`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("inputs", "out", "codes", "scales", "zeros")),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("num_rows", "in_features", "out_features")),
        ("group_size", ctypes.c_int64),
        ("instruction_set", ctypes.c_char_p),
        ("num_threads", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """The kernels. Raises NativeUnavailable if they are not built and cannot be compiled here."""
    library = load_library(Path(__file__).parent)
    library.vkv_int4_supported.argtypes = [ctypes.c_char_p]
    library.vkv_int4_supported.restype = ctypes.c_int32
    return library


@cache
def instruction_sets() -> tuple[str, ...]:
    """Those of this processor that there are kernels for, the fastest first.

    Raises NativeUnavailable as `library` does.
    """
    supported = library().vkv_int4_supported
    return tuple(name for name in ("avx512_bf16", "avx2") if supported(name.encode()))


@dataclass(frozen=True)
class _Tiles:
    """A weight as `native/int4.h` wants it, and the arguments of a call, but for the inputs."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    out_features: int
    args: Int4Args


class NativeKernel(Int4Kernel):
    name = "native"

    def __init__(self, instruction_set: str | None = None) -> None:
        self._multiply = NativeFunction(library(), "int4_multiply", Int4Args)
        self._instruction_set = instruction_set or instruction_sets()[0]
        self._parallel = openmp_parallel()

    @classmethod
    def unavailable_reason(cls) -> str | None:
        try:
            supported = instruction_sets()
        except NativeUnavailable as error:
            return str(error)
        return None if supported else "this processor has neither AVX512-BF16 nor AVX2"

    def accepts(
        self, weight: Int4Weight, device: torch.device, dtype: torch.dtype, num_rows: int
    ) -> bool:
        right_type = device.type == "cpu" and dtype == torch.bfloat16
        return right_type and weight.group_size % _BLOCK == 0

    def prepare(self, weight: Int4Weight) -> _Tiles:
        missing = -weight.out_features % _TILE
        codes = torch.nn.functional.pad(weight.codes(), (0, 0, 0, missing))
        blocks = codes.view(-1, 2, 16, weight.in_features // _BLOCK, 4, 2)
        packed = pack(blocks.permute(0, 3, 1, 2, 5, 4).contiguous())  # nibbles last
        words = empty_apart(packed.shape, torch.uint8)
        words.copy_(packed)
        scales = _in_tiles(weight.scales.float(), missing)
        zeros = None if weight.zeros is None else _in_tiles(weight.zeros, missing)
        args = Int4Args(
            codes=words.data_ptr(),
            scales=scales.data_ptr(),
            zeros=None if zeros is None else zeros.data_ptr(),
            in_features=weight.in_features,
            out_features=weight.out_features,
            group_size=weight.group_size,
            instruction_set=self._instruction_set.encode(),
            parallel=self._parallel,
        )
        return _Tiles(words, scales, zeros, weight.out_features, args)

    def multiply(self, layout: _Tiles, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.contiguous()
        out = inputs.new_empty(inputs.shape[0], layout.out_features)
        if not inputs.shape[0]:
            return out
        args = Int4Args.from_buffer_copy(layout.args)  # threads may share the layout
        args.inputs, args.out, args.num_rows = inputs.data_ptr(), out.data_ptr(), inputs.shape[0]
        args.num_threads = torch.get_num_threads()
        self._multiply(args)
        return out

    def num_bytes(self, layout: _Tiles) -> int:
        zeros = 0 if layout.zeros is None else layout.zeros.nbytes
        return layout.codes.nbytes + layout.scales.nbytes + zeros


def _in_tiles(values: torch.Tensor, missing: int) -> torch.Tensor:
    """[N, groups] to [N/32, groups, 32]."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, missing))
    return padded.unflatten(0, (-1, _TILE)).transpose(1, 2).contiguous()
