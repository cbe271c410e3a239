"""From what a caller gives to what an engine is asked: tokens and parameters, checked."""

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from ...vmem.errors import InvalidPrompt, InvalidSamplingParams
from ..adapters.adapters import find_adapter
from ..chains.chains import find_voice
from ..chains.voices import Voice
from ..engine.admission import Admission
from ..execution.grammars import Grammars, check_grammars
from ..request.sampling_params import SamplingParams
from ..request.spec import AdapterKey, ChainKey, RequestSpec
from .chat_template import ChatOptions, ChatTemplate, check_names
from .prompts import (
    DEFAULT_STANDING,
    ITSELF,
    Maker,
    Message,
    PlainPrompt,
    Prompt,
    Standing,
    are_conversations,
    as_batch,
    as_plain,
    check_params,
    is_conversation,
    makers_for_each,
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


class _Speech:
    """What prompts of one model are made with."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase | None,
        defaults: Mapping[str, Any],
        chain: ChainKey | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chain = chain
        self.default_params = SamplingParams(**defaults)
        self.chat_params = SamplingParams(**{"max_tokens": None, **defaults})
        if tokenizer is not None:
            settle(tokenizer)
        self.chat_template = ChatTemplate(tokenizer, name)


class FrontEnd:
    """Makes requests of prompts. Any number of threads may use it.

    Args:
        loaded: the model, whose tokenizer nobody else has. Without one, prompts are token ids.
        admission: what the engine takes.
        grammars: what `structured_outputs` are compiled by, before a request is posted: the
            engine's own if it is in this process. None without a tokenizer.
        adapters: asked for those that there are now, by name.
        voices: of the models that run beside this one, by name, and None under its own.

    Attributes:
        default_params, chat_params: for prompts and conversations that come without parameters:
            those of the model's generation config, and a conversation's answer has no limit else.
    """

    def __init__(
        self,
        loaded: ModelFace,
        admission: Admission,
        grammars: Grammars | None,
        adapters: Callable[[], Mapping[str, AdapterKey]] = dict,
        voices: Mapping[str, Voice | None] | None = None,
    ) -> None:
        self.name = loaded.name
        self.tokenizer = loaded.tokenizer
        self.voices = voices or {}
        self._own = _Speech(loaded.name, loaded.tokenizer, loaded.sampling_defaults, None)
        self._speeches: dict[str, _Speech] = {}
        self.admission = admission
        self.grammars = grammars
        self._adapters = adapters
        self.default_params = self._own.default_params
        self.chat_params = self._own.chat_params
        self._ids = itertools.count()
        self._prefix = f"{os.getpid()}-{id(self):x}"  # apart from other front ends' of an engine

    @functools.cached_property
    def callers_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """A tokenizer for callers to use and change; prompts are not touched by that."""
        return None if self.tokenizer is None else own_copy(self.tokenizer)

    def defaults(self, model: str | None = None) -> SamplingParams:
        """For prompts of a model that come without parameters; None for the engine's own."""
        return self._speech(model).default_params

    def tokenizer_of(self, model: str | None = None) -> PreTrainedTokenizerBase | None:
        """Of a model that has one; nobody is to change it."""
        return self._speech(model).tokenizer

    def chat_defaults(self, model: str | None = None) -> SamplingParams:
        """The same for conversations."""
        return self._speech(model).chat_params

    # -- as callers give them: one or several, all of them right or none ------------------------

    def batch(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        priority: int | Sequence[int],
        tenant: str | Sequence[str],
        adapter: str | Sequence[str | None] | None = None,
        model: str | Sequence[str | None] | None = None,
    ) -> list[RequestText]:
        """Requests for prompts, arguments as of `LLM.generate`. Raises a `UsageError`."""
        each_prompt = as_batch(prompts)
        for prompt in (prompts, *each_prompt):
            refuse_conversation(prompt)
        each = params_for_each(params, len(each_prompt))
        where = standings(priority, tenant, len(each_prompt))
        by = makers_for_each(adapter, model, len(each_prompt))
        return [
            self.request(prompt, one, standing=standing, by=maker)
            for prompt, one, standing, maker in zip(each_prompt, each, where, by, strict=True)
        ]

    def chats(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        options: ChatOptions,
        *,
        priority: int | Sequence[int],
        tenant: str | Sequence[str],
        adapter: str | Sequence[str | None] | None = None,
        model: str | Sequence[str | None] | None = None,
    ) -> list[RequestText]:
        """Requests for conversations, arguments as of `LLM.chat`. Raises a `UsageError`."""
        conversations: Any = messages if are_conversations(messages) else [messages]
        each = params_for_each(params, len(conversations))
        where = standings(priority, tenant, len(conversations))
        by = makers_for_each(adapter, model, len(conversations))
        return [
            self.chat_request(talk, one, options, standing=standing, by=maker)
            for talk, one, standing, maker in zip(conversations, each, where, by, strict=True)
        ]

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None,
        options: ChatOptions,
        *,
        priority: int,
        tenant: str,
        adapter: str | None = None,
        model: str | None = None,
    ) -> RequestText:
        """A request of one output, arguments as of `LLM.stream`. Raises a `UsageError`."""
        standing = Standing(priority=priority, tenant=tenant)
        request = self.request(prompt, params, options, standing, Maker(adapter, model))
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
        by: Maker = ITSELF,
    ) -> RequestText:
        """A request for a prompt or a conversation, to be computed `by` a model or an adapter.

        Raises a `UsageError` that names what cannot be.
        """
        if is_conversation(prompt):
            conversation: Any = prompt
            return self.chat_request(conversation, params, options or {}, standing=standing, by=by)
        if options:
            check_names(options)
            raise InvalidPrompt(
                f"{', '.join(options)} is for conversations, and the prompt is none; leave it out"
            )
        plain, speech = as_plain(prompt), self._speech(by.model)  # type: ignore[arg-type]
        params = speech.default_params if params is None else params
        return self._request(plain, params, standing, by, speech)

    def chat_request(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None,
        options: ChatOptions,
        salt: str = "",
        standing: Standing = DEFAULT_STANDING,
        by: Maker = ITSELF,
    ) -> RequestText:
        """A request for the answer to a conversation; prefixes are shared within one `salt`."""
        speech = self._speech(by.model)
        prompt = replace(speech.chat_template.render(messages, options), salt=salt)
        params = speech.chat_params if params is None else params
        return self._request(prompt, params, standing, by, speech)

    def _speech(self, model: str | None) -> _Speech:
        """That of a model by its name, None for the engine's own. Raises UnknownModel."""
        voice = None if model is None else find_voice(self.voices, model)
        if model is None or voice is None:
            return self._own
        if model not in self._speeches:
            tokenizer = voice.tokenizer or self.tokenizer
            self._speeches[model] = _Speech(model, tokenizer, voice.sampling_defaults, voice.key)
        return self._speeches[model]

    def _request(
        self,
        prompt: PlainPrompt,
        params: SamplingParams,
        standing: Standing,
        by: Maker,
        speech: _Speech,
    ) -> RequestText:
        check_params(params)
        self.admission.check_priority(standing.priority)
        if by.adapter is not None and speech.chain is not None:
            raise InvalidPrompt(
                f"the adapter {by.adapter!r} is of the first model, and {by.model!r} was asked "
                "for, too; leave one of them out"
            )
        tokens = self._truncate(self._tokenise(prompt, speech), params, speech)
        self.check(tokens, params)
        spec = RequestSpec(
            request_id=f"{self._prefix}-{next(self._ids)}",
            prompt_token_ids=tokens,
            params=params,
            bad_words=_bad_words(params, speech),
            variant=prompt.salt,
            adapter=None if by.adapter is None else find_adapter(self._adapters(), by.adapter),
            chain=speech.chain,
            priority=standing.priority,
            tenant=standing.tenant,
        )
        return RequestText(spec, prompt.text, speech.tokenizer if params.detokenize else None)

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

    def render_chat(
        self, messages: Sequence[Message], options: ChatOptions, model: str | None = None
    ) -> list[int]:
        """Token ids of a conversation with a model, up to where the assistant's next message
        begins."""
        return self._speech(model).chat_template.render(messages, options).token_ids or []

    def template_takes(self, variable: str, options: ChatOptions, model: str | None = None) -> bool:
        """Whether a model's template makes use of a variable. Raises InvalidPrompt without one."""
        return self._speech(model).chat_template.takes(variable, options)

    def _tokenise(self, prompt: PlainPrompt, speech: _Speech) -> list[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if speech.tokenizer is None:
            raise InvalidPrompt(
                f"{self.name} has no tokenizer; give prompts as lists of token ids, or pass "
                "tokenizer="
            )
        assert prompt.text is not None
        return encode(speech.tokenizer, prompt.text, what="the prompt")

    def _truncate(self, tokens: list[int], params: SamplingParams, speech: _Speech) -> list[int]:
        """The last tokens, as many as `truncate_prompt_tokens` says; the first stays if it is the
        tokenizer's begin-of-sequence token."""
        most = params.truncate_prompt_tokens
        if most == -1:
            most = max(1, self.admission.max_len - (params.max_tokens or 1))
        if most is None or len(tokens) <= most:
            return tokens
        begin = None if speech.tokenizer is None else speech.tokenizer.bos_token_id
        head = tokens[:1] if tokens[0] == begin and most > 1 else []
        return head + tokens[len(tokens) - most + len(head) :]


def _bad_words(params: SamplingParams, speech: _Speech) -> tuple[tuple[int, ...], ...]:
    spelt: set[tuple[int, ...]] = set()
    for word in params.bad_words or ():
        assert speech.tokenizer is not None, "checked"
        spelt |= spell(speech.tokenizer, word)
    return tuple(sorted(spelt))
