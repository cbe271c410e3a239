"""The Triton kernels as a way to compute what adapters add: tables on the device, and launches."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from ..cpu_kernels.kernels import rows_of
from .sites import Site
from .steps import Group, SiteWeights

_TILE_ROWS = 16
_BLOCK_RANKS = 16
_BLOCK_INPUTS = 64
_BLOCK_OUTPUTS = 64


class _Table:
    """An adapter's entries: int64 [num_sites, 4], and what they point to."""

    def __init__(
        self, num_sites: int, weights: dict[int, SiteWeights], device: torch.device
    ) -> None:
        entries = np.zeros((num_sites, 4), np.int64)
        for site, one in weights.items():
            scale = int(np.float32(one.scale).view(np.int32))
            entries[site] = one.down.data_ptr(), one.up.data_ptr(), len(one.down), scale
        self.entries = torch.from_numpy(entries).to(device)
        self.weights = weights


class _Plan:
    """Tiles of rows, at addresses that stay: int64 [num_rows, 3], and int32 [num_rows]."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self.num_tiles = 0
        self.tiles = torch.zeros((num_rows, 3), dtype=torch.int64, device=device)
        self.rows = torch.zeros(num_rows, dtype=torch.int32, device=device)

    @property
    def num_programs(self) -> int:
        """Tiles to launch for: a recorded step is played with as many as it has rows."""
        if self.tiles.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.num_rows
        return self.num_tiles


class TritonProducts:
    """All adapters of a step in two launches.

    Args:
        device: where the model is; the CPU under Triton's interpreter.
    """

    name = "triton"
    most_rank = 512
    records = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @classmethod
    def is_available(cls) -> bool:
        """Whether Triton is installed."""
        return find_spec("triton") is not None

    def allocate(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """As of `Products`."""
        return torch.empty(num_elements, dtype=dtype, device=self._device)

    def table(self, num_sites: int, weights: dict[int, SiteWeights]) -> _Table:
        """As of `Products`."""
        return _Table(num_sites, weights, self._device)

    def plan(self, num_rows: int) -> _Plan:
        """As of `Products`."""
        return _Plan(num_rows, self._device)

    def fill(self, plan: _Plan, groups: Sequence[Group]) -> None:
        """As of `Products`."""
        tiles, order = np.zeros((plan.num_rows, 3), np.int64), []
        plan.num_tiles = 0
        for table, rows in groups:
            address = 0 if table is None else table.entries.data_ptr()
            for at in range(0, len(rows), _TILE_ROWS):
                count = min(_TILE_ROWS, len(rows) - at)
                tiles[plan.num_tiles] = address, len(order) + at, count
                plan.num_tiles += 1
            order += rows
        _send(torch.from_numpy(tiles), plan.tiles)
        _send(torch.tensor(order, dtype=torch.int32), plan.rows)

    def add(self, plan: _Plan, site: Site, inputs: torch.Tensor, out: torch.Tensor) -> None:
        """As of `Products`."""
        self._launch(plan, site, inputs, out, sets=False)

    def set(self, plan: _Plan, site: Site, inputs: torch.Tensor, out: torch.Tensor) -> None:
        """As of `Products`."""
        self._launch(plan, site, inputs, out, sets=True)

    def _launch(
        self, plan: _Plan, site: Site, inputs: torch.Tensor, out: torch.Tensor, *, sets: bool
    ) -> None:
        import triton.language as tl  # here: it is only there where it is wanted

        from . import triton_kernels

        shrink_kernel: Any = triton_kernels.shrink_kernel
        expand_kernel: Any = triton_kernels.expand_kernel
        rows, _, input_stride = rows_of(inputs)
        same, _, output_stride = rows_of(out)
        assert same is out, "results are added to in place"
        low = inputs.new_empty((plan.num_rows, self.most_rank), dtype=torch.float32)
        num_blocks = -(-self.most_rank // _BLOCK_RANKS)
        shrink_kernel[(plan.num_programs, num_blocks)](
            plan.tiles,
            plan.rows,
            rows,
            low,
            site.index,
            site.in_features,
            input_stride,
            self.most_rank,
            BLOCK_M=_TILE_ROWS,
            BLOCK_R=_BLOCK_RANKS,
            BLOCK_K=_BLOCK_INPUTS,
            WIDE=not inputs.is_cuda,
        )
        expand_kernel[(plan.num_programs, -(-site.out_features // _BLOCK_OUTPUTS))](
            plan.tiles,
            plan.rows,
            low,
            out,
            site.index,
            site.out_features,
            self.most_rank,
            output_stride,
            DTYPE=_TYPES[inputs.dtype](tl),
            SETS=sets,
            BLOCK_M=_TILE_ROWS,
            BLOCK_N=_BLOCK_OUTPUTS,
            BLOCK_R=_BLOCK_RANKS,
        )


def _send(values: torch.Tensor, goal: torch.Tensor) -> None:
    """Copy without waiting for the device, whose work launched later sees it."""
    goal.copy_(values.pin_memory() if goal.is_cuda else values, non_blocking=True)


_TYPES = {
    torch.float32: lambda tl: tl.float32,
    torch.bfloat16: lambda tl: tl.bfloat16,
    torch.float16: lambda tl: tl.float16,
}
