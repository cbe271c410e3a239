"""FlashInfer over a paged cache as it was meant: what `flashinfer` is compared with.

The same wrapper and the same kernel; page numbers come from block tables instead of arithmetic.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..vmem.errors import UnsupportedAttention
from .base import AttentionBatch
from .flashinfer import FlashInferBackend


class PagedFlashInferBackend(FlashInferBackend):
    name = "paged_flashinfer"
    capabilities = replace(FlashInferBackend.capabilities, contiguous=False, paged=True)

    def check_cache(self, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
        self._pages(key_cache, value_cache)

    def _pages(
        self, key_cache: torch.Tensor, value_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        if key_cache.stride() != value_cache.stride():
            raise UnsupportedAttention(
                f"{self.name}: keys and values must have equal strides, not {key_cache.stride()} "
                f"and {value_cache.stride()}"
            )
        return key_cache, value_cache, 0  # a slot has no pages of its own here

    def _page_numbers(
        self, batch: AttentionBatch, counts: Sequence[int], pages_per_slot: int
    ) -> torch.Tensor:
        assert batch.block_tables is not None, "a paged backend reads block tables"
        width = batch.block_tables.shape[1]
        entries = torch.cat(
            [torch.arange(row * width, row * width + count) for row, count in enumerate(counts)]
        )
        # Picked on the device, where the tables are: nothing is read back.
        return batch.block_tables.flatten()[entries.to(batch.block_tables.device)]
