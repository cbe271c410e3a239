"""From what a caller gives to what an engine is asked: tokens and parameters, checked."""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...vmem.errors import InvalidPrompt, InvalidSamplingParams
from ..engine.admission import Admission
from ..request.sampling_params import SamplingParams
from ..request.spec import RequestSpec
from .chat_template import render_chat
from .prompts import Message, Prompt, as_token_ids
from .text_stream import RequestText


class FrontEnd:
    """Makes requests of prompts. Any number of threads may use it.

    Args:
        name: the model's, for messages.
        tokenizer: None for a model without one: prompts are token ids then.
        admission: what the engine takes.
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase | None, admission: Admission
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.admission = admission
        self._ids = itertools.count()
        self._prefix = f"{os.getpid()}-{id(self):x}"  # apart from other front ends' of an engine

    def request(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> RequestText:
        """A request for a text, token ids or a conversation.

        Without `params`, an answer to a conversation is as long as the model makes it.
        Raises a `UsageError` that names what cannot be.
        """
        if is_conversation(prompt):
            text, tokens = None, self.render_chat(prompt)  # type: ignore[arg-type]
            params = SamplingParams(max_tokens=None) if params is None else params
        else:
            text = prompt if isinstance(prompt, str) else None
            tokens = self.tokenise(prompt)  # type: ignore[arg-type]
            params = SamplingParams() if params is None else params
        self.check(tokens, params)
        spec = RequestSpec(
            request_id=f"{self._prefix}-{next(self._ids)}", prompt_token_ids=tokens, params=params
        )
        return RequestText(spec, text, self.tokenizer)

    def check(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """Refuse what could never run; returns the most tokens that may be generated.

        Raises a `UsageError`.
        """
        max_tokens = self.admission.check(tokens, params)
        if params.stop_strings and self.tokenizer is None:
            raise InvalidSamplingParams(
                f"stop = {params.stop_strings!r} needs a tokenizer, and the model has none; use "
                "stop_token_ids"
            )
        return max_tokens

    def tokenise(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, which may be token ids already. Raises InvalidPrompt."""
        if not isinstance(prompt, str):
            return as_token_ids(prompt)
        if self.tokenizer is None:
            raise InvalidPrompt(
                f"{self.name} has no tokenizer; give prompts as lists of token ids, or pass "
                "tokenizer="
            )
        return self.tokenizer(prompt).input_ids

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next message begins."""
        return render_chat(self.tokenizer, messages, self.name)


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return isinstance(prompt[0], Mapping)
