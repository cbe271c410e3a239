"""FlashAttention-2 as PyTorch ships it, straight over contiguous slots: the CUDA default.

The variable-length kernel takes keys and values as one flat run of rows. Given the lengths in
`seqused_k`, it reads of the key offsets only where each sequence starts, so any slots in any
order are a valid "packed" batch: start row = slot · rows per slot. Nothing is copied, and no
package is needed.

Softcap is not reachable through PyTorch's operator. Sinks are applied to the result by its
log-sum-exp, which the kernel returns anyway.
"""

from typing import NamedTuple

import torch

from ..vmem.errors import UnsupportedAttention
from .base import AttentionBackend, AttentionBatch, Capabilities, LayerAttention, PerStep
from .cuda import missing_gpu
from .sinks import apply_sinks, sinks_lse

MAX_ROWS = 2**31  # start rows travel as int32


class FlatKV(NamedTuple):
    """A cache `[num_slots, max_len, heads, dim]` seen as one run of token rows."""

    rows: torch.Tensor  # [num_rows, num_kv_heads, head_dim]
    rows_per_slot: int  # the slot stride in rows; more than max_len where slots are padded


class TorchFlashBackend(AttentionBackend):
    name = "torch_flash"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        max_head_dim=256,
        head_dim_multiple=8,
        unequal_head_dims=False,
        softcap=False,
        graphs=True,
    )

    def __init__(self) -> None:
        self._start_rows: PerStep[torch.Tensor] = PerStep()

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return missing_gpu()

    def check_cache(self, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
        keys, values = flat_kv(key_cache), flat_kv(value_cache)
        if keys.rows_per_slot != values.rows_per_slot:
            raise UnsupportedAttention(
                f"torch_flash: slots are {keys.rows_per_slot} rows apart for keys and "
                f"{values.rows_per_slot} for values; one list of start rows serves both"
            )

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        result, lse = self._flash(query, key_cache, value_cache, batch, layer)
        if layer.sinks is not None:
            apply_sinks(result, lse, layer.sinks)
        return result if out is None else out.copy_(result)

    def forward_lse(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self._flash(query, key_cache, value_cache, batch, layer)
        if layer.sinks is not None:
            apply_sinks(out, lse, layer.sinks)
            lse = sinks_lse(lse, layer.sinks)
        return out, lse.contiguous()

    def _flash(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [num_tokens, num_heads, head_dim], LSE [num_tokens, num_heads], no sinks."""
        keys, values = flat_kv(key_cache), flat_kv(value_cache)
        starts = self._start_rows.get(
            batch, keys.rows_per_slot, lambda: _start_rows(batch, keys.rows_per_slot)
        )
        return flash_forward(query, keys.rows, values.rows, starts, batch, layer)


def flash_forward(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets_k: torch.Tensor,
    batch: AttentionBatch,
    layer: LayerAttention,
    **paging: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's operator: output [num_tokens, num_heads, head_dim], LSE [num_tokens, num_heads].

    Args:
        keys, values: rows [num_rows, num_kv_heads, head_dim], or blocks where `paging` is given.
        offsets_k: int32 [num_seqs + 1], first row of each sequence.
        paging: `block_table`, for an operator that takes one.
    """
    assert layer.softcap is None, "refused at load: capabilities.softcap is False"
    # A window no sequence has outgrown hides nothing, and only without one does the kernel
    # fold GQA groups and split long contexts at decode.
    window = layer.window
    if window is not None and window >= batch.max_seqlen_k:
        window = None
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        keys,
        values,
        batch.cu_seqlens_q,
        offsets_k,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        0.0,  # dropout
        True,  # causal, aligned to the last key of each sequence
        False,  # debug mask
        scale=layer.scale,
        # The kernel counts the keys left of a query's own.
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=batch.seqused_k,
        **paging,
    )
    return out, lse.T  # the kernel's is [num_heads, num_tokens]


def flat_kv(cache: torch.Tensor) -> FlatKV:
    """See a cache as rows of one token each, `rows_per_slot` apart from slot to slot.

    Raises UnsupportedAttention where the strides do not allow it, or the rows outgrow int32.
    """
    num_slots, max_len, num_kv_heads, head_dim = cache.shape
    slot_stride, row_stride, head_stride, _ = cache.stride()
    rows_per_slot, remainder = divmod(slot_stride, row_stride)
    if remainder:
        raise UnsupportedAttention(
            f"torch_flash: the slot stride {slot_stride} is no whole number of token rows of "
            f"{row_stride} elements"
        )
    num_rows = (num_slots - 1) * rows_per_slot + max_len
    if num_rows >= MAX_ROWS:
        raise UnsupportedAttention(
            f"torch_flash: {num_slots} slots of {rows_per_slot} token rows are {num_rows} rows, "
            f"and start rows must fit int32; use fewer or shorter slots"
        )
    shape = (num_rows, num_kv_heads, head_dim)
    return FlatKV(cache.as_strided(shape, (row_stride, head_stride, 1)), rows_per_slot)


def _start_rows(batch: AttentionBatch, rows_per_slot: int) -> torch.Tensor:
    """First row of each sequence's slot, int32 [num_seqs + 1].

    The kernel wants as many offsets as for a packed batch; the last one is not read.
    """
    starts = torch.zeros_like(batch.cu_seqlens_q)
    starts[:-1] = batch.slot_ids * rows_per_slot
    return starts
