"""The one way to call an unmodified model."""

import inspect

import torch
from transformers import PreTrainedModel

from ...vmem.errors import InvalidOperation
from .attention_hook import ATTENTION_NAME, AttentionStep, attention_step
from .recurrent_state import StepState


class Forward:
    """Calls a model over flat tokens, with its attention answered by a step.

    Args:
        model: prepared to attend through vkv (`attention_hook`).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._config = model.config.get_text_config()
        self._selects_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        step: AttentionStep,
        *,
        state: StepState | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits, [num_tokens, vocab], or of some tokens alone, [len(keep), vocab].

        Args:
            ids, positions: int64 [1, num_tokens]; of a model with recurrent state also [B, 1].
            step: what attention layers meet.
            state: what recurrent and convolution layers read, and leave behind.
            keep: int64, the flat tokens whose logits are wanted; None for all.

        Raises InvalidOperation if somebody switched the model's attention to another function.
        """
        if self._config._attn_implementation != ATTENTION_NAME:
            raise InvalidOperation(
                f"the attention of {type(self.model).__name__} was switched to "
                f"{self._config._attn_implementation!r} while vkv.LLM has the model; close it "
                f"first, or call model.set_attn_implementation({ATTENTION_NAME!r}) to go on"
            )
        options: dict[str, object] = {"use_cache": False}
        if state is not None:
            options = {"use_cache": True, "past_key_values": state}
        # With one sequence the model itself can select, and saves the output layer's work.
        selects = keep is not None and self._selects_logits and len(ids) == 1
        if selects:
            options["logits_to_keep"] = keep
        with attention_step(step):
            output = self.model(input_ids=ids, position_ids=positions, **options)
        logits = output.logits.flatten(0, 1)
        return logits if selects or keep is None else logits[keep]
