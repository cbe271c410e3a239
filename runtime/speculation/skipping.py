"""A model with some of its layers left out: the same modules, weights and places of layers."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...attention_backends import LayerAttention
from ...vmem.errors import InvalidConfig, UnsupportedModel
from ..model.forward import Forward
from ..model.probing import probe_outputs

_NUM_TOKENS = 64  # that layers are compared by
_SEED = 0


def without_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model that runs the layers `kept` alone, in order; nothing is copied but what holds them.

    Each layer keeps its number, and so its place in a cache. Raises InvalidConfig if the model
    does not run without the others.
    """
    path, layers = _layers_of(model)
    twin: Any = _twin(model)
    holder: Any = twin
    for name in path[:-1]:
        part = _twin(getattr(holder, name))
        holder._modules[name] = part
        holder = part
    holder._modules[path[-1]] = nn.ModuleList([layers[index] for index in kept])
    _shorten(holder, kept)
    try:
        probe_outputs(twin)
    except UnsupportedModel as error:
        raise InvalidConfig(
            f"speculative is 'surrogate', but {type(model).__name__} does not run without some of "
            f"its layers: {error}; use 'ngram' or a draft model"
        ) from error
    return twin


def least_needed(model: PreTrainedModel, num_kept: int, vocab_size: int) -> list[int]:
    """The layers that are left if those go that change least what they are given.

    A layer's influence is one less the cosine between what goes in and what comes out, here over
    random tokens. The first layer stays.

    Source: block influence, arXiv:2403.03853, section 3.1.
    """
    _, layers = _layers_of(model)
    influences = [0.0] * len(layers)
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(vocab_size, (1, _NUM_TOKENS), generator=generator).to(model.device)
    positions = torch.arange(_NUM_TOKENS, device=model.device)[None]
    with torch.inference_mode(), _measuring(layers, influences):
        Forward(model)(ids, positions, _PlainAttention())
    first, *others = range(len(layers))
    others.sort(key=lambda index: -influences[index])
    return sorted([first, *others[: num_kept - 1]])


def num_layers(model: PreTrainedModel) -> int:
    """Layers that could be left out. Raises InvalidConfig if it is not known which those are."""
    return len(_layers_of(model)[1])


def _layers_of(model: PreTrainedModel) -> tuple[list[str], nn.ModuleList]:
    """The path and list of a model's layers."""
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _attend(module)
    ]
    if len(found) != 1:
        raise InvalidConfig(
            f"speculative is 'surrogate', but {type(model).__name__} has {len(found)} lists of "
            f"{count} layers that attend, and one is needed; use 'ngram' or a draft model"
        )
    name, layers = found[0]
    return name.split("."), layers


def _attend(layers: nn.ModuleList) -> bool:
    return all(any(hasattr(module, "layer_idx") for module in layer.modules()) for layer in layers)


def _twin(module: Any) -> Any:
    """A module with the same parts and parameters, whose parts can be exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _shorten(holder: Any, kept: Sequence[int]) -> None:
    """Let what holds the layers know how many they are, and of which types."""
    config = copy.copy(holder.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    holder.config = config


@contextmanager
def _measuring(layers: nn.ModuleList, influences: list[float]) -> Iterator[None]:
    """Measure how much each layer changes what it is given, while the model runs."""

    def note(index: int, args: Any, out: Any) -> None:
        before = args[0].float()
        after = (out[0] if isinstance(out, tuple) else out).float()
        cosine = nn.functional.cosine_similarity(before, after, dim=-1)
        influences[index] = 1 - cosine.mean().item()

    hooks = [
        layer.register_forward_hook(lambda _, args, out, index=index: note(index, args, out))
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _PlainAttention:
    """Each token attends to those before it; windows are longer than these few tokens."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        wanted: LayerAttention,
    ) -> torch.Tensor:
        out = nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None],  # [1, heads, num_tokens, head_dim]
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            is_causal=True,
            scale=wanted.scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)
