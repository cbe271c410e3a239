"""A tokenizer of vkv's own, and what it makes of texts."""

import copy
import logging
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ...vmem.errors import InvalidConfig, InvalidPrompt
from ..request.plain_values import HALF_A_PAIR, half_of_a_pair

_log = logging.getLogger(__name__)


_Given = TypeVar("_Given")


def own(tokenizer: _Given) -> _Given:
    """What a caller gives as `tokenizer`: a copy of an object, or where it is.

    Raises InvalidConfig for anything else.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return own_copy(tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        remedy = "give a tokenizer of transformers, or its folder"
        if isinstance(tokenizer, Tokenizer):
            remedy = "wrap it: transformers.PreTrainedTokenizerFast(tokenizer_object=…)"
        elif hasattr(tokenizer, "tokenizer"):
            remedy = "a processor has it as .tokenizer: pass that"
        raise InvalidConfig(f"tokenizer is a {type(tokenizer).__name__}; {remedy}")
    return tokenizer


def own_copy(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that no call of anybody else's can change: it neither cuts nor pads.

    One that cannot be copied is shared, and the log says so.
    """
    try:
        tokenizer = copy.deepcopy(tokenizer)
    except Exception as error:  # noqa: BLE001 - a part written in Python may refuse in any way
        _log.warning(
            "%s cannot be copied (%s), so that what is done to it changes prompts, too",
            type(tokenizer).__name__,
            error,
        )
    settle(tokenizer)
    return tokenizer


def settle(tokenizer: PreTrainedTokenizerBase) -> None:
    """Neither cut nor pad: some are saved with a length in them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, what: str, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a text. Raises InvalidPrompt, which says `what`, if it is no text."""
    check_text(text, what=what)
    return list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)


def check_text(text: str, *, what: str) -> None:
    """Raises InvalidPrompt for a lone surrogate, which no tokenizer takes."""
    place = half_of_a_pair(text)
    if place is not None:
        around = text[max(0, place - 20) : place + 20]
        raise InvalidPrompt(f"{what} is no text at {around!r}, character {place}: {HALF_A_PAIR}")


def spell(tokenizer: PreTrainedTokenizerBase, word: str) -> set[tuple[int, ...]]:
    """A word's tokens where a text begins with it, and behind a space."""
    bare = word.lstrip() or word
    spelt = (
        encode(tokenizer, text, what="a bad word", add_special_tokens=False)
        for text in (bare, " " + bare)
    )
    return {tuple(tokens) for tokens in spelt if tokens}
