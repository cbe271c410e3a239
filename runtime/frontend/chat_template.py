"""Conversations to token ids, by a tokenizer's own template."""

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ...vmem.errors import InvalidPrompt
from .prompts import Message


def render_chat(
    tokenizer: PreTrainedTokenizerBase | None, messages: Sequence[Message], model: str
) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next message begins.

    Raises InvalidPrompt, which names `model`, if there is no template or it refuses.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise InvalidPrompt(
            f"{model} has no chat template; pass a plain prompt to generate(), or set "
            "tokenizer.chat_template"
        )
    if not messages:
        raise InvalidPrompt("the conversation has no messages; give it at least one")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InvalidPrompt(f"{message!r} is no message; give it a 'role' and a 'content'")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise InvalidPrompt(f"the chat template refuses the conversation: {error}") from error
    assert isinstance(text, str), "one conversation was rendered, not a batch"
    return tokenizer(text, add_special_tokens=False).input_ids
