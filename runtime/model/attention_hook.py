"""Where an unmodified Hugging Face model meets the KV cache.

One attention function is registered with `transformers` under the name `vkv_slots`. A model loaded
with `attn_implementation="vkv_slots"` calls it in every layer; it writes the layer's new keys and
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
from .segments import SegmentedStep

ATTENTION_NAME = "vkv_slots"

# Keywords that models pass along and that change nothing here, whatever they say.
_HARMLESS = frozenset(
    {
        "cache_position",  # where keys are written, which slots know
        "deterministic",  # of flash attention's backward pass
        "logits_to_keep",  # of the output layer
        "num_items_in_batch",  # of the loss
        "output_hidden_states",  # collected by the model
        "output_router_logits",  # collected by the model
        "position_ids",  # rotary embeddings were applied to queries and keys
        "return_dict",  # of the model
        "use_cache",  # slots are the cache
    }
)
# Keywords that ask for nothing at this value.
_AT_REST: dict[str, bool | float] = {
    "dropout": 0.0,
    "is_causal": True,
    "output_attentions": False,
}


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
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of `transformers`' AttentionInterface.

    Args:
        query, key, value: [1, heads, num_tokens, head_dim]: one flat batch; or, of a model with
            recurrent state, [B, heads, 1, head_dim]: a token of each of B requests.
        sliding_window, softcap, s_aux: what some architectures pass per layer.
        others: keywords known to change nothing.

    Returns:
        [1, num_tokens, num_heads, value_head_dim] or [B, 1, …], and no attention weights.

    Raises UnsupportedModel for what slots cannot honour: a mask, attention both ways, or a keyword
    that is not known.
    """
    step = _current.get()
    if step is None:
        raise InvalidOperation(
            "this model was prepared for vkv and runs inside vkv.LLM only; load another copy, or "
            "call model.set_attn_implementation('sdpa'), or 'vkv', to use it on its own"
        )
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise UnsupportedModel(
            f"{type(module).__name__} does not simply attend to the tokens before: it "
            + ("masks them its own way" if attention_mask is not None else "is not causal")
            + "; use a model with causal or sliding-window attention"
        )
    _refuse_unknown(module, others)
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


def _refuse_unknown(module: torch.nn.Module, keywords: dict[str, Any]) -> None:
    """Refuse a keyword that asks for something, such as a position bias or chosen keys."""
    for name, value in keywords.items():
        if value is None or name in _HARMLESS:
            continue
        if not isinstance(value, torch.Tensor) and _AT_REST.get(name) == value:
            continue
        shown = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise UnsupportedModel(
            f"{type(module).__name__} passes attention {name} ({shown}), which attention over "
            "slots does not know and would leave out; use a model with plain causal or "
            "sliding-window attention"
        )


def register() -> None:
    """Make the name known to `transformers`. Registering twice is harmless."""
    AttentionInterface.register(ATTENTION_NAME, vkv_attention)


@dataclass
class CacheStep:
    """One step of a real model: writes keys and values, then attends over the slots.

    Attributes:
        segmented: attends, too, to the first tokens of requests that are longer than the pool.
    """

    cache: SlotCache
    backend: AttentionBackend
    batch: AttentionBatch
    layers: tuple[LayerAttention, ...]
    segmented: SegmentedStep | None = None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        wanted: LayerAttention,
    ) -> torch.Tensor:
        keys, values = self.cache.layer(layer)  # `wanted` was learned at load, for all layers
        self.backend.store(key, value, keys, values, self.batch)
        if self.segmented is not None:
            return self.segmented.attend(layer, query, keys, values, self.layers[layer])
        return self.backend.forward(query, keys, values, self.batch, self.layers[layer])
