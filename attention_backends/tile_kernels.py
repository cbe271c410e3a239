"""Attention of one tile: some queries of one sequence over a run of its keys.

Every kernel takes queries [m, num_kv_heads, group, head_dim] and keys and values
[1, num_kv_heads, num_keys, head_dim], strided views of the cache, and returns the output
[m, num_kv_heads, group, value_head_dim] and the natural log-sum-exp [m, num_kv_heads, group],
normalised over the tile's own keys.
"""

from typing import Protocol

import torch
from torch.nn.functional import pad

from .base import LayerAttention
from .tiles import Mask, Tile, hidden_keys

Partial = tuple[torch.Tensor, torch.Tensor]


class TileKernel(Protocol):
    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tile: Tile,
        layer: LayerAttention,
    ) -> Partial: ...


def flash_cpu(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tile: Tile,
    layer: LayerAttention,
) -> Partial:
    """PyTorch's CPU flash kernel, which returns the log-sum-exp. No softcap.

    It wants equal head sizes, so the smaller of two is padded with zeros, and it divides by the
    number of keys: a tile never has none.
    """
    value_dim = values.shape[-1]
    width = max(query.shape[-1], value_dim)
    query, keys, values = (_padded(part, width) for part in (query, keys, values))
    if tile.mask is Mask.NONE:
        out, lse = _folded(query, keys, values, layer.scale)
    else:
        out, lse = _group_as_batch(query, keys, values, tile, layer)
    return out[..., :value_dim], lse


def _folded(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> Partial:
    """All keys visible: the group's heads become more query rows, and K and V are read once."""
    num_queries, num_kv_heads, group, head_dim = query.shape
    rows = query.transpose(0, 1).reshape(1, num_kv_heads, num_queries * group, head_dim)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, keys, values, 0.0, False, scale=scale
    )
    # [1, num_kv_heads, m * group, ...] -> [m, num_kv_heads, group, ...]
    return (
        out[0].unflatten(1, (num_queries, group)).transpose(0, 1),
        lse[0].unflatten(1, (num_queries, group)).transpose(0, 1),
    )


def _group_as_batch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tile: Tile,
    layer: LayerAttention,
) -> Partial:
    """A mask ties queries to positions, so the group's heads become the batch instead."""
    num_queries, _, group, _ = query.shape
    mask = None
    if tile.mask is Mask.BAND:
        hidden = hidden_keys(num_queries, keys.shape[2], tile.offset, layer.window, query.device)
        mask = query.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.permute(2, 1, 0, 3),  # [group, num_kv_heads, m, head_dim]
        keys.expand(group, -1, -1, -1),
        values.expand(group, -1, -1, -1),
        0.0,
        tile.mask is Mask.CAUSAL,
        attn_mask=mask,
        scale=layer.scale,
    )
    return out.permute(2, 1, 0, 3), lse.permute(2, 1, 0)


def _padded(tensor: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - tensor.shape[-1]
    return pad(tensor, (0, missing)) if missing else tensor


def materialised(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tile: Tile,
    layer: LayerAttention,
) -> Partial:
    """Two matrix products with the logits in between, in float32 or wider: any feature, any
    device, any head sizes. Queries that see no key of the tile come back with an LSE of -inf.
    """
    num_queries, num_kv_heads, group, head_dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = query.permute(1, 2, 0, 3).to(wide).reshape(num_kv_heads, group * num_queries, head_dim)
    cap = layer.softcap or 1.0
    logits = (rows * (layer.scale / cap)) @ keys[0].to(wide).mT  # [num_kv_heads, group * m, keys]
    if layer.softcap is not None:
        logits = logits.tanh_().mul_(cap)
    if tile.mask is not Mask.NONE:
        hidden = hidden_keys(num_queries, keys.shape[2], tile.offset, layer.window, query.device)
        logits.unflatten(1, (group, num_queries)).masked_fill_(hidden, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ values[0].to(wide)).div_(total)
    lse = total.log_().add_(top)
    # [num_kv_heads, group * m, ...] -> [m, num_kv_heads, group, ...]
    return (
        out.unflatten(1, (group, num_queries)).permute(2, 0, 1, 3),
        lse.squeeze(-1).unflatten(1, (group, num_queries)).permute(2, 0, 1),
    )
