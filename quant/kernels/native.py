"""vkv's own CPU kernel: a small C library (`native/`) for processors with AVX512-BF16 or AVX2.

It serves every batch. Codes become numbers in registers, and for many rows in the first cache.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from ...vmem.errors import NativeUnavailable, QuantError
from ...vmem.native_function import NativeFunction
from ...vmem.native_library import load_library, openmp_parallel
from ..weight import Int4Weight
from ..weight_memory import empty_apart
from .table import Int4Kernel

_TILE = 32  # outputs of a tile
_BLOCK = 8  # inputs of a block
_SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum vkv_int4_scales


class Int4Args(ctypes.Structure):
    """`struct vkv_int4` of `native/int4.h`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("inputs", "out", "codes", "scales", "zeros")),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("num_rows", "in_features", "out_features")),
        ("group_size", ctypes.c_int64),
        ("scale_type", ctypes.c_int32),
        ("instruction_set", ctypes.c_char_p),
        ("num_threads", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    )


class _Codes(ctypes.Structure):
    """`struct vkv_int4_codes`."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """The kernels. Raises NativeUnavailable if they are not built and cannot be compiled here."""
    library = load_library(Path(__file__).parent)
    library.vkv_int4_supported.argtypes = [ctypes.c_char_p]
    library.vkv_int4_supported.restype = ctypes.c_int32
    for name in ("vkv_int4_pack", "vkv_int4_unpack"):
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(_Codes)]
        function.restype = None
    return library


@cache
def instruction_sets() -> tuple[str, ...]:
    """Those of this processor that there are kernels for, the fastest first.

    Raises NativeUnavailable as `library` does.
    """
    return _supported("avx512_bf16", "avx2")


@cache
def int8_instruction_sets() -> tuple[str, ...]:
    """Those with kernels for inputs that are rounded to 8 bits."""
    return _supported("int8_avx512_vnni", "int8_avx2")


def _supported(*names: str) -> tuple[str, ...]:
    return tuple(name for name in names if library().vkv_int4_supported(name.encode()))


@dataclass(frozen=True)
class _Tiles:
    """A weight as `native/int4.h` wants it, and the arguments of a call, but for the inputs."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    out_features: int
    args: Int4Args

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        """Its tensors, as of any layout."""
        return iter((self.codes, self.scales, self.zeros))


class NativeKernel(Int4Kernel):
    name = "native"

    def __init__(self, instruction_set: str | None = None) -> None:
        self._multiply = NativeFunction(library(), "int4_multiply", Int4Args)
        self._instruction_set = (instruction_set or self._instruction_sets()[0]).encode()
        self._parallel = openmp_parallel()

    @classmethod
    def _instruction_sets(cls) -> tuple[str, ...]:
        return instruction_sets()

    @classmethod
    def unavailable_reason(cls) -> str | None:
        try:
            supported = cls._instruction_sets()
        except NativeUnavailable as error:
            return str(error)
        return None if supported else "this processor has neither AVX-512 nor AVX2"

    def accepts(
        self, weight: Int4Weight, device: torch.device, dtype: torch.dtype, num_rows: int
    ) -> bool:
        right_type = device.type == "cpu" and dtype == torch.bfloat16
        return right_type and weight.group_size % _BLOCK == 0

    def prepare(self, weight: Int4Weight) -> _Tiles:
        if weight.group_size % _BLOCK:  # of a pinned kernel nobody asked whether it accepts
            raise QuantError(
                f"the weight is in groups of {weight.group_size}, and int4 kernel {self.name!r} "
                f"takes multiples of {_BLOCK}; pin 'dequantize', or no kernel"
            )
        missing = -weight.out_features % _TILE
        shape = weight.out_features + missing, weight.in_features // 2
        packed, codes = weight.packed.contiguous(), empty_apart(shape, torch.uint8)
        library().vkv_int4_pack(self._codes(packed, codes))
        is_known = weight.scales.dtype in _SCALES
        scales = _in_tiles(weight.scales if is_known else weight.scales.float(), missing)
        zeros = None if weight.zeros is None else _in_tiles(weight.zeros, missing)
        args = Int4Args(
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            zeros=None if zeros is None else zeros.data_ptr(),
            in_features=weight.in_features,
            out_features=weight.out_features,
            group_size=weight.group_size,
            scale_type=_SCALES[scales.dtype],
            parallel=self._parallel,
        )
        return _Tiles(codes, scales, zeros, weight.out_features, args)

    def restores(self, outline: Int4Weight) -> bool:
        return outline.scales.dtype in _SCALES  # others are rounded

    def restore(self, layout: _Tiles, outline: Int4Weight) -> Int4Weight:
        out_features = outline.out_features
        packed = torch.empty(outline.packed.shape, dtype=torch.uint8)
        library().vkv_int4_unpack(self._codes(packed, layout.codes))
        return replace(
            outline,
            packed=packed,
            scales=_from_tiles(layout.scales, out_features),
            zeros=None if layout.zeros is None else _from_tiles(layout.zeros, out_features),
        )

    def _codes(self, packed: torch.Tensor, tiles: torch.Tensor) -> _Codes:
        """Of a weight, [out_features, in_features / 2], in either form."""
        return _Codes(
            packed=packed.data_ptr(),
            tiles=tiles.data_ptr(),
            out_features=packed.shape[0],
            in_features=2 * packed.shape[1],
            num_threads=torch.get_num_threads(),
            parallel=self._parallel,
        )

    def multiply(self, layout: _Tiles, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.dtype != torch.bfloat16:  # a pinned kernel is asked of no dtype
            raise QuantError(
                f"int4 kernel {self.name!r} takes inputs in torch.bfloat16, and these are in "
                f"{inputs.dtype}; pin 'dequantize', or no kernel"
            )
        inputs = inputs.contiguous()
        out = inputs.new_empty(inputs.shape[0], layout.out_features)
        if not inputs.shape[0]:
            return out
        args = Int4Args.from_buffer_copy(layout.args)  # threads may share the layout
        args.inputs, args.out, args.num_rows = inputs.data_ptr(), out.data_ptr(), inputs.shape[0]
        args.num_threads = torch.get_num_threads()
        args.instruction_set = self._instruction_set
        self._multiply(args)
        return out


class NativeInt8Kernel(NativeKernel):
    """The same layouts, multiplied by inputs that are rounded to 8 bits (`activations`)."""

    name = "native-int8"

    @property
    def layout_name(self) -> str:
        return NativeKernel.name

    @classmethod
    def _instruction_sets(cls) -> tuple[str, ...]:
        return int8_instruction_sets()


def _in_tiles(values: torch.Tensor, missing: int) -> torch.Tensor:
    """[N, groups] to [N/32, groups, 32]."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, missing))
    return padded.unflatten(0, (-1, _TILE)).transpose(1, 2).contiguous()


def _from_tiles(tiles: torch.Tensor, out_features: int) -> torch.Tensor:
    return tiles.transpose(1, 2).flatten(0, 1)[:out_features].contiguous()
