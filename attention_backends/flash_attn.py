"""The FlashAttention packages over contiguous slots, for those who have them.

Both take the cache as it is, `[num_slots, max_len, num_kv_heads, head_dim]` with any strides, and
a slot number a sequence (`cache_batch_idx`), so that no row arithmetic is needed.

Written against the signatures of flash-attn 2.8 and of FlashAttention-3's `hopper/` interface;
run on no GPU yet.
"""

from abc import abstractmethod
from dataclasses import replace
from importlib import import_module
from typing import NamedTuple

import torch

from .base import AttentionBackend, AttentionBatch, Capabilities, LayerAttention, PerStep
from .cuda import HOPPER, missing_gpu, missing_package
from .paged import check_block_size
from .sinks import apply_sinks, sinks_lse


class _FlashAttnPackage(AttentionBackend):
    """What the two packages share: sinks by log-sum-exp around one kernel call."""

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

    @abstractmethod
    def _flash(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [num_tokens, num_heads, dim], LSE [num_tokens, num_heads], sinks left aside."""


class _Run(NamedTuple):
    """Neighbouring sequences with the same number of queries: one call of the kernel."""

    queries: slice  # of the flat ones
    sequences: slice
    query_len: int
    max_len: int  # tokens of the longest of them


class FlashAttnBackend(_FlashAttnPackage):
    """FlashAttention-2. Its cache interface wants equally many queries a sequence, so a step is
    one call for the decodes and one for each prompt chunk.
    """

    name = "flash_attn"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        max_head_dim=256,
        head_dim_multiple=8,
        unequal_head_dims=False,
    )

    def __init__(self) -> None:
        self._kernel = import_module("flash_attn").flash_attn_with_kvcache
        self._runs: PerStep[list[_Run]] = PerStep()

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return missing_gpu() or missing_package("flash_attn", "pip install 'vkv[flash-attn]'")

    def _flash(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        for run in self._runs.get(batch, None, lambda: _equal_runs(batch)):
            part, part_lse = self._kernel(
                query[run.queries].unflatten(
                    0, (-1, run.query_len)
                ),  # [run, query_len, heads, dim]
                *self._cut(key_cache, value_cache, run.max_len),
                cache_seqlens=batch.seqused_k[run.sequences],
                **self._places(batch, run),
                softmax_scale=layer.scale,
                causal=True,
                window_size=_window_size(layer),
                softcap=layer.softcap or 0.0,
                return_softmax_lse=True,
            )
            out[run.queries] = part.flatten(0, 1)
            lse[run.queries] = part_lse.transpose(1, 2).flatten(
                0, 1
            )  # from [run, heads, query_len]
        return out, lse

    def _cut(
        self, key_cache: torch.Tensor, value_cache: torch.Tensor, max_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots as long as the longest sequence: into how many parts a context is split goes by how
        much a slot could hold."""
        return key_cache[:, :max_len], value_cache[:, :max_len]

    def _places(self, batch: AttentionBatch, run: _Run) -> dict[str, torch.Tensor]:
        """Where the keys of some sequences are, as the kernel is told."""
        return {"cache_batch_idx": batch.slot_ids[run.sequences]}


class PagedFlashAttnBackend(FlashAttnBackend):
    """The same kernel over a paged cache: what `flash_attn` is compared with."""

    name = "paged_flash_attn"
    capabilities = replace(
        FlashAttnBackend.capabilities, contiguous=False, paged=True, block_multiple=256
    )

    def check_cache(self, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
        check_block_size(self.name, key_cache, self.capabilities.block_multiple)

    def _cut(
        self, key_cache: torch.Tensor, value_cache: torch.Tensor, max_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks are all there; a step's tables are as long as its longest sequence."""
        return key_cache, value_cache

    def _places(self, batch: AttentionBatch, run: _Run) -> dict[str, torch.Tensor]:
        assert batch.block_tables is not None, "a paged backend reads block tables"
        return {"block_table": batch.block_tables[run.sequences]}


class FlashAttn3Backend(_FlashAttnPackage):
    """FlashAttention-3 (Hopper). One call takes the whole ragged step.

    It loads whole tiles of keys, past a sequence's length. Its tiles are 128 keys, or 176 for
    one query without a window, at head size 128; at other sizes they differ, so that only 128 is
    offered. The backed rows must be whole tiles of both kinds.
    """

    name = "flash_attn_3"
    capabilities = replace(
        FlashAttnBackend.capabilities,
        max_head_dim=128,
        head_dim_multiple=128,
        over_read_tokens=1408,  # lcm(128, 176)
    )

    def __init__(self) -> None:
        self._kernel = import_module("flash_attn_interface").flash_attn_with_kvcache

    @classmethod
    def unavailable_reason(cls) -> str | None:
        remedy = "build it from hopper/ in github.com/Dao-AILab/flash-attention"
        return missing_gpu(HOPPER) or missing_package("flash_attn_interface", remedy)

    def _flash(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self._kernel(
            query,
            # Into how many parts a context is split goes by how much a slot could hold.
            key_cache[:, : batch.max_seqlen_k],
            value_cache[:, : batch.max_seqlen_k],
            cache_seqlens=batch.seqused_k,
            cache_batch_idx=batch.slot_ids,
            cu_seqlens_q=batch.cu_seqlens_q,
            max_seqlen_q=batch.max_seqlen_q,
            softmax_scale=layer.scale,
            causal=True,
            window_size=_window_size(layer),
            softcap=layer.softcap or 0.0,
            return_softmax_lse=True,
        )
        return out, lse.T  # from [num_heads, num_tokens]


def _window_size(layer: LayerAttention) -> tuple[int, int]:
    """(keys left of the query's own, keys right of it); (-1, -1) is no window."""
    return (-1, -1) if layer.window is None else (layer.window - 1, 0)


def _equal_runs(batch: AttentionBatch) -> list[_Run]:
    runs, query_lens = [], batch.query_lens
    start = first = 0  # of the run: its first query, its first sequence
    for index, query_len in enumerate(query_lens):
        is_last = index + 1 == len(query_lens)
        if is_last or query_lens[index + 1] != query_len:
            stop = start + (index + 1 - first) * query_len
            sequences = slice(first, index + 1)
            runs.append(
                _Run(slice(start, stop), sequences, query_len, max(batch.kv_lens[sequences]))
            )
            start = stop
            first = index + 1
    return runs
