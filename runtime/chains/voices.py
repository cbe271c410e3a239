"""How a model is spoken to: its tokenizer, its template, how it samples and what ends its texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from ..blocks.chain import Chain
from ..model.ends import (
    eos_token_ids,
    generation_ends,
    read_generation_config,
    sampling_defaults,
)
from ..model.loading import LoadedModel, load_tokenizer
from ..model.reading import reading
from ..request.spec import ChainKey


@dataclass(frozen=True, kw_only=True)
class Voice:
    """What is to be known of a model that runs beside an engine's own.

    Attributes:
        tokenizer: None for the engine's own model's, from which it does not differ.
        sampling_defaults, eos_token_ids: as of `LoadedModel`.
    """

    key: ChainKey
    tokenizer: PreTrainedTokenizerBase | None
    sampling_defaults: Mapping[str, Any]
    eos_token_ids: frozenset[int]


def voice_of(
    chain: Chain,
    key: ChainKey,
    base: Chain,
    loaded: LoadedModel,
    generation_config: str | Path,
) -> Voice:
    """Read a model's; `base` is the engine's own, which was `loaded` (`EngineConfig`)."""
    tokenizer = None if dict(chain.files) == dict(base.files) else load_tokenizer(chain.folder)
    generation = _generation_of(chain)
    said = generation if generation_config == "auto" else read_generation_config(generation_config)
    config = reading("config", chain.folder, lambda: AutoConfig.from_pretrained(chain.folder))
    told: Any = SimpleNamespace(config=config, generation_config=generation)
    ends = eos_token_ids(told, tokenizer or loaded.tokenizer, loaded.vocab_size)
    ends |= {token for token in generation_ends(said) if 0 <= token < loaded.vocab_size}
    return Voice(
        key=key,
        tokenizer=tokenizer,
        sampling_defaults=sampling_defaults(said, chain.name),
        eos_token_ids=ends,
    )


def _generation_of(chain: Chain) -> GenerationConfig | None:
    if not (chain.folder / "generation_config.json").is_file():
        return None
    return reading(
        "generation config", chain.folder, lambda: GenerationConfig.from_pretrained(chain.folder)
    )
