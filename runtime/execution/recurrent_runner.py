"""One batch through a model with recurrent or convolution layers.

What such a layer computes depends on the tokens before, so requests cannot share one flat
sequence: the decodes go together as [B, 1], each chunk of a prompt by itself as [1, num_tokens].
Attention layers see a flat batch in either case.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...allocator import SlotCache
from ...attention_backends import AttentionBackend, LayerAttention
from ..adapters.adapters import Adapters
from ..adapters.steps import adapting
from ..model.attention_hook import CacheStep
from ..model.forward import Forward
from ..model.recurrent_state import RecurrentState, SlotState
from ..request.request import ScheduledRequest
from .model_runner import ModelRunner
from .upload import upload


@dataclass
class _SomeLayersStep:
    """Attention of a model of which some layers only attend: slots number these alone."""

    step: CacheStep
    index_of: dict[int, int]  # place in the slots, by layer of the model

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        wanted: LayerAttention,
    ) -> torch.Tensor:
        return self.step.attend(self.index_of[layer], query, key, value, wanted)


class RecurrentRunner(ModelRunner):
    """A `ModelRunner` for models of which some layers keep state, in `states`.

    Args:
        attention_layers: the layers of the model that attend; slots number these alone.
        states: a place for each slot.
        The others are those of `ModelRunner`; decodes are not recorded.
    """

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache,
        backend: AttentionBackend,
        layers: Sequence[LayerAttention],
        device: torch.device,
        *,
        attention_layers: Sequence[int],
        states: RecurrentState,
        vocab_size: int,
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__(forward, cache, backend, layers, device, adapters=adapters)
        self._states = states
        self._vocab_size = vocab_size
        self._index_of = {layer: i for i, layer in enumerate(attention_layers)}

    @property
    def state_bytes(self) -> int:
        return self._states.num_bytes

    def forget(self) -> int:
        num_bytes = self._states.num_bytes
        self._states.clear()
        return num_bytes

    def save_state(self, slot_index: int) -> SlotState:
        return self._states.save(slot_index)

    def load_state(self, slot_index: int, state: SlotState) -> None:
        self._states.load(slot_index, state, self.device)

    def _run(
        self,
        items: Sequence[ScheduledRequest],
        ends: Sequence[int],
        positions: Sequence[int],
        last_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits of the flat tokens `positions`, one forward for each group of requests."""
        assert last_tokens is None, "a hybrid's steps wait for each other"
        decodes = [i for i, item in enumerate(items) if item.start and item.num_tokens == 1]
        groups = [decodes] if decodes else []
        groups += [[i] for i in range(len(items)) if i not in decodes]
        chosen: dict[int, torch.Tensor] = {}  # [vocab], by flat token
        wanted = set(positions)
        for group in groups:
            flat = [p for i in group for p in range(ends[i] - items[i].num_tokens, ends[i])]
            keep = [index for index, position in enumerate(flat) if position in wanted]
            logits = self._run_group([items[i] for i in group], keep)  # [len(keep), vocab]
            chosen.update((flat[index], row) for index, row in zip(keep, logits, strict=True))
        if not positions:
            return torch.empty(0, self._vocab_size, device=self.device)
        return torch.stack([chosen[position] for position in positions])

    def _run_group(self, group: Sequence[ScheduledRequest], keep: Sequence[int]) -> torch.Tensor:
        """Logits of the tokens `keep` of decodes, or of one chunk: [len(keep), vocab]."""
        slots = [item.request.slot.index for item in group if item.request.slot is not None]
        places = upload(slots, torch.long, self.device)
        inputs, batch = self._inputs(group, keep)
        step = CacheStep(self.cache, self.backend, batch, self._layers)
        shape = (len(group), -1)  # decodes [B, 1], a chunk [1, num_tokens]
        state = self._states.gather(places) if group[0].start else self._states.fresh()
        with adapting(self._adapter_step(group, keep)):
            logits = self.forward(
                inputs.ids.view(shape),
                inputs.positions.view(shape),
                _SomeLayersStep(step, self._index_of),
                state=state,
                keep=inputs.keep,
            )
        self._states.scatter(places, state)
        return logits
