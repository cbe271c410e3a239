"""FlashAttention-2 as PyTorch ships it, straight over contiguous slots: the CUDA default.

The variable-length kernel takes keys and values as one flat run of rows. Given the lengths in
`seqused_k`, it reads of the key offsets only where each sequence starts, so any slots in any
order are a valid "packed" batch: start row = slot · rows per slot. Nothing is copied, and no
package is needed.

Only where each sequence has one query does the kernel read KV once for all query heads of a KV
head, and split long contexts. So decodes that come before the chunks of a step have a call of
their own.

Softcap is not reachable through PyTorch's operator. Sinks are applied to the result by its
log-sum-exp, which the kernel returns anyway.
"""

from dataclasses import dataclass
from itertools import takewhile
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
        self._parts: PerStep[list[Part]] = PerStep()

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
        parts = self._parts.get(
            batch,
            keys.rows_per_slot,
            lambda: cut_batch(batch, _start_rows(batch, keys.rows_per_slot)),
        )
        return flash_forward(query, keys.rows, values.rows, parts, layer)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Neighbouring sequences of a step, for one call of the operator.

    Attributes:
        queries: of the flat ones.
        cu_seqlens_q: int32 [num_seqs + 1], from 0 on.
        offsets_k: int32 [num_seqs + 1], first row of each sequence.
        seqused_k: int32 [num_seqs].
        max_seqlen_q, max_seqlen_k: of these sequences.
        paging: `block_table`, for an operator that takes one.
    """

    queries: slice
    cu_seqlens_q: torch.Tensor
    offsets_k: torch.Tensor
    seqused_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    paging: dict[str, torch.Tensor]


def cut_batch(batch: AttentionBatch, offsets_k: torch.Tensor) -> list[Part]:
    """The decodes that a step begins with, and what comes after them; one part if it is all alike.

    A recorded step is one of decodes alone, and goes by nothing but its tensors and bounds.
    """
    num_decodes = sum(1 for _ in takewhile((1).__eq__, batch.query_lens))
    if num_decodes in (0, batch.num_seqs):
        return [_part(batch, offsets_k, 0, batch.num_seqs)]
    return [
        _part(batch, offsets_k, 0, num_decodes),
        _part(batch, offsets_k, num_decodes, batch.num_seqs),
    ]


def _part(batch: AttentionBatch, offsets_k: torch.Tensor, first: int, stop: int) -> Part:
    """Sequences `first … stop`, before which there are decodes alone."""
    is_all = (first, stop) == (0, batch.num_seqs)
    lens = batch.query_lens[first:stop]
    offsets_q = batch.cu_seqlens_q if is_all else batch.cu_seqlens_q[first : stop + 1]
    tables = batch.block_tables
    return Part(
        queries=slice(first, first + sum(lens)),
        cu_seqlens_q=offsets_q - first if first else offsets_q,
        offsets_k=offsets_k if is_all else offsets_k[first : stop + 1],
        seqused_k=batch.seqused_k if is_all else batch.seqused_k[first:stop],
        max_seqlen_q=max(lens),
        max_seqlen_k=max(batch.kv_lens[first:stop]),
        paging={} if tables is None else {"block_table": tables[first:stop]},
    )


def flash_forward(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    parts: list[Part],
    layer: LayerAttention,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's operator: output [num_tokens, num_heads, head_dim], LSE [num_tokens, num_heads].

    Args:
        keys, values: rows [num_rows, num_kv_heads, head_dim], or blocks where there are tables.
        parts: of the step, as they follow one another; each is a call.
    """
    if len(parts) == 1:
        out, lse = _call(query, keys, values, parts[0], layer)
        return out, lse.T  # the kernel's is [num_heads, num_tokens]
    done = [_call(query[part.queries], keys, values, part, layer) for part in parts]
    outs, lses = zip(*done, strict=True)
    return torch.cat(outs), torch.cat(lses, dim=1).T


def _call(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    part: Part,
    layer: LayerAttention,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [num_tokens, num_heads, head_dim], LSE [num_heads, num_tokens]."""
    assert layer.softcap is None, "refused at load: capabilities.softcap is False"
    # A window no sequence has outgrown hides nothing, and only without one does the kernel
    # fold GQA groups and split long contexts at decode.
    window = layer.window
    if window is not None and window >= part.max_seqlen_k:
        window = None
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        keys,
        values,
        part.cu_seqlens_q,
        part.offsets_k,
        part.max_seqlen_q,
        part.max_seqlen_k,
        0.0,  # dropout
        True,  # causal, aligned to the last key of each sequence
        False,  # debug mask
        scale=layer.scale,
        # The kernel counts the keys left of a query's own.
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=part.seqused_k,
        **part.paging,
    )
    return out, lse


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
