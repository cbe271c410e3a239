"""The CPU kernel of adapters: what they add to a linear, for rows of several in one call."""

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from ...vmem.native_function import NativeFunction
from ...vmem.native_library import openmp_parallel
from .kernels import dtype_code, library, rows_of

MOST_RANK = 512  # VKV_LORA_MOST_RANK
KERNELS = ("plain", "avx2", "avx512", "avx512-bf16")  # VKV_LORA_…

_POINTER, _INT64, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_TILE_ROWS = 16  # that a thread takes at a time
_TILE = np.dtype([("adapter", np.uint64), ("first", np.int32), ("count", np.int32)])


class _Entry(ctypes.Structure):
    _fields_ = (("down", _POINTER), ("up", _POINTER), ("rank", _INT32), ("scale", _FLOAT))


class _Plan(ctypes.Structure):
    _fields_ = (("tiles", _POINTER), ("rows", _POINTER), ("num_tiles", _INT64))


class _Lora(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("plan", "inputs", "out")),
        *((name, _INT64) for name in ("input_stride", "out_stride")),
        *((name, _INT32) for name in ("site", "in_features", "out_features", "dtype", "sets")),
        *(("most", _INT32), ("num_threads", _INT32), ("parallel", _POINTER)),
    )


class LoraTable:
    """An adapter's weights as the kernel finds them: an entry for each of `num_sites` places."""

    def __init__(self, num_sites: int) -> None:
        self._entries = (_Entry * num_sites)()
        self._kept: list[torch.Tensor] = []  # what the entries point to

    @property
    def address(self) -> int:
        """Of the first entry."""
        return ctypes.addressof(self._entries)

    def put(self, site: int, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        """Weights [rank, in_features] and [rank, out_features], without gaps."""
        assert down.is_contiguous()
        assert up.is_contiguous()
        assert len(down) == len(up) <= MOST_RANK, (down.shape, up.shape)
        self._kept += (down, up)
        self._entries[site] = _Entry(down.data_ptr(), up.data_ptr(), len(down), scale)


class LoraPlan:
    """Whose each row of a step is, in memory that stays where it is.

    Args:
        num_rows: of the step, each time that it is filled.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._tiles = np.zeros(num_rows, _TILE)
        self._rows = np.zeros(num_rows, np.int32)
        self._plan = _Plan(self._tiles.ctypes.data, self._rows.ctypes.data, 0)

    @property
    def address(self) -> int:
        """Of the plan."""
        return ctypes.addressof(self._plan)

    def fill(self, groups: Sequence[tuple[LoraTable | None, Sequence[int]]]) -> None:
        """Each table with the rows that are its adapter's; None with those of none. All rows."""
        num_tiles = first = 0
        for table, rows in groups:
            address = 0 if table is None else table.address
            self._rows[first : first + len(rows)] = rows
            for at in range(0, len(rows), _TILE_ROWS):
                count = min(_TILE_ROWS, len(rows) - at)
                self._tiles[num_tiles] = (address, first + at, count)
                num_tiles += 1
            first += len(rows)
        assert first == self.num_rows, (first, self.num_rows)
        self._plan.num_tiles = num_tiles


def lora(
    plan: LoraPlan,
    site: int,
    inputs: torch.Tensor,
    out: torch.Tensor,
    *,
    sets: bool = False,
    most: str = KERNELS[-1],
) -> None:
    """Add to `out`, [..., out_features] of the dtype of `inputs`, what adapters say at a place.

    With `sets`, `out` is float32 without gaps, and becomes that; zero where there is no adapter.
    Of `KERNELS` the last one is taken that the processor has, and none behind `most`.
    """
    rows, num_rows, input_stride = rows_of(inputs)
    same, num_outs, out_stride = rows_of(out)
    assert same is out, "results are added to in place"
    assert num_rows == num_outs == plan.num_rows, (num_rows, num_outs, plan.num_rows)
    assert out.dtype == (torch.float32 if sets else inputs.dtype), out.dtype
    args = _Lora(
        plan=plan.address,
        inputs=rows.data_ptr(),
        out=out.data_ptr(),
        input_stride=input_stride,
        out_stride=out_stride,
        site=site,
        in_features=inputs.shape[-1],
        out_features=out.shape[-1],
        dtype=dtype_code(inputs.dtype),
        sets=sets,
        most=KERNELS.index(most),
        num_threads=torch.get_num_threads(),
        parallel=openmp_parallel(),
    )
    _kernel()(args)


@cache
def _kernel() -> NativeFunction:
    return NativeFunction(library(), "lora", _Lora)
