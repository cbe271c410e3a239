"""One batch through a model with recurrent or convolution layers.

What such a layer computes depends on the order of tokens, so requests cannot lie in one flat row:
the decodes go together as [B, 1], and every chunk of a prompt by itself as [1, num_tokens]. The
attention layers see a flat batch all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...allocator import SlotCache
from ...attention_backends import AttentionBackend, LayerAttention
from ..model.attention_hook import CacheStep, attention_step
from ..model.loading import LoadedModel
from ..model.recurrent_state import StateRows
from ..request.request import ScheduledRequest
from .model_runner import ModelRunner


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


class StateRunner(ModelRunner):
    """A `ModelRunner` for models of which some layers keep state, in `states`."""

    def __init__(
        self, loaded: LoadedModel, cache: SlotCache, backend: AttentionBackend, states: StateRows
    ) -> None:
        super().__init__(loaded, cache, backend)
        self.states = states
        self._index_of = {layer: i for i, layer in enumerate(loaded.attention_layers)}

    def _forward(
        self,
        batch: Sequence[ScheduledRequest],
        ends: Sequence[int],
        rows: Sequence[int],
        last_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits of the flat rows `rows`, [len(rows), vocab]: one forward for each group."""
        assert last_tokens is None, "a hybrid's steps wait for each other"
        decodes = [i for i, item in enumerate(batch) if item.start and item.num_tokens == 1]
        groups = [decodes] if decodes else []
        groups += [[i] for i in range(len(batch)) if i not in decodes]
        chosen: dict[int, torch.Tensor] = {}  # [vocab], by flat row
        wanted = set(rows)
        for group in groups:
            flat = [row for i in group for row in range(ends[i] - batch[i].num_tokens, ends[i])]
            keep = [index for index, row in enumerate(flat) if row in wanted]
            logits = self._forward_group([batch[i] for i in group], keep)  # [len(keep), vocab]
            chosen.update((flat[index], row) for index, row in zip(keep, logits, strict=True))
        if not rows:
            return torch.empty(0, self.loaded.vocab_size, device=self.loaded.device)
        return torch.stack([chosen[row] for row in rows])

    def _forward_group(
        self, group: Sequence[ScheduledRequest], keep: Sequence[int]
    ) -> torch.Tensor:
        """Logits of the tokens `keep` of decodes, or of one chunk: [len(keep), vocab]."""
        slots = [item.request.slot.index for item in group if item.request.slot is not None]
        inputs, batch = self._inputs(group, keep)
        step = CacheStep(self.cache, self.backend, batch, self.loaded.attention)
        shape = (len(group), -1)  # decodes [B, 1], a chunk [1, num_tokens]
        selects = self._selects_logits and len(group) == 1  # the same tokens in every row of [B, 1]
        state = self.states.gather(slots) if group[0].start else self.states.fresh()
        with attention_step(_SomeLayersStep(step, self._index_of)):
            output = self.loaded.model(
                input_ids=inputs.ids.view(shape),
                position_ids=inputs.positions.view(shape),
                past_key_values=state,
                use_cache=True,
                **({"logits_to_keep": inputs.keep} if selects else {}),
            )
        self.states.scatter(slots, state)
        logits = output.logits.flatten(0, 1)
        return logits if selects else logits[inputs.keep]
