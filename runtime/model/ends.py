"""What a model's configs say of generating: which tokens end it, and how to sample."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...vmem.errors import InvalidConfig, InvalidSamplingParams
from ..request.sampling_params import SamplingParams
from .reading import reading

_SAMPLING = {  # by its name in a generation config; as in vLLM, which does not read `do_sample`
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read_generation_config(source: str | Path) -> GenerationConfig | None:
    """That of a folder or file; None for "auto", the model's own, and for "vllm", none.

    Raises InvalidConfig if it is not there, BadCheckpoint if it cannot be read.
    """
    if source in ("auto", "vllm"):
        return None
    path = Path(source).expanduser()
    path = path / "generation_config.json" if path.is_dir() else path
    if not path.is_file():
        raise InvalidConfig(
            f"generation_config is {str(source)!r}, and {path} is no file; use 'auto', 'vllm', or "
            "a folder with a generation_config.json"
        )
    return reading(
        "generation config",
        path,
        lambda: GenerationConfig.from_pretrained(path.parent, config_file_name=path.name),
    )


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
    said |= generation_ends(getattr(model, "generation_config", None))
    return frozenset(token for token in said or by_default if 0 <= token < num_logits)


def generation_ends(generation: GenerationConfig | None) -> set[int]:
    """The end tokens that a generation config names itself."""
    if generation is None or generation._from_model_config:  # then it repeats the config
        return set()
    return _ids(generation.eos_token_id)


def sampling_defaults(generation: GenerationConfig | None, model: str) -> dict[str, Any]:
    """The sampling parameters that a generation config sets, by `SamplingParams`' names.

    Raises InvalidConfig, which names the `model`, if they are impossible.
    """
    said = {} if generation is None else generation.to_diff_dict()
    defaults = {
        ours: said[theirs] for theirs, ours in _SAMPLING.items() if said.get(theirs) is not None
    }
    try:
        SamplingParams(**defaults)
    except InvalidSamplingParams as error:
        raise InvalidConfig(
            f"the generation config of {model} has {error}; mend it, or pass "
            "generation_config='vllm' to do without"
        ) from error
    return defaults


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)
