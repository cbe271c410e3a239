"""What every layer of a model asks of attention, recorded from a run over a few tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ....allocator import LayerGeometry
from ....attention_backends import LayerAttention
from ....vmem.errors import UnsupportedModel


@dataclass
class AttentionProbe:
    """Records what every layer asks of attention, from one run over a few tokens."""

    attention: dict[int, LayerAttention] = field(default_factory=dict)
    geometry: dict[int, LayerGeometry] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)  # [num_tokens, all elements]
    logits: list[torch.Tensor] = field(default_factory=list)  # [num_tokens, vocab_size], one

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        wanted: LayerAttention,
    ) -> torch.Tensor:
        if layer in self.attention:
            raise UnsupportedModel(
                f"layer {layer} attends twice in a step, and a slot holds one set of keys and "
                "values for a layer; use a model that attends once"
            )
        if not query.dtype == key.dtype == value.dtype:
            raise UnsupportedModel(
                f"layer {layer} attends with queries of {query.dtype}, keys of {key.dtype} and "
                f"values of {value.dtype}, and slots and kernels have one dtype; load all of the "
                "model's weights in one, such as dtype='bfloat16'"
            )
        self.attention[layer] = wanted
        self.inputs[layer] = torch.cat([part.flatten(1) for part in (query, key, value)], dim=1)
        self.geometry[layer] = LayerGeometry(
            num_kv_heads=key.shape[1],
            key_dim=key.shape[2],
            value_dim=value.shape[2],
            window=wanted.window,
        )
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])


@contextmanager
def refusing(model: PreTrainedModel) -> Iterator[None]:
    """Run a model for its probe: what it raises says why it cannot run."""
    try:
        with torch.inference_mode():
            yield
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        if isinstance(error, UnsupportedModel):
            raise
        raise UnsupportedModel(
            f"{type(model).__name__} cannot run a flat batch of tokens: {error}"
        ) from error
