"""Ways to compute what adapters add: PyTorch's products anywhere, vkv's kernel on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch

from ...quant import empty_apart
from ..cpu_kernels import kernels as native_kernels
from ..cpu_kernels.lora import MOST_RANK, LoraPlan, LoraTable, lora
from .sites import Site
from .steps import Group, Products, SiteWeights
from .triton_products import TritonProducts


def cpu_products(dtype: torch.dtype) -> Products:
    """The fastest way for a model on a CPU that computes in `dtype`."""
    return NativeProducts() if native_kernels.available(dtype) else TorchProducts()


def cuda_products(device: torch.device) -> Products:
    """The fastest way on a GPU."""
    return TritonProducts(device) if TritonProducts.is_available() else TorchProducts(device)


class TorchProducts:
    """Two matrix products for each adapter over its rows; what the kernels are compared with."""

    name = "torch"
    most_rank = MOST_RANK
    records = False  # it goes by numbers that the host knows

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device

    def allocate(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """As of `Products`."""
        return torch.empty(num_elements, dtype=dtype, device=self._device)

    def table(self, num_sites: int, weights: dict[int, SiteWeights]) -> dict[int, SiteWeights]:
        """As of `Products`."""
        return weights

    def plan(self, num_rows: int) -> list[tuple[dict[int, SiteWeights], Any]]:
        """As of `Products`."""
        return []

    def fill(self, plan: list[Any], groups: Sequence[Group]) -> None:
        """As of `Products`."""
        plan[:] = [(table, _as_index(rows)) for table, rows in groups if table is not None]

    def add(self, plan: list[Any], site: Site, inputs: torch.Tensor, out: torch.Tensor) -> None:
        """As of `Products`."""
        rows, sums = inputs.reshape(-1, inputs.shape[-1]), out.flatten(0, -2)
        assert sums.data_ptr() == out.data_ptr(), "results are added to in place"
        for table, index in plan:
            weights = table.get(site.index)
            if weights is not None:
                sums[index] += (rows[index] @ weights.down.T) @ weights.up * weights.scale

    def set(self, plan: list[Any], site: Site, inputs: torch.Tensor, out: torch.Tensor) -> None:
        """As of `Products`."""
        self.add(plan, site, inputs, out.zero_())


def _as_index(rows: list[int]) -> slice | list[int]:
    """Rows that follow one another as a stretch, which is no copy."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return rows


class NativeProducts:
    """vkv's kernel for processors: all adapters of a step in one call."""

    name = "native"
    most_rank = MOST_RANK
    records = True

    def allocate(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """As of `Products`."""
        return empty_apart((num_elements,), dtype)

    def table(self, num_sites: int, weights: dict[int, SiteWeights]) -> LoraTable:
        """As of `Products`."""
        table = LoraTable(num_sites)
        for site, one in weights.items():
            table.put(site, one.down, one.up, one.scale)
        return table

    def plan(self, num_rows: int) -> LoraPlan:
        """As of `Products`."""
        return LoraPlan(num_rows)

    def fill(self, plan: LoraPlan, groups: Sequence[Group]) -> None:
        """As of `Products`."""
        plan.fill(groups)

    def add(self, plan: LoraPlan, site: Site, inputs: torch.Tensor, out: torch.Tensor) -> None:
        """As of `Products`."""
        lora(plan, site.index, inputs, out)

    def set(self, plan: LoraPlan, site: Site, inputs: torch.Tensor, out: torch.Tensor) -> None:
        """As of `Products`."""
        lora(plan, site.index, inputs, out, sets=True)
