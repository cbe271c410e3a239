"""What a tokenizer tells of how its model writes calls and reasoning."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|call|>")


def find_formats(tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, str]:
    """Names for a `tool_call_parser` and a `reasoning_parser`, each `none` if none is seen."""
    if tokenizer is None:
        return "none", "none"
    if response_template(tokenizer) is not None:
        return "hf", "hf"
    tokens, template = added_tokens(tokenizer), _template(tokenizer)
    if tokens.keys() >= set(HARMONY):
        return "openai", "openai"
    return _calls(tokens, template), _reasoning(tokens, template)


def _calls(tokens: Mapping[str, bool], template: str) -> str:
    """How calls are written; a template that shows no tools tells none to the model either."""
    if not re.search(r"\btools\b", template):
        return "none"
    if "<function=" in template and "<parameter=" in template:
        return "qwen3_coder"
    if "[TOOL_CALLS]" in template or "[TOOL_CALLS]" in tokens:
        return "mistral"
    if "<tool_call>" in template and "arguments" in template and "<arg_key>" not in template:
        return "hermes"
    is_llama = "<|python_tag|>" in tokens or "<|start_header_id|>" in template
    if is_llama and '"parameters"' in template.replace("\\", ""):
        return "llama3_json"
    return "none"


def _reasoning(tokens: Mapping[str, bool], template: str) -> str:
    for name, closing in (("think", "</think>"), ("mistral", "[/THINK]")):
        if closing in template or closing in tokens:
            return name
    return "none"


def response_template(tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, Any] | None:
    """What `transformers` has read of how answers are to be parsed."""
    template = getattr(tokenizer, "response_template", None)
    return template if isinstance(template, Mapping) else None


def added_tokens(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, bool]:
    """Texts that are one token by decree, and whether they are left out of plain text."""
    if tokenizer is None:
        return {}
    tokens = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    return tokens | dict.fromkeys(tokenizer.all_special_tokens, True)


def turn_marks(tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    """Tokens of which one stands between a message and the next."""
    template = _template(tokenizer) if tokenizer is not None else ""
    return tuple(
        text
        for text, is_special in added_tokens(tokenizer).items()
        if is_special or (text.strip() and text in template)
    )


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's text, or those of several."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""
