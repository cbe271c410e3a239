"""FlashAttention-2 inside PyTorch over a paged cache: what `torch_flash` is compared with.

The same operator, given block tables in place of start rows. It takes them from PyTorch 2.12 on,
in blocks of a multiple of 256 tokens.
"""

from dataclasses import replace

import torch

from .base import AttentionBatch, LayerAttention, PerStep
from .cuda import missing_gpu
from .paged import check_block_size
from .torch_flash import Part, TorchFlashBackend, cut_batch, flash_forward


class PagedFlashBackend(TorchFlashBackend):
    name = "paged_flash"
    capabilities = replace(
        TorchFlashBackend.capabilities, contiguous=False, paged=True, block_multiple=256
    )

    def __init__(self) -> None:
        self._parts: PerStep[list[Part]] = PerStep()

    @classmethod
    def unavailable_reason(cls) -> str | None:
        schema = torch.ops.aten._flash_attention_forward.default._schema
        if all(argument.name != "block_table" for argument in schema.arguments):
            return f"needs PyTorch 2.12 or later for block tables; this is {torch.__version__}"
        return missing_gpu()

    def check_cache(self, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
        check_block_size(self.name, key_cache, self.capabilities.block_multiple)

    def _flash(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch.block_tables is not None, "a paged backend reads block tables"
        parts = self._parts.get(batch, None, lambda: _cut(batch))
        return flash_forward(query, key_cache, value_cache, parts, layer)


def _cut(batch: AttentionBatch) -> list[Part]:
    """As `cut_batch`; keys are counted from the first of each part on."""
    parts = cut_batch(batch, _offsets(batch.seqused_k))
    return [replace(part, offsets_k=_offsets(part.seqused_k)) for part in parts]


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    """[0, l0, l0 + l1, …], int32 on the lengths' device."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
