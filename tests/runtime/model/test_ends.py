"""A generation ends where any of tokenizer, generation config and config say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import GenerationConfig, PreTrainedModel
from vkv.runtime.model.ends import eos_token_ids
from vkv.runtime.model.loading import load_model

LAST = zoo.VOCAB_SIZE - 1  # what the tokenizer calls its end


def model(config: Any, generation: Any = None) -> PreTrainedModel:
    built = zoo.tiny_model("llama", eos_token_id=config)
    if generation is not None:
        built.generation_config = GenerationConfig(eos_token_id=generation)
    return built


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (None, None, True, {LAST}),
        (5, None, True, {5, LAST}),
        (5, [6, 7], True, {5, 6, 7, LAST}),
        ([5, 8], 6, False, {5, 6, 8}),
        (None, None, False, set()),
        (5, [6, zoo.VOCAB_SIZE, -1], False, {5, 6}),
        (2, 6, False, {6}),  # 2 is what any llama's config says
        (2, None, False, {2}),
        (2, None, True, {LAST}),
    ],
)
def test_ends_are_what_any_of_them_says(
    config: Any, generation: Any, tokenizer: bool, expected: set[int]
) -> None:
    held = zoo.letter_tokenizer() if tokenizer else None
    assert eos_token_ids(model(config, generation), held, zoo.VOCAB_SIZE) == expected


def test_a_folders_ends(tmp_path: Path) -> None:
    """The config names one token, generation_config.json another, the tokenizer a third."""
    model(5, [6]).save_pretrained(tmp_path)
    zoo.letter_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device=torch.device("cpu"))
    assert loaded.eos_token_ids == {5, 6, LAST}
