"""What the routes of a front process share: the engine, the model's face, who is under way."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

from starlette.requests import Request
from transformers import PreTrainedTokenizerBase

from ..adapters.adapters import AdapterStats, known_names
from ..execution.grammars import Grammars
from ..frontend.async_requests import AsyncRequests
from ..frontend.front_end import FrontEnd
from ..frontend.prompts import ITSELF, Maker
from ..frontend.text_stream import RequestText
from ..link.engine_link import EngineLink
from ..link.face import Face
from ..request.sampling_params import ALL_TOKENS, SamplingParams
from .generation import Delta, deltas
from .http.errors import ApiError
from .metrics import Metrics
from .options import ServeOptions
from .parsing import AnswerFormat, answer_format
from .places import Admittance
from .protocols.fields import Sampling

_log = logging.getLogger(__name__)

_LONG_TEXT = 20_000  # characters, from which on the event loop does not wait for the tokenizer
_NO_LIMIT = 1 << 30  # of requests with the engine: `Admittance` keeps it

_T = TypeVar("_T")


class Server:
    """A front process: the engine it calls, and the model as callers see it.

    It takes requests once it has met the model (`meet`).

    Attributes:
        is_draining: no further request is taken.
        created: when it began, for /v1/models.
    """

    def __init__(self, options: ServeOptions, engine: EngineLink) -> None:
        self.options = options
        self.engine = engine
        self.is_draining = False
        self._compilers = ThreadPoolExecutor(2, thread_name_prefix="vkv-compile")
        self.created = int(time.time())
        self._face: Face | None = None
        self._requests: AsyncRequests | None = None
        self._answers: dict[str | None, AnswerFormat] = {}  # by model, None for the engine's own
        self._admittance: Admittance | None = None
        self._metrics: Metrics | None = None

    def meet(self, face: Face, grammars: Grammars | None = None) -> None:
        """An engine has answered; after a restart it is the same model again.

        `grammars` are the engine's own, where it is in this process.
        """
        _log.info("%s is ready: %s, %s", face.name, face.device, face.dtype)
        if self._face is not None:
            return
        if self.options.chat_template is not None and face.tokenizer is not None:
            face.tokenizer.chat_template = self.options.read_chat_template()
        self._answers[None] = _format(self.options, face.tokenizer)
        if grammars is None and face.tokenizer is not None:  # to refuse before anything is sent
            grammars = Grammars(face.tokenizer, face.admission.vocab_size)
        adapters = lambda: known_names(self.adapters)  # noqa: E731
        front_end = FrontEnd(face, face.admission, grammars, adapters, face.voices)
        self._requests = AsyncRequests(
            front_end,
            self.engine,
            max_unfinished=_NO_LIMIT,
            most_arrivals=self.options.max_chunk_rate or None,
        )
        name = (*self.options.served_model_name, face.name)[0]
        self._metrics = Metrics(face, name, self.engine)
        self._admittance = Admittance(self.options, face.max_seqs, self._metrics.rejected)
        self._face = face

    # -- what there is -------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """True while requests are taken."""
        return self._face is not None and self.engine.is_ready and not self.is_draining

    @property
    def face(self) -> Face:
        """The model. Raises ApiError 503 while it loads."""
        return _there(self._face)

    @property
    def requests(self) -> AsyncRequests:
        """Where requests run. Raises ApiError 503 while the model loads."""
        return _there(self._requests)

    def answers(self, model: str | None) -> AnswerFormat:
        """How a model's answers are to be read, None for the engine's own. Raises ApiError 503
        while it loads, InvalidConfig for a parser that was asked for and does not go with it."""
        front_end = self.requests.front_end
        if model not in self._answers:
            self._answers[model] = _format(self.options, front_end.tokenizer_of(model))
        return self._answers[model]

    @property
    def admittance(self) -> Admittance:
        """Who is under way. Raises ApiError 503 while the model loads."""
        return _there(self._admittance)

    @property
    def metrics(self) -> Metrics:
        """What is counted. Raises ApiError 503 while the model loads."""
        return _there(self._metrics)

    @property
    def num_under_way(self) -> int:
        """Requests that run or wait."""
        return self._admittance.num_requests if self._admittance is not None else 0

    @property
    def names(self) -> tuple[str, ...]:
        """The model's, as requests may call it."""
        own = [name for name, voice in self.face.voices.items() if voice is None]
        return tuple(self.options.served_model_name) or (*own, self.face.name)[:1]

    @property
    def others(self) -> tuple[str, ...]:
        """The models that run beside it, by name."""
        return tuple(name for name in self.face.voices if name not in self.names)

    @property
    def adapters(self) -> tuple[AdapterStats, ...]:
        """Those that requests may name as their model."""
        stats = self.engine.stats
        return () if stats is None else tuple(a for a in stats.adapters if not a.is_leaving)

    def check_ready(self) -> None:
        """Raises ApiError 503, or EngineDied, while nothing can be asked."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", "unavailable", retry_after_s=30)
        _there(self._face)
        self.engine.check_open()

    def check_room(self, request: Request) -> None:
        """As `check_ready`, and raises ApiError 503 or 429 if there is no place for one more.

        It is asked before a prompt is read, which would be for nothing.
        """
        self.check_ready()
        self.admittance.check(1, 0, request.state.key)

    def model_name(self, asked: str | None) -> str:
        """The name for the answer. Raises ApiError 404 for a model that is not here."""
        adapters = (adapter.name for adapter in self.adapters)
        names = (*self.names, *self.others, *adapters)
        if asked is None or asked in names:
            return asked or names[0]
        raise ApiError(
            404,
            f"there is no model {asked!r} here; use {' or '.join(map(repr, names))}",
            "model_not_found",
            "model",
        )

    def maker(self, asked: str | None) -> Maker:
        """The model or the adapter that a request's `model` names."""
        if asked is None or asked in self.names:
            return ITSELF
        return Maker(model=asked) if asked in self.others else Maker(adapter=asked)

    # -- requests ------------------------------------------------------------------------------

    def tenant(self, request: Request) -> str:
        """Whose key a request shows; empty where there are no keys."""
        key: int | None = request.state.key
        return "" if key is None else self.options.tenants[key]

    def params(self, base: SamplingParams, fields: Sampling, **more: object) -> SamplingParams:
        """What a request asks over what the model's authors say. Raises InvalidSamplingParams."""
        if (fields.n or 1) > self.options.max_n:
            raise ApiError(
                400,
                f"n is {fields.n}, and {self.options.max_n} outputs of a request are allowed",
                "invalid_value",
                "n",
            )
        given = {name: value for name, value in more.items() if value is not None}
        params = dataclasses.replace(base, **{**fields.sampling_values(), **given})
        for name in ("logprobs", "prompt_logprobs"):
            _check_logprobs(name, getattr(params, name), self.options.max_logprobs)
        return params

    async def prepare(
        self, make: Callable[[], _T], num_characters: int, *, compiles: bool = False
    ) -> _T:
        """Make requests, away from the event loop if that may take long: if they are long, or if a
        grammar `compiles`."""
        if num_characters < _LONG_TEXT and not compiles:
            return make()
        if not compiles:
            return await asyncio.to_thread(make)
        # On threads of their own: a grammar may take seconds, and others wait for no grammar.
        return await asyncio.get_running_loop().run_in_executor(self._compilers, make)

    def deltas(self, texts: Sequence[RequestText], name: str) -> AsyncGenerator[list[Delta]]:
        """Have requests run, under one name for `abort` (`generation.deltas`)."""
        return deltas(self.requests, self.metrics, texts, name)

    def place(self, request: Request, texts: Sequence[RequestText]) -> AbstractContextManager[None]:
        """Places for what a request asks. Raises ApiError 503 or 429, or as `check_ready`."""
        self.check_ready()  # again: to read a long prompt takes a while
        num_tokens = sum(len(text.spec.prompt_token_ids) for text in texts)
        num_requests = sum(text.spec.params.n for text in texts)
        return self.admittance.place(num_requests, num_tokens, request.state.key)


def _format(options: ServeOptions, tokenizer: PreTrainedTokenizerBase | None) -> AnswerFormat:
    return answer_format(
        tokenizer,
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
    )


def _there(what: _T | None) -> _T:
    if what is None:
        raise ApiError(503, "the model is loading; try again", "loading", retry_after_s=2)
    return what


def _check_logprobs(name: str, value: int | None, most: int) -> None:
    if value is not None and 0 <= most < value:
        asked = "all of them" if value == ALL_TOKENS else value
        raise ApiError(
            400,
            f"{name} asks for {asked}, and {most} are allowed; ask for fewer, or start the server "
            "with more --max-logprobs",
            "invalid_value",
            name,
        )


def check_own_template(server: Server, given: str | None) -> None:
    """Raises ApiError 400 for a template of a request's own, unless those are trusted.

    It is a program, and it runs in this process.
    """
    tokenizer = server.requests.front_end.tokenizer
    named = tokenizer.chat_template if tokenizer is not None else None
    is_name = isinstance(named, dict) and given in named
    if given is None or is_name or server.options.trust_request_chat_template:
        return
    raise ApiError(
        400,
        "chat_template is a program, and requests' own are not run here; leave it out, or "
        "start the server with --trust-request-chat-template",
        "invalid_value",
        "chat_template",
    )
