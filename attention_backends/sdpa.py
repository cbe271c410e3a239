"""PyTorch's own attention over contiguous slots, a sequence at a time.

Decode folds each group of query heads into query rows, so that a KV head is read once for all of
them. A prompt chunk is cut into tiles (`tiles.py`) that need no mask wherever possible. The CPU
uses the flash kernel with its log-sum-exp; softcap, and prompt chunks on other devices, use
plain matrix products over bounded tiles.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from .base import AttentionBackend, AttentionBatch, Capabilities, LayerAttention, PerStep
from .merge import merge_attention
from .sinks import apply_sinks, sinks_lse
from .tile_kernels import TileKernel, flash_cpu, materialised
from .tiles import SequencePlan, StepPlan, plan_step


class SdpaBackend(AttentionBackend):
    name = "sdpa"
    capabilities = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    )

    def __init__(self) -> None:
        self._plans: PerStep[StepPlan] = PerStep()

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return None

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if out is None:
            out = query.new_empty(*query.shape[:2], value_cache.shape[3])
        if layer.sinks is not None:
            lse = self._attend_lse(query, key_cache, value_cache, batch, layer, out)
            return apply_sinks(out, lse, layer.sinks)
        plan = self._plan(query, batch, layer)
        if plan.decode_only and layer.softcap is None and _is_fused(query, value_cache):
            return self._decode(query, key_cache, value_cache, batch, layer, plan, out)
        self._attend(query, key_cache, value_cache, batch, layer, out, None)
        return out

    def forward_lse(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = query.new_empty(*query.shape[:2], value_cache.shape[3])
        lse = self._attend_lse(query, key_cache, value_cache, batch, layer, out)
        if layer.sinks is not None:
            apply_sinks(out, lse, layer.sinks)
            lse = sinks_lse(lse, layer.sinks)
        return out, lse

    def _view(self, cache: torch.Tensor, batch: AttentionBatch, plan: SequencePlan) -> torch.Tensor:
        """One sequence's keys or values, [1, num_kv_heads, kv_len - first_key, head_dim]."""
        slot = plan.slot
        return cache[slot : slot + 1, plan.first_key : plan.kv_len].transpose(1, 2)

    def _plan(self, query: torch.Tensor, batch: AttentionBatch, layer: LayerAttention) -> StepPlan:
        bounded = layer.softcap is not None or query.device.type != "cpu"
        return self._plans.get(
            batch,
            (layer.window, bounded),
            lambda: plan_step(batch, layer.window, bounded=bounded),
        )

    def _decode(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
        plan: StepPlan,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """One query a sequence: the group of heads as query rows, one fused call each."""
        grouped = _grouped(query, key_cache.shape[2])  # [num_seqs, num_kv_heads, group, head_dim]
        parts = [
            scaled_dot_product_attention(
                grouped[sequence.index : sequence.index + 1],
                self._view(key_cache, batch, sequence),
                self._view(value_cache, batch, sequence),
                scale=layer.scale,
            )
            for sequence in plan.sequences
        ]
        _grouped(out, key_cache.shape[2]).copy_(torch.cat(parts))
        return out

    def _attend_lse(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Fill `out`, sinks left aside; return the LSE, float32 [num_tokens, num_heads]."""
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        self._attend(query, key_cache, value_cache, batch, layer, out, lse)
        return lse

    def _attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Fill `out`, and `lse` if given, sequence by sequence and tile by tile."""
        plan = self._plan(query, batch, layer)
        plain = layer.softcap is None and query.device.type == "cpu"
        kernel: TileKernel = flash_cpu if plain else materialised
        num_kv_heads = key_cache.shape[2]
        query, out = _grouped(query, num_kv_heads), _grouped(out, num_kv_heads)
        lse = None if lse is None else lse.unflatten(1, (num_kv_heads, -1))
        for sequence in plan.sequences:
            keys = self._view(key_cache, batch, sequence)
            values = self._view(value_cache, batch, sequence)
            for block in sequence.blocks:
                queries = query[block.queries]
                parts = [
                    kernel(queries, keys[:, :, tile.keys], values[:, :, tile.keys], tile, layer)
                    for tile in block.tiles
                ]
                if len(parts) == 1:
                    block_out, block_lse = parts[0]
                else:
                    block_out, block_lse = merge_attention(*zip(*parts, strict=True))
                out[block.queries] = block_out
                if lse is not None:
                    lse[block.queries] = block_lse


def _grouped(heads: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[num_tokens, num_heads, d] -> [num_tokens, num_kv_heads, group, d], a view."""
    return heads.unflatten(1, (num_kv_heads, -1))


def _is_fused(query: torch.Tensor, value_cache: torch.Tensor) -> bool:
    """Whether PyTorch has a fused kernel; on a CPU it needs equal head sizes."""
    return query.device.type != "cpu" or query.shape[2] == value_cache.shape[3]
