"""What recurrent and convolution layers remember of a request: a place for each slot.

Such a layer keeps a state of fixed size instead of keys and values of every token. The state
layers themselves stay `transformers`' own: a step lays the states of its requests into a cache of
that kind, lets the model read and write it, and takes them out again.
"""

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

STATE_LAYER_TYPES = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})


def keeps_state(config: PretrainedConfig) -> bool:
    """True if some layers of the model have recurrent or convolution state."""
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ()
    return not STATE_LAYER_TYPES.isdisjoint(layer_types)


SlotState = dict[tuple[str, int, int], torch.Tensor]
"""What recurrent and convolution layers remember of one request: by kind, layer and number."""


class StepState(DynamicCache):
    """The `past_key_values` of one forward: states as usual, while keys and values pass through.

    They go into slots, by our attention function, so the cache has no part in them.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values alone, stored nowhere."""
        return key_states, value_states

    @property
    def attention_layers(self) -> list[int]:
        """Layers that have keys and values."""
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)]

    def states(self) -> dict[tuple[str, int, int], torch.Tensor]:
        """What the layers remember now, each [batch, …], by kind, layer and number in the layer."""
        found: dict[tuple[str, int, int], torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                continue
            for kind, tensors in (("conv", layer.conv_states), ("recur", layer.recurrent_states)):
                for number, tensor in tensors.items():
                    if tensor is not None:
                        found[kind, index, number] = tensor
        return found


class RecurrentState:
    """The states of all requests, a place for each slot. Nothing is allocated before the first.

    Args:
        config: of the model.
        num_slots: slots that there are.
    """

    def __init__(self, config: PretrainedConfig, num_slots: int) -> None:
        self._config = config
        self._num_slots = num_slots
        self._saved: dict[tuple[str, int, int], torch.Tensor] = {}  # each [num_slots, …]

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return sum(tensor.nbytes for tensor in self._saved.values())

    def fresh(self) -> StepState:
        """The state before a first token."""
        return StepState(self._config)

    def gather(self, slots: torch.Tensor) -> StepState:
        """The saved states of `slots`, copied into the batch of a new step.

        Args: slots, int64 [num_requests] on the device; one for all layers, and for `scatter`.
        """
        step = self.fresh()
        for (kind, layer, number), saved in self._saved.items():
            states = saved[slots]  # [num_requests, …]
            if kind == "conv":
                step.update_conv_state(states, layer, number)
            else:
                step.update_recurrent_state(states, layer, number)
        return step

    def scatter(self, slots: torch.Tensor, step: StepState) -> None:
        """Save the states that `step` left behind, over whatever `slots` held."""
        for key, states in step.states().items():
            if key not in self._saved:
                self._saved[key] = states.new_zeros((self._num_slots, *states.shape[1:]))
            self._saved[key][slots] = states

    def save(self, slot: int) -> SlotState:
        """A copy of what `slot` has, in host memory."""
        return {key: saved[slot].to("cpu", copy=True) for key, saved in self._saved.items()}

    @torch.inference_mode()
    def load(self, slot: int, state: SlotState, device: torch.device) -> None:
        """Put a copy that `save` made, here or elsewhere, into the place of `slot` on `device`."""
        for key, tensor in state.items():
            if key not in self._saved:  # nothing was computed here yet
                shape = (self._num_slots, *tensor.shape)
                self._saved[key] = torch.zeros(shape, dtype=tensor.dtype, device=device)
            self._saved[key][slot] = tensor.to(device)

    def clear(self) -> None:
        """Give the memory back."""
        self._saved.clear()
