"""The slow, obvious truth every other backend is compared with."""

import torch

from .base import AttentionBackend, AttentionBatch, Capabilities, LayerAttention
from .paged import gather_blocks


class ReferenceBackend(AttentionBackend):
    """Softmax attention as the textbook writes it, a sequence and a head at a time, in float64.

    Reads contiguous slots, or a paged cache where the batch has block tables.
    """

    name = "reference"
    capabilities = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
        paged=True,
    )

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
        result, _ = self.forward_lse(query, key_cache, value_cache, batch, layer)
        return result if out is None else out.copy_(result)

    def forward_lse(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_heads, _ = query.shape
        group = num_heads // key_cache.shape[2]
        out = query.new_empty(num_tokens, num_heads, value_cache.shape[3])
        lse = query.new_empty(num_tokens, num_heads, dtype=torch.float32)
        row = 0
        for sequence, length in enumerate(batch.query_lens):
            keys, values = _sequence_kv(key_cache, value_cache, batch, sequence)
            rows = slice(row, row + length)
            for head in range(num_heads):
                sink = None if layer.sinks is None else layer.sinks[head].double()
                out[rows, head], lse[rows, head] = _attend(
                    query[rows, head].double(),
                    keys[:, head // group].double(),
                    values[:, head // group].double(),
                    layer,
                    sink,
                )
            row += length
        return out, lse


def _sequence_kv(
    key_cache: torch.Tensor, value_cache: torch.Tensor, batch: AttentionBatch, sequence: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence, each [kv_len, num_kv_heads, head_dim]."""
    kv_len = batch.kv_lens[sequence]
    if batch.block_tables is None:
        slot = batch.slots[sequence]
        return key_cache[slot, :kv_len], value_cache[slot, :kv_len]
    table = batch.block_tables[sequence]
    return gather_blocks(key_cache, table, kv_len), gather_blocks(value_cache, table, kv_len)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: LayerAttention,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One head of one sequence: [n, head_dim] over [kv_len, head_dim] -> [n, value_dim], [n]."""
    logits = query @ keys.T * layer.scale  # [n, kv_len]
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    query_len, kv_len = logits.shape
    position = torch.arange(kv_len - query_len, kv_len, device=query.device).unsqueeze(1)
    key = torch.arange(kv_len, device=query.device)
    hidden = key > position
    if layer.window is not None:
        hidden |= key <= position - layer.window
    logits = logits.masked_fill(hidden, -torch.inf)
    if sink is not None:  # takes probability as one more key would, but has no value
        logits = torch.cat([logits, sink.expand(query_len, 1)], dim=1)
    weights = logits.softmax(dim=1)[:, :kv_len]
    return weights @ values, logits.logsumexp(dim=1)
