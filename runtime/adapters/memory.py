"""Adapters' weights in memory, under one limit with keys and values."""

import torch

from ...allocator import MemoryLimit
from ..model.extras.kept_weights import KeptWeights
from ..request.spec import AdapterKey
from .lora_file import LoraFile
from .steps import Products, Table


class AdapterMemory(KeptWeights[AdapterKey, Table]):
    """The tables of adapters that are in memory (`KeptWeights`).

    Args:
        limit: kept together with the engine's cache, and maybe with others.
        products: what tables are made for.
        dtype: what weights are rounded to.
    """

    def __init__(self, limit: MemoryLimit, products: Products, dtype: torch.dtype) -> None:
        super().__init__(limit)
        self._products = products
        self._dtype = dtype

    def load(self, key: AdapterKey, file: LoraFile, num_sites: int) -> None:
        """Have an adapter in memory. Raises OutOfPages or BadAdapter, with nothing counted."""
        num_bytes = self.bytes_of(file)

        def make() -> tuple[Table, int]:
            weights = file.read(self._dtype, self._allocate)
            return self._products.table(num_sites, weights), num_bytes

        self.bring(key, num_bytes, make, f"the adapter {key.name!r}")

    def bytes_of(self, file: LoraFile) -> int:
        """What an adapter takes while it is in memory."""
        return file.num_elements() * self._dtype.itemsize

    def _allocate(self, num_elements: int) -> torch.Tensor:
        return self._products.allocate(num_elements, self._dtype)
