"""Which tokens end a generation."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, num_logits: int
) -> frozenset[int]:
    """All tokens that the tokenizer, the generation config or a config call an end.

    None is trusted alone: a chat model's turns often end with a token that only one of them names.
    What a config has from its class, rather than from its file, counts if nothing else is said: it
    is the token of some other vocabulary, more often than not. Ids outside the vocabulary, of
    `num_logits`, are dropped.
    """
    said: set[int] = set()
    if tokenizer is not None:
        said |= _ids(tokenizer.eos_token_id)
    by_default: set[int] = set()
    for config in (model.config, model.config.get_text_config()):
        ids = _ids(getattr(config, "eos_token_id", None))
        default = _ids(getattr(type(config), "eos_token_id", None))
        (by_default if ids == default else said).update(ids)
    generation = getattr(model, "generation_config", None)
    if generation is not None and not generation._from_model_config:  # else it repeats the config
        said |= _ids(generation.eos_token_id)
    return frozenset(token for token in said or by_default if 0 <= token < num_logits)


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)
