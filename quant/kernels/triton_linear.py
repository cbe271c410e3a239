"""The first-party Triton kernel as one of the table's: layout, tile shapes and their choice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional

from ..weight import SYMMETRIC_ZERO, Int4Weight
from .table import Int4Kernel

UNIT = 256  # columns whose codes are interleaved; see triton_kernels
_WORDS = 32
_PAD_N = 128  # the widest block of outputs; rows of the layout are padded to it
_LARGEST_FUSED = 256  # rows; above, the weight is dequantised once and the dense library multiplies
_MAX_SPLIT = 8
_PROGRAMS_PER_PROCESSOR = 4  # enough loads under way to keep the memory busy
_MIN_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One way to run the kernel.

    Attributes:
        rows, outputs: of the block of results that a program computes.
        crowd: programs per processor to aim for by splitting the columns.
    """

    rows: int
    outputs: int
    num_warps: int
    num_stages: int
    crowd: int = _PROGRAMS_PER_PROCESSOR


# By the most rows they serve. The first of each fits every card (99 KiB of shared memory), and is
# used where nothing can be timed; the others are for cards that have room.
_TILES: dict[int, tuple[Tile, ...]] = {
    16: (
        Tile(rows=16, outputs=64, num_warps=4, num_stages=4),
        Tile(rows=16, outputs=32, num_warps=4, num_stages=5),
        Tile(rows=16, outputs=128, num_warps=4, num_stages=3, crowd=2),
    ),
    32: (
        Tile(rows=32, outputs=64, num_warps=4, num_stages=4),
        Tile(rows=32, outputs=128, num_warps=4, num_stages=3, crowd=2),
    ),
    64: (
        Tile(rows=64, outputs=64, num_warps=4, num_stages=2, crowd=2),
        Tile(rows=64, outputs=64, num_warps=4, num_stages=3, crowd=2),
        Tile(rows=64, outputs=128, num_warps=4, num_stages=3, crowd=1),
    ),
    _LARGEST_FUSED: (
        Tile(rows=64, outputs=128, num_warps=4, num_stages=2, crowd=1),
        Tile(rows=128, outputs=128, num_warps=8, num_stages=2, crowd=1),
        Tile(rows=128, outputs=128, num_warps=8, num_stages=3, crowd=1),
    ),
}


@dataclass(frozen=True, kw_only=True)
class TritonLayout:
    """A weight as the kernel reads it; iterating gives its tensors.

    Attributes:
        words: int32 [units, padded_n, 32].
        scales: [groups, padded_n], of the weight's own type.
        zeros: uint8 [groups, padded_n], or None.
        arrivals: int32, counters that every call leaves at 0. A layout is therefore multiplied by
            on one stream at a time.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    arrivals: torch.Tensor
    out_features: int
    in_features: int
    group_size: int

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        return iter((self.words, self.scales, self.zeros, self.arrivals))

    @property
    def padded_n(self) -> int:
        return self.words.shape[1]

    @property
    def span(self) -> int:
        """Columns of a unit that share a scale."""
        return min(self.group_size, UNIT)


class TritonKernel(Int4Kernel):
    """4-bit weights on every NVIDIA card since Ampere, in float16 and bfloat16.

    Up to 256 rows the weight is expanded in registers; above, it is dequantised into a buffer
    that lives for the one product. The first batch of a size times a few tile shapes and keeps
    the best for all weights of that shape.
    """

    name = "triton"

    def __init__(self) -> None:
        self._chosen: dict[tuple[object, ...], Tile] = {}

    @classmethod
    def unavailable_reason(cls) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed; PyTorch for CUDA brings it along"
        if not torch.cuda.is_available():
            return "no NVIDIA GPU that PyTorch sees"
        if torch.cuda.get_device_capability() < _MIN_CAPABILITY:
            return "this GPU is older than Ampere (compute capability 8.0)"
        return None

    def accepts(
        self, weight: Int4Weight, device: torch.device, dtype: torch.dtype, num_rows: int
    ) -> bool:
        fitting_group = (
            weight.group_size in (32, 64, 128)
            or weight.group_size % UNIT == 0
            or weight.group_size == weight.in_features
        )
        aligned = weight.in_features % _WORDS == 0
        right_type = dtype in (torch.float16, torch.bfloat16)
        return device.type == "cuda" and right_type and aligned and fitting_group

    def prepare(self, weight: Int4Weight) -> TritonLayout:
        pad_n = -weight.out_features % _PAD_N
        pad_k = -weight.in_features % UNIT
        codes = functional.pad(weight.codes(), (0, pad_k, 0, pad_n), value=SYMMETRIC_ZERO)
        scales = functional.pad(weight.scales, (0, 0, 0, pad_n)).T.contiguous()
        zeros = None
        if weight.zeros is not None:
            zeros = functional.pad(weight.zeros, (0, 0, 0, pad_n)).T.contiguous()
        # Columns padded on would look for groups past the last; they meet inputs of 0.
        groups = -(-codes.shape[1] // weight.group_size)
        scales = functional.pad(scales, (0, 0, 0, groups - scales.shape[0]))
        if zeros is not None:
            zeros = functional.pad(zeros, (0, 0, 0, groups - zeros.shape[0]))
        blocks = codes.shape[0] // 32 * (_LARGEST_FUSED // 16)
        return TritonLayout(
            words=interleave(codes),
            scales=scales,
            zeros=zeros,
            arrivals=torch.zeros(blocks, dtype=torch.int32, device=codes.device),
            out_features=weight.out_features,
            in_features=weight.in_features,
            group_size=weight.group_size,
        )

    def multiply(self, layout: TritonLayout, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.shape[0] == 0:
            return inputs.new_empty(0, layout.out_features)
        if inputs.shape[0] > _LARGEST_FUSED:
            return functional.linear(inputs, dequantize(layout, inputs.dtype))
        if inputs.stride(1) != 1:
            inputs = inputs.contiguous()
        bucket = next(most for most in _TILES if inputs.shape[0] <= most)
        tiles = _TILES[bucket]
        key = (layout.words.shape, layout.group_size, inputs.dtype, inputs.device, bucket)
        if key not in self._chosen:
            if not inputs.is_cuda or torch.cuda.is_current_stream_capturing():
                return launch(layout, inputs, tiles[0])
            self._chosen[key] = _fastest(tiles, lambda tile: launch(layout, inputs, tile))
        return launch(layout, inputs, self._chosen[key])


def interleave(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K], K a multiple of 256, as the kernel's words, int32 [K / 256, N, 32]."""
    nibbles = codes.unflatten(1, (-1, 8, _WORDS)).to(torch.int64)  # [N, units, nibble, word]
    shifts = torch.arange(0, 32, 4, device=codes.device).view(1, 1, 8, 1)
    words = (nibbles << shifts).sum(2)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return words.transpose(0, 1).contiguous()


def split_columns(layout: TritonLayout, num_rows: int, tile: Tile, processors: int) -> int:
    """Into how many parts the columns are split, to give every processor work."""
    blocks = layout.padded_n // tile.outputs * -(-num_rows // tile.rows)
    wanted = -(-processors * tile.crowd // blocks)
    split = 1
    while split < min(wanted, _MAX_SPLIT) and 2 * split <= layout.words.shape[0]:
        split *= 2
    return split


def launch(
    layout: TritonLayout, inputs: torch.Tensor, tile: Tile, *, split: int | None = None
) -> torch.Tensor:
    """[M, K] by the layout, M at most 256, with that tile: [M, N].

    `split` is the number of parts of the columns; None chooses it for the device.
    """
    from .triton_kernels import multiply_kernel  # here: Triton is there where this is called

    kernel: Any = multiply_kernel

    num_rows = inputs.shape[0]
    if split is None:
        split = split_columns(layout, num_rows, tile, _processors(inputs.device))
    row_blocks = -(-num_rows // tile.rows)
    outputs = inputs.new_empty(num_rows, layout.out_features)
    partial = outputs  # never touched, if there is one part
    if split > 1:
        shape = (split, row_blocks * tile.rows, layout.padded_n)
        partial = torch.empty(shape, dtype=torch.float32, device=inputs.device)
    grid = (layout.padded_n // tile.outputs, row_blocks, split)
    kernel[grid](
        inputs,
        layout.words,
        layout.scales,
        layout.scales if layout.zeros is None else layout.zeros,
        outputs,
        partial,
        layout.arrivals,
        num_rows,
        layout.out_features,
        layout.in_features,
        layout.padded_n,
        layout.words.shape[0],
        inputs.stride(0),
        layout.group_size,
        SPAN=layout.span,
        HAS_ZEROS=layout.zeros is not None,
        WHOLE_UNITS=layout.in_features % UNIT == 0,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        SPLIT_K=split,
        WIDE=not inputs.is_cuda,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,  # exact here either way, and half the instructions
    )
    return outputs


def dequantize(layout: TritonLayout, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [N, K] of a 16-bit `dtype`, from the layout."""
    from .triton_kernels import dequantize_kernel  # as above

    kernel: Any = dequantize_kernel
    dense = torch.empty(
        layout.out_features, layout.in_features, dtype=dtype, device=layout.words.device
    )
    block = 64
    kernel[layout.padded_n // block, layout.words.shape[0]](
        layout.words,
        layout.scales,
        layout.scales if layout.zeros is None else layout.zeros,
        dense,
        layout.out_features,
        layout.in_features,
        layout.padded_n,
        layout.group_size,
        SPAN=layout.span,
        HAS_ZEROS=layout.zeros is not None,
        BLOCK_N=block,
        num_warps=4,
    )
    return dense


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fastest(tiles: tuple[Tile, ...], run: Callable[[Tile], torch.Tensor]) -> Tile:
    """The tile that takes least time; each is compiled and warmed up first."""
    from triton.runtime import errors  # pyright: ignore[reportMissingImports] - as above

    times: dict[Tile, float] = {}
    for tile in tiles:
        try:
            for _ in range(3):
                run(tile)
        except errors.OutOfResources:
            continue  # this card has too little shared memory for it
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            run(tile)
        end.record()
        end.synchronize()
        times[tile] = start.elapsed_time(end)
    return min(times, key=lambda tile: times[tile])
