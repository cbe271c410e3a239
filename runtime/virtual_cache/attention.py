"""Attention of ours for models outside the engine: `attn_implementation="vkv"`.

A function of `transformers`' AttentionInterface, and beside it one that makes masks. It gives what
`sdpa` gives, or `eager` where a model has a soft cap or sinks, over any of `transformers`' caches
and over none. On a CPU, wherever each token sees just all before it, the `native` kernels read keys
and values once for all query heads that share them; `sdpa` copies them for each head there.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from ...attention_backends import AttentionBatch, LayerAttention
from ...attention_backends.native import DTYPES, NativeBackend
from ...vmem.errors import UnsupportedAttention

ATTENTION = "vkv"
# What models pass beside a dense mask where attention is neither "eager" nor "sdpa": the keys that
# an indexer chose for each query, and sinks of each query's own.
_NOT_COMPUTED = ("indices", "block_indices", "sinks")
_OF_SDPA = ("position_bias", "cache")  # which it takes without a soft cap or sinks


def vkv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """The mask that `sdpa` would be given; None where each token sees just all before it.

    For `transformers`' AttentionMaskInterface, whose arguments it has. Raises UnsupportedAttention
    for a model that does not take such masks.
    """
    is_traced = _is_traced(attention_mask)
    if not is_traced:
        _check_takes_masks(type(config))
    may_skip = allow_is_causal_skip and not is_traced
    may_skip = may_skip and bool(q_offset + q_length == kv_offset + kv_length)
    if (
        may_skip
        and (attention_mask is None or _all_seen(attention_mask, kv_offset + kv_length))
        and (
            mask_function is causal_mask_function
            or (q_length == 1 and _sees(mask_function, batch_size, q_offset, kv_offset, device))
        )
    ):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=may_skip,
        device=device,
        **others,
    )


@cache
def _check_takes_masks(config: type) -> None:
    """Refuse models that `transformers` would refuse "sdpa", of which masks are made here.

    It asks nothing for functions that it does not know. Attention of a model's own would add up
    logits and a mask of bools, or have none, and layers that do not say that they are causal see
    what comes after.
    """
    models: Any = AutoModel._model_mapping
    model = models.get(config, None)
    model = model[0] if isinstance(model, tuple) else model
    if model is None or (
        model._can_set_attn_implementation()
        and (model._supports_sdpa or model._supports_attention_backend)
    ):
        return
    raise UnsupportedAttention(
        f'{model.__name__} works neither with "sdpa" nor with functions like it, so that '
        'attn_implementation="vkv" would compute something else; use "eager"'
    )


def _is_traced(tensor: torch.Tensor | None) -> bool:
    """Whether what is done with `tensor` becomes a graph, of operations of PyTorch alone."""
    return is_tracing(tensor) or get_proxy_mode() is not None


def _all_seen(attention_mask: torch.Tensor, num_tokens: int) -> bool:
    return attention_mask.shape[-1] >= num_tokens and bool(attention_mask.all())


def _sees(
    mask_function: Callable[..., Any],
    batch: int,
    query: int,
    key: int,
    device: torch.device | str,
) -> bool:
    """Whether a token sees the first key that is left, and so, of a window or chunk, all others."""
    rows = torch.arange(batch, device=device)
    zero = torch.zeros((), dtype=torch.long, device=device)
    return bool(torch.as_tensor(mask_function(rows, zero, zero + query, zero + key)).all())


def vkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, for `transformers`' AttentionInterface, whose arguments it has.

    Args:
        query: [batch, num_heads, num_queries, head_dim], those of the last of the tokens.
        key, value: [batch, num_kv_heads, num_tokens, head_dim], of any strides: what a
            `VirtualCache` holds is read where it lies. A batch of 1 serves for any other.
        attention_mask: as `vkv_mask` makes it.
        others: `softcap` and `s_aux` (sinks) of those that have them.

    Returns:
        [batch, num_queries, num_heads, value_head_dim], and no attention weights.

    Raises UnsupportedAttention for keys chosen by an indexer, or sinks for every token; for a
    `position_bias` or a paged `cache` beside a soft cap or sinks, without which `sdpa` has both.
    """
    _refuse(module, others, _NOT_COMPUTED)
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        query, key, value = _broadcast(query, key, value)
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    layer = LayerAttention(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=others.get("softcap"),
        sinks=others.get("s_aux"),
    )
    asked = [name for name in _OF_SDPA if others.get(name) is not None]
    unmasked = attention_mask is None and "cache" not in asked
    unmasked = unmasked and (is_causal or query.shape[2] == 1)
    plain = unmasked and not dropout and not asked
    if plain and _native_can(query, key, value, layer):
        return _natively(query, key, value, layer), None
    if layer.softcap is not None or layer.sinks is not None:
        _refuse(module, others, _OF_SDPA, " beside a soft cap or sinks")
        return _eagerly(query, key, value, attention_mask, layer, is_causal, dropout), None
    if plain and query.is_cpu and query.shape[2] == 1:
        return _folded(query, key, value, layer.scale), None
    if unmasked and 1 < query.shape[2] < key.shape[2]:  # `sdpa` would see the first keys alone
        attention_mask = _causal(query, key)
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **others,
    )


def _refuse(
    module: torch.nn.Module, others: Mapping[str, Any], names: Sequence[str], beside: str = ""
) -> None:
    """Refuse a module that passes what is not computed."""
    if asked := [name for name in names if others.get(name) is not None]:
        raise UnsupportedAttention(
            f"{type(module).__name__} asks for {' and '.join(asked)}{beside}, which "
            'attn_implementation="vkv" does not compute; use "eager"'
        )


def _broadcast(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """States [batch or 1, heads, tokens, dim] of one batch: as in `sdpa`, one serves for all."""
    (batch,) = torch.broadcast_shapes(*(part.shape[:1] for part in states))
    return tuple(part.expand(batch, -1, -1, -1) for part in states)


# -- three ways to compute it --------------------------------------------------------------------


@cache
def _has_kernels() -> bool:
    """Asked when there is something to attend to, and once: they may have to be compiled."""
    return NativeBackend.unavailable_reason() is None


class _Native(threading.local):
    """The kernels for a thread, and what they were told of the shapes that it met last."""

    MOST_SHAPES = 4  # layers of a step have one or two

    def __init__(self) -> None:
        self.batches: dict[tuple[int, int, int], AttentionBatch] = {}

    @cached_property
    def backend(self) -> NativeBackend:
        return NativeBackend()

    def batch(self, batch: int, num_queries: int, num_tokens: int) -> AttentionBatch:
        shape = batch, num_queries, num_tokens
        if shape not in self.batches:
            while len(self.batches) >= self.MOST_SHAPES:
                del self.batches[next(iter(self.batches))]
            self.batches[shape] = _rows(*shape)
        return self.batches[shape]


_native = _Native()


def _native_can(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
) -> bool:
    """Whether the kernels take these; they have no gradient."""
    tensors = query, key, value, *(() if layer.sinks is None else (layer.sinks,))
    return (
        query.is_cpu
        and query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and key.stride(-1) == value.stride(-1) == 1
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not _is_traced(query)
        and _has_kernels()
    )


def _natively(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
) -> torch.Tensor:
    batch, _, num_queries, _ = query.shape
    out = _native.backend.forward(
        query.transpose(1, 2).flatten(0, 1),  # [batch · num_queries, heads, head_dim]
        key.transpose(1, 2),
        value.transpose(1, 2),
        _native.batch(batch, num_queries, key.shape[2]),
        layer,
    )
    return out.unflatten(0, (batch, num_queries))


def _rows(batch: int, num_queries: int, num_tokens: int) -> AttentionBatch:
    """A batch of rows of equal length, each of which is a slot."""
    nowhere = torch.empty(0, dtype=torch.int64)  # nothing is stored
    return AttentionBatch(
        query_lens=(num_queries,) * batch,
        kv_lens=(num_tokens,) * batch,
        slots=tuple(range(batch)),
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32) * num_queries,
        seqused_k=torch.full((batch,), num_tokens, dtype=torch.int32),
        slot_ids=torch.arange(batch, dtype=torch.int32),
        write_index=(nowhere, nowhere),
    )


def _folded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Of one token a row: heads that share keys are queries that share them."""
    batch, num_heads, _, dim = query.shape
    folded = query.reshape(batch, key.shape[1], -1, dim)
    out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, scale=scale)
    return out.reshape(batch, 1, num_heads, -1)


def _eagerly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    layer: LayerAttention,
    is_causal: bool,
    dropout: float,
) -> torch.Tensor:
    """Step by step, in float32 where it matters, with a soft cap and sinks."""
    groups = query.shape[1] // key.shape[1]
    if mask is None and is_causal and query.shape[2] > 1:
        mask = _causal(query, key)
    logits = query @ repeat_kv(key, groups).transpose(2, 3) * layer.scale
    if layer.softcap is not None:
        logits = torch.tanh(logits / layer.softcap) * layer.softcap
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        logits = (
            logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
            if mask.dtype == torch.bool
            else logits + mask
        )
    if layer.sinks is not None:
        sinks = layer.sinks.to(logits.dtype).view(1, -1, 1, 1)
        logits = torch.cat([logits, sinks.expand(*logits.shape[:3], 1)], dim=-1)
    weights = logits.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[2]]
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ repeat_kv(value, groups)).transpose(1, 2)


def _causal(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Which keys the last tokens see, bool [1, 1, num_queries, num_tokens]."""
    num_queries, num_tokens = query.shape[2], key.shape[2]
    ones = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=query.device)
    return ones.tril(num_tokens - num_queries)[None, None]


def register() -> None:
    """Make the name known to `transformers`. Registering twice is harmless."""
    AttentionInterface.register(ATTENTION, vkv_attention)
    AttentionMaskInterface.register(ATTENTION, vkv_mask)


register()
