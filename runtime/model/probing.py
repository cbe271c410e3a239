"""What a model's layers ask of attention, learned from a few tokens instead of a table of names."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ...allocator import LayerGeometry
from ...attention_backends import LayerAttention
from ...vmem.errors import UnsupportedModel
from .forward import Forward
from .probes.attention_probe import AttentionProbe, refusing
from .probes.recurrent_probe import probe_state
from .recurrent_state import keeps_state

_SLIDING = {"sliding_attention", "hybrid_sliding"}
_NUM_TOKENS = 4
_TOLERANCE = 1e-2  # of the largest value: above rounding in bfloat16, below a mix-up


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What a few tokens told of a model.

    Attributes:
        layers: those that attend.
        attention, geometry: what each of them asks for.
        num_logits: of a token.
    """

    layers: tuple[int, ...]
    attention: tuple[LayerAttention, ...]
    geometry: tuple[LayerGeometry, ...]
    num_logits: int


def probe_attention(model: PreTrainedModel) -> Probed:
    """Run a few tokens through the model to see which layers attend, and what each asks for."""
    if keeps_state(model.config):
        ahead, expected = probe_state(model)
    else:
        ahead = _run_probe(model, backwards=False)
        expected = list(range(model.config.get_text_config().num_hidden_layers))
    if sorted(ahead.geometry) != expected:
        raise UnsupportedModel(
            f"{type(model).__name__} has {len(expected)} layers that should attend, of which "
            f"{len(ahead.geometry)} use attention over keys and values of every token; the "
            "others' state has no place in a slot: use a model in which all attend to the text"
        )
    if not keeps_state(model.config):
        _check_neighbours(model, ahead)
    attention, geometry = [], []
    for layer in expected:
        window = _window(model.config.get_text_config(), layer, ahead.attention[layer].window)
        attention.append(replace(ahead.attention[layer], window=window))
        geometry.append(replace(ahead.geometry[layer], window=window))
    return Probed(
        layers=tuple(expected),
        attention=tuple(attention),
        geometry=tuple(geometry),
        num_logits=ahead.logits[0].shape[-1],
    )


def _check_neighbours(model: PreTrainedModel, ahead: AttentionProbe) -> None:
    """Run the probe's tokens in another order: what reaches attention must be the same.

    It must follow from a token and its position alone, for in a flat batch a token's neighbours
    may belong to other requests.
    """
    back = _run_probe(model, backwards=True)
    for layer, inputs in ahead.inputs.items():
        off = (back.inputs[layer].flip(0) - inputs).abs().amax(dim=1)  # [num_tokens]
        # Most tokens, not any: a router of experts may waver over one for a rounding error.
        if (off > _TOLERANCE * inputs.abs().max()).float().mean() > 0.5:
            raise UnsupportedModel(
                f"{type(model).__name__} computes layer {layer} not from each token and its "
                "position alone, but from its neighbours in the batch (a convolution, or "
                "positions of its own counting), which may be another request's; use a model "
                "that takes position_ids"
            )


def probe_outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """What a few tokens give: each layer's inputs to attention, and the logits."""
    probe = _run_probe(model, backwards=False)
    return [*probe.inputs.values(), *probe.logits]


def _run_probe(model: PreTrainedModel, *, backwards: bool) -> AttentionProbe:
    probe = AttentionProbe()
    positions = torch.arange(_NUM_TOKENS, device=model.device).unsqueeze(0)
    if backwards:
        positions = positions.flip(1)
    with refusing(model):
        probe.logits.append(Forward(model)(positions + 1, positions, probe))
    return probe


def _window(config: Any, layer: int, passed: int | None) -> int | None:
    """A layer's window: what it passes to attention, or what its config says of it.

    Some architectures leave the window to the mask, which is not built here.
    """
    if passed is not None:
        return passed
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] in _SLIDING:
        return config.sliding_window
    return None
