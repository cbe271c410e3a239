"""`/v1/completions`, as OpenAI's older clients, lm-eval and vLLM's speak it."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import Field

from ...frontend.text_stream import RequestText, StreamDelta
from ...frontend.tokenizer import encode
from ...request.outputs import Logprob
from ..http.errors import ApiError
from ..http.streams import DONE, event, last_words
from ..server import Server
from ..tenants import salt_of
from .chat import ResponseFormat
from .fields import Sampling
from .logprobs import completion_logprobs, prompt_logprobs
from .responding import respond
from .shapes.base import described
from .shapes.openai import Completion
from .usage import usage

_MOST_PROMPTS = 256


class CompletionRequest(Sampling):
    """Prompts to be gone on with."""

    not_here: ClassVar[dict[str, str]] = {
        **Sampling.not_here,
        "suffix": "models go on with a text here, and fill no gap; leave it out",
        "messages": "conversations are for /v1/chat/completions",
        "tools": "tools are for /v1/chat/completions",
        "max_completion_tokens": "it is max_tokens here",
    }

    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description="A text, several, or the same as token ids."
    )
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = False
    logprobs: int | None = None
    add_special_tokens: bool | None = True
    response_format: ResponseFormat | None = None

    def prompts(self) -> list[str | list[int]]:
        """As a list. Raises ApiError."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if not given:
            raise ApiError(400, "prompt is an empty list; give at least one", None, "prompt")
        if isinstance(given[0], int):
            return [given]  # type: ignore[list-item]
        if len(given) > _MOST_PROMPTS:
            raise ApiError(
                400,
                f"prompt has {len(given)} prompts, and {_MOST_PROMPTS} are allowed; send several "
                "requests",
                "invalid_value",
                "prompt",
            )
        return list(given)  # type: ignore[arg-type]


@dataclass
class _Choice:
    """One output as it comes."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tables: list[dict[int, Logprob]] = field(default_factory=list)
    num_characters: int = 0
    last: StreamDelta | None = None


class CompletionJob:
    """One request under way: its prompts, and `n` outputs of each."""

    def __init__(
        self, server: Server, asked: CompletionRequest, request_id: str, tenant: str
    ) -> None:
        self.server = server
        self.asked = asked
        self.id = f"cmpl-{asked.request_id or request_id}"
        self.created = int(time.time())
        self.model = server.model_name(asked.model)
        self._by = server.maker(asked.model)
        self._tokenizer = server.requests.front_end.tokenizer_of(self._by.model)
        self.shows_output = asked.max_tokens != 0
        if not self.shows_output and not asked.echo:
            raise ApiError(
                400,
                "max_tokens is 0 without echo, which asks for nothing; set one of them",
                "invalid_value",
                "max_tokens",
            )
        self.standing = asked.standing(tenant)
        self.texts = [self._prepare(prompt) for prompt in asked.prompts()]
        self.n = self.texts[0].spec.params.n
        self._choices = [_Choice() for _ in range(self.n * len(self.texts))]

    def _prepare(self, prompt: str | list[int]) -> RequestText:
        asked, front_end = self.asked, self.server.requests.front_end
        structure = asked.response_format and asked.response_format.structured_outputs()
        if structure and asked.structured_outputs:
            raise ApiError(
                400, "response_format and structured_outputs both hold the answer; use one"
            )
        params = self.server.params(
            front_end.defaults(self._by.model),
            asked,
            max_tokens=asked.max_tokens if self.shows_output else 1,
            logprobs=asked.logprobs,
            prompt_logprobs=asked.logprobs if asked.echo else asked.prompt_logprobs,
            structured_outputs=structure or None,
        )
        salt = salt_of(self.server.options, self.standing.tenant, asked.cache_salt)
        given: dict[str, Any] = {"cache_salt": salt or None}
        if isinstance(prompt, str) and asked.add_special_tokens is False and self._tokenizer:
            given["prompt_token_ids"] = encode(
                self._tokenizer, prompt, what="the prompt", add_special_tokens=False
            )
        if isinstance(prompt, str):
            given["prompt"] = prompt
        else:
            given["prompt_token_ids"] = prompt
        return front_end.request(given, params, standing=self.standing, by=self._by)

    def last_words(self, error: ApiError) -> bytes:
        """How the stream ends by an error."""
        return last_words(error)

    # -- the whole answer ----------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """The answer, when all of it is there."""
        async with aclosing(self.server.deltas(self.texts, self.id)) as bits:
            async for some in bits:
                for number, delta in some:
                    self._take(number, delta)
        return {
            **self._head(),
            "choices": [self._whole(index) for index in range(len(self._choices))],
            "usage": self.usage(),
        }

    def _take(self, number: int, delta: StreamDelta) -> None:
        choice = self._choices[number * self.n + delta.index]
        choice.last = delta
        if self.shows_output:
            choice.text.append(delta.text)
            choice.token_ids += delta.token_ids
            choice.tables += delta.logprobs or ()

    def _whole(self, index: int) -> dict[str, Any]:
        choice, text, asked = self._choices[index], self.texts[index // self.n], self.asked
        assert choice.last is not None
        shown = self._prompt_text(text) if asked.echo else ""
        told: dict[str, Any] = {
            "index": index,
            "text": shown + "".join(choice.text),
            "logprobs": self._logprobs(text, choice.token_ids, choice.tables, len(shown)),
            **self._end(choice.last),
        }
        if asked.prompt_logprobs is not None:
            told["prompt_logprobs"] = prompt_logprobs(text)
        if asked.return_token_ids:
            told["token_ids"] = choice.token_ids
            told["prompt_token_ids"] = list(text.spec.prompt_token_ids)
        return told

    def _end(self, last: StreamDelta) -> dict[str, Any]:
        """Why an output has ended, if it has. A token that nobody asked for is no reason."""
        reason, stop = last.finish_reason, last.stop_reason
        if not self.shows_output and reason == "stop":
            reason, stop = "length", None
        return {"finish_reason": reason, "stop_reason": stop}

    def _logprobs(
        self, text: RequestText, token_ids: list[int], tables: list[dict[int, Logprob]], begin: int
    ) -> dict[str, Any] | None:
        """Of the output, and of the prompt before it where that is echoed."""
        if self.asked.logprobs is None:
            return None
        if not self.asked.echo:
            return completion_logprobs(token_ids, tables, begin)
        return self._echoed_logprobs(text, token_ids, tables)

    def _echoed_logprobs(
        self, text: RequestText, token_ids: list[int], tables: list[dict[int, Logprob]]
    ) -> dict[str, Any]:
        """Of the prompt, and of the output behind it; as far as it came, if it was aborted."""
        known = text.output().prompt_logprobs or ()
        prompt = list(text.spec.prompt_token_ids)[: len(known)]
        first = self._decoded(prompt[:1])
        return completion_logprobs([*prompt, *token_ids], [*known, *tables], 0, first)

    def _prompt_text(self, text: RequestText) -> str:
        if text.prompt is not None:
            return text.prompt
        return self._decoded(list(text.spec.prompt_token_ids))

    def _decoded(self, token_ids: list[int]) -> str:
        return "" if self._tokenizer is None else str(self._tokenizer.decode(token_ids))

    def usage(self) -> dict[str, Any]:
        """What it cost so far."""
        told = usage(self.texts)
        if not self.shows_output:
            told["completion_tokens"] = 0
            told["total_tokens"] = told["prompt_tokens"]
        return told

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    # -- bit by bit ----------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as chunks."""
        options, head = self.asked.stream_options, self._head()
        always = bool(options and options.continuous_usage_stats)
        async with aclosing(self.server.deltas(self.texts, self.id)) as bits:
            async for some in bits:
                for number, delta in some:
                    chunk = {**head, "choices": [self._chunk(number, delta)]}
                    if always:
                        chunk["usage"] = self.usage()
                    yield event(chunk)
        if options and options.include_usage:
            yield event({**head, "choices": [], "usage": self.usage()})
        yield DONE

    def _chunk(self, number: int, delta: StreamDelta) -> dict[str, Any]:
        text, asked = self.texts[number], self.asked
        choice = self._choices[number * self.n + delta.index]
        is_first, choice.last = choice.last is None, delta
        shown = self._prompt_text(text) if asked.echo and is_first else ""
        token_ids = list(delta.token_ids) if self.shows_output else []
        told: dict[str, Any] = {
            "index": number * self.n + delta.index,
            "text": shown + (delta.text if self.shows_output else ""),
            "logprobs": None,
            **self._end(delta),
        }
        if asked.logprobs is not None:
            tables = list(delta.logprobs or ()) if self.shows_output else []
            if asked.echo and is_first:
                told["logprobs"] = self._echoed_logprobs(text, token_ids, tables)
            else:
                told["logprobs"] = completion_logprobs(token_ids, tables, choice.num_characters)
        choice.num_characters += len(told["text"])
        if asked.return_token_ids:
            told["token_ids"] = token_ids
            told["prompt_token_ids"] = list(text.spec.prompt_token_ids) if is_first else None
        return told


def router(server: Server) -> APIRouter:
    """The protocol's routes."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post(
        "/v1/completions",
        response_model=None,
        responses=described(Completion, body=True, work=True, stream=True),
    )
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """Go on with prompts."""
        return await respond(
            server,
            request,
            lambda: CompletionJob(server, asked, request.state.request_id, server.tenant(request)),
            num_characters=sum(map(len, asked.prompts())),
            compiles=bool(asked.structured_outputs or asked.response_format),
            stream=asked.stream,
        )

    return routes
