"""Where an unmodified Hugging Face model meets the KV cache.

One attention function is registered with `transformers` under the name `vkv`. A model loaded
with `attn_implementation="vkv"` calls it in every layer; it writes the layer's new keys and
values into the slots and asks the attention backend for the result. The name is deliberately
not in `transformers`' mask interface, so that no mask is built.

What a layer needs beyond its own tensors, the step, is found in a context variable: some
architectures drop keywords they do not know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from ...allocator import SlotCache
from ...attention_backends import AttentionBackend, AttentionBatch, LayerAttention
from ...vmem.errors import InvalidOperation, UnsupportedModel

ATTENTION_NAME = "vkv"


class AttentionStep(Protocol):
    """What handles attention while a model runs: a real step, or the probe at load."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        wanted: LayerAttention,
    ) -> torch.Tensor:
        """Attention of one layer over [num_tokens, heads, head_dim] tensors."""
        ...


_current: ContextVar[AttentionStep | None] = ContextVar("vkv_attention_step", default=None)


@contextmanager
def attention_step(step: AttentionStep) -> Iterator[None]:
    """Let `step` answer the attention calls of models run inside."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def vkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of `transformers`' AttentionInterface.

    Args:
        query, key, value: [1, heads, num_tokens, head_dim]: one flat batch; or, of a model with
            recurrent state, [B, heads, 1, head_dim]: a token of each of B requests.
        sliding_window, softcap, s_aux: what some architectures pass per layer.

    Returns:
        [1, num_tokens, num_heads, value_head_dim] or [B, 1, …], and no attention weights.

    Raises UnsupportedModel for what slots cannot honour: a mask, or attention both ways.
    """
    step = _current.get()
    if step is None:
        raise InvalidOperation(
            "this model was prepared for vkv and runs inside vkv.LLM only; load another copy, or "
            "call model.set_attn_implementation('sdpa') to use it on its own"
        )
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise UnsupportedModel(
            f"{type(module).__name__} does not simply attend to the tokens before: it "
            + ("masks them its own way" if attention_mask is not None else "is not causal")
            + "; use a model with causal or sliding-window attention"
        )
    wanted = LayerAttention(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    out = step.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query.transpose(1, 2).flatten(0, 1),  # [num_tokens, heads, head_dim]
        key.transpose(1, 2).flatten(0, 1),
        value.transpose(1, 2).flatten(0, 1),
        wanted,
    )
    return out.unsqueeze(0 if len(query) == 1 else 1), None


def register() -> None:
    """Make the name known to `transformers`. Registering twice is harmless."""
    AttentionInterface.register(ATTENTION_NAME, vkv_attention)


@dataclass
class CacheStep:
    """One step of a real model: writes keys and values, then attends over the slots."""

    cache: SlotCache
    backend: AttentionBackend
    batch: AttentionBatch
    layers: tuple[LayerAttention, ...]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        wanted: LayerAttention,
    ) -> torch.Tensor:
        keys, values = self.cache.layer(layer)
        self.backend.store(key, value, keys, values, self.batch)
        return self.backend.forward(query, keys, values, self.batch, self.layers[layer])
