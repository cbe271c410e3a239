"""From what a caller gives to what an engine is asked: tokens and parameters, checked."""

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from ...vmem.errors import InvalidPrompt, InvalidSamplingParams
from ..engine.admission import Admission
from ..execution.grammars import Grammars, check_grammars
from ..request.sampling_params import SamplingParams
from ..request.spec import RequestSpec
from .chat_template import ChatOptions, ChatTemplate, check_names
from .prompts import (
    DEFAULT_STANDING,
    Message,
    PlainPrompt,
    Prompt,
    Standing,
    are_conversations,
    as_batch,
    as_plain,
    check_params,
    is_conversation,
    params_for_each,
    refuse_conversation,
    standings,
)
from .text_stream import RequestText
from .tokenizer import encode, own_copy, settle, spell


class ModelFace(Protocol):
    """What a front end must know of a model, which may be in another process (`LoadedModel`)."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None: ...
    @property
    def sampling_defaults(self) -> Mapping[str, Any]: ...


class FrontEnd:
    """Makes requests of prompts. Any number of threads may use it.

    Args:
        loaded: the model, whose tokenizer nobody else has. Without one, prompts are token ids.
        admission: what the engine takes.
        grammars: what `structured_outputs` are compiled by, before a request is posted: the
            engine's own if it is in this process. None without a tokenizer.

    Attributes:
        default_params, chat_params: for prompts and conversations that come without parameters:
            those of the model's generation config, and a conversation's answer has no limit else.
    """

    def __init__(self, loaded: ModelFace, admission: Admission, grammars: Grammars | None) -> None:
        self.name = loaded.name
        self.tokenizer = loaded.tokenizer
        self.admission = admission
        self.grammars = grammars
        self.default_params = SamplingParams(**loaded.sampling_defaults)
        self.chat_params = SamplingParams(**{"max_tokens": None, **loaded.sampling_defaults})
        if self.tokenizer is not None:
            settle(self.tokenizer)
        self._chat_template = ChatTemplate(self.tokenizer, self.name)
        self._ids = itertools.count()
        self._prefix = f"{os.getpid()}-{id(self):x}"  # apart from other front ends' of an engine

    @functools.cached_property
    def callers_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """A tokenizer for callers to use and change; prompts are not touched by that."""
        return None if self.tokenizer is None else own_copy(self.tokenizer)

    # -- as callers give them: one or several, all of them right or none ------------------------

    def batch(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        priority: int | Sequence[int],
        tenant: str | Sequence[str],
    ) -> list[RequestText]:
        """Requests for prompts, arguments as of `LLM.generate`. Raises a `UsageError`."""
        each_prompt = as_batch(prompts)
        for prompt in (prompts, *each_prompt):
            refuse_conversation(prompt)
        each = params_for_each(params, len(each_prompt))
        where = standings(priority, tenant, len(each_prompt))
        return [
            self.request(prompt, one, standing=standing)
            for prompt, one, standing in zip(each_prompt, each, where, strict=True)
        ]

    def chats(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        options: ChatOptions,
        *,
        priority: int | Sequence[int],
        tenant: str | Sequence[str],
    ) -> list[RequestText]:
        """Requests for conversations, arguments as of `LLM.chat`. Raises a `UsageError`."""
        conversations: Any = messages if are_conversations(messages) else [messages]
        each = params_for_each(params, len(conversations))
        where = standings(priority, tenant, len(conversations))
        return [
            self.chat_request(conversation, one, options, standing=standing)
            for conversation, one, standing in zip(conversations, each, where, strict=True)
        ]

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None,
        options: ChatOptions,
        *,
        priority: int,
        tenant: str,
    ) -> RequestText:
        """A request of one output, arguments as of `LLM.stream`. Raises a `UsageError`."""
        standing = Standing(priority=priority, tenant=tenant)
        request = self.request(prompt, params, options, standing)
        if request.spec.params.n != 1:
            raise InvalidSamplingParams(
                f"n = {request.spec.params.n}: a stream has one output; use generate"
            )
        return request

    # -- one by one ----------------------------------------------------------------------------

    def request(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        options: ChatOptions | None = None,
        standing: Standing = DEFAULT_STANDING,
    ) -> RequestText:
        """A request for a prompt or a conversation.

        Raises a `UsageError` that names what cannot be.
        """
        if is_conversation(prompt):
            return self.chat_request(prompt, params, options or {}, standing=standing)  # type: ignore[arg-type]
        if options:
            check_names(options)
            raise InvalidPrompt(
                f"{', '.join(options)} is for conversations, and the prompt is none; leave it out"
            )
        plain = as_plain(prompt)  # type: ignore[arg-type]
        return self._request(plain, self.default_params if params is None else params, standing)

    def chat_request(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None,
        options: ChatOptions,
        salt: str = "",
        standing: Standing = DEFAULT_STANDING,
    ) -> RequestText:
        """A request for the answer to a conversation; prefixes are shared within one `salt`."""
        prompt = replace(self._chat_template.render(messages, options), salt=salt)
        return self._request(prompt, self.chat_params if params is None else params, standing)

    def _request(
        self, prompt: PlainPrompt, params: SamplingParams, standing: Standing
    ) -> RequestText:
        check_params(params)
        self.admission.check_priority(standing.priority)
        tokens = self._truncate(self._tokenise(prompt), params)
        self.check(tokens, params)
        spec = RequestSpec(
            request_id=f"{self._prefix}-{next(self._ids)}",
            prompt_token_ids=tokens,
            params=params,
            bad_words=self._bad_words(params),
            variant=prompt.salt,
            priority=standing.priority,
            tenant=standing.tenant,
        )
        return RequestText(spec, prompt.text, self.tokenizer if params.detokenize else None)

    def check(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """Refuse what could never run; returns the most tokens that may be generated.

        A grammar is compiled, which may take seconds. Raises a `UsageError`.
        """
        max_tokens = self.admission.check(tokens, params)
        for name, remedy in (("stop", "stop_token_ids"), ("bad_words", "logit_bias")):
            words = getattr(params, name)
            if words and self.tokenizer is None:
                raise InvalidSamplingParams(
                    f"{name} = {words!r} needs a tokenizer, and the model has none; use {remedy}"
                )
        if params.structured_outputs is not None:
            check_grammars(self.grammars).prepare(params.structured_outputs)
        return max_tokens

    def render_chat(self, messages: Sequence[Message], options: ChatOptions) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next message begins."""
        return self._chat_template.render(messages, options).token_ids or []

    def _tokenise(self, prompt: PlainPrompt) -> list[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if self.tokenizer is None:
            raise InvalidPrompt(
                f"{self.name} has no tokenizer; give prompts as lists of token ids, or pass "
                "tokenizer="
            )
        assert prompt.text is not None
        return encode(self.tokenizer, prompt.text, what="the prompt")

    def _truncate(self, tokens: list[int], params: SamplingParams) -> list[int]:
        """The last tokens, as many as `truncate_prompt_tokens` says; the first stays if it is the
        tokenizer's begin-of-sequence token."""
        most = params.truncate_prompt_tokens
        if most == -1:
            most = max(1, self.admission.max_len - (params.max_tokens or 1))
        if most is None or len(tokens) <= most:
            return tokens
        begin = None if self.tokenizer is None else self.tokenizer.bos_token_id
        head = tokens[:1] if tokens[0] == begin and most > 1 else []
        return head + tokens[len(tokens) - most + len(head) :]

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        spelt: set[tuple[int, ...]] = set()
        for word in params.bad_words or ():
            assert self.tokenizer is not None, "checked"
            spelt |= spell(self.tokenizer, word)
        return tuple(sorted(spelt))
