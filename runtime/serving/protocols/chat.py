"""`/v1/chat/completions`, as OpenAI's clients and vLLM's speak it."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from ...frontend.chat_template import ChatOptions
from ...frontend.prompts import Standing
from ...frontend.text_stream import RequestText, StreamDelta
from ..http.errors import ApiError
from ..http.streams import DONE, event, last_words
from ..parsing import MessageDelta, MessageParser, ToolCallDelta, tool_grammar
from ..server import Server, check_own_template
from ..tenants import salt_of
from .fields import Sampling, Strict
from .logprobs import chat_logprobs, prompt_logprobs
from .responding import respond
from .shapes.base import described
from .shapes.openai import ChatCompletion
from .usage import usage

NO_THOUGHTS = {"enable_thinking": False}
_IN_CALLS = " ?"  # between JSON's tokens; nobody reads calls, and more of it only takes time


class JsonSchema(Strict):
    """A schema that an answer keeps to."""

    name: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """`response_format` of OpenAI's API."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structured_outputs(self) -> dict[str, Any] | None:
        """As `SamplingParams` has it. Raises ApiError."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"json_object": True}
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise ApiError(
                400,
                "response_format is json_schema without a schema; put it in json_schema.schema",
                "invalid_value",
                "response_format",
            )
        return {"json": self.json_schema.schema_}


class ChatRequest(Sampling):
    """A conversation to be answered."""

    not_here: ClassVar[dict[str, str]] = {
        **Sampling.not_here,
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "answers are text alone",
        "prediction": "nothing would read it; leave it out",
        "web_search_options": "this server reads no web; leave it out",
        "verbosity": "say it in a message, or in chat_template_kwargs",
        "documents": "put them in chat_template_kwargs, if the template has them",
        "echo": "it is of /v1/completions; prompt_logprobs has the prompt's log probabilities",
        "moderation": "nothing would read it; leave it out",
    }

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = True
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def num_logprobs(self) -> int | None:
        """As `SamplingParams.logprobs`. Raises ApiError."""
        if not self.logprobs:
            if self.top_logprobs:
                raise ApiError(
                    400,
                    f"top_logprobs is {self.top_logprobs} without logprobs; set logprobs to true",
                    "invalid_value",
                    "top_logprobs",
                )
            return None
        return self.top_logprobs or 0

    def choice(self) -> str:
        """What it says of tools: none, auto, required or a tool's name. Raises ApiError."""
        choice = self.tool_choice
        if choice is None:
            choice = "auto" if self.tools else "none"
        if isinstance(choice, dict):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str):
                raise ApiError(
                    400,
                    f"tool_choice is {choice!r}; use none, auto, required or "
                    "{'type': 'function', 'function': {'name': …}}",
                    "invalid_value",
                    "tool_choice",
                )
            choice = name
        if choice != "none" and not self.tools:
            raise ApiError(
                400,
                f"tool_choice is {self.tool_choice!r} without tools; give tools, or leave it out",
                "invalid_value",
                "tool_choice",
            )
        return choice


def chat_options(server: Server, asked: ChatRequest) -> ChatOptions:
    """How a request wants its conversation written. Raises ApiError."""
    options = ChatOptions()
    more = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        more.setdefault("reasoning_effort", asked.reasoning_effort)
    if asked.tools:
        options["tools"] = asked.tools
    check_own_template(server, asked.chat_template)
    if asked.chat_template is not None:
        options["chat_template"] = asked.chat_template
    if more == NO_THOUGHTS and not _may_think(server, asked, options):
        more = {}  # what nobody would do need not be forbidden
    if more:
        options["chat_template_kwargs"] = more
    if asked.add_generation_prompt is not None:
        options["add_generation_prompt"] = asked.add_generation_prompt
    if asked.continue_final_message:
        options["continue_final_message"] = True
    return options


def _may_think(server: Server, asked: ChatRequest, options: ChatOptions) -> bool:
    front_end, model = server.requests.front_end, server.maker(asked.model).model
    return front_end.template_takes("enable_thinking", options, model)


class ChatJob:
    """One request under way: its outputs, each read by a parser of its own."""

    def __init__(
        self, server: Server, asked: ChatRequest, request_id: str, tenant: str = ""
    ) -> None:
        self.server = server
        self.asked = asked
        self.id = f"chatcmpl-{asked.request_id or request_id}"
        self.created = int(time.time())
        self.model = server.model_name(asked.model)
        self.choice = asked.choice()
        self._format = server.answers(server.maker(asked.model).model)
        self.text = self._prepare(asked.standing(tenant))
        self.answers = [Answer(self) for _ in range(self.text.spec.params.n)]

    def _prepare(self, standing: Standing) -> RequestText:
        asked, front_end = self.asked, self.server.requests.front_end
        by = self.server.maker(asked.model)
        newer, older = asked.max_completion_tokens, asked.max_tokens
        params = self.server.params(
            front_end.chat_defaults(by.model),
            asked,
            max_tokens=older if newer is None else newer,
            logprobs=asked.num_logprobs(),
            structured_outputs=self._structure(),
            skip_special_tokens=self._skip_special_tokens(),
        )
        return front_end.chat_request(
            asked.messages,
            params,
            chat_options(self.server, asked),
            salt_of(self.server.options, standing.tenant, asked.cache_salt),
            standing,
            by,
        )

    def _structure(self) -> dict[str, Any] | None:
        """The grammar that the answer keeps to, where something asks for one."""
        asked = self.asked
        held = [
            asked.structured_outputs,
            asked.response_format and asked.response_format.structured_outputs(),
        ]
        if self.choice not in ("none", "auto"):
            parallel = asked.parallel_tool_calls is not False
            schema = tool_grammar(asked.tools or [], self.choice, parallel)
            held.append({"json": schema, "whitespace_pattern": _IN_CALLS})
        given = [structure for structure in held if structure]
        if len(given) > 1:
            raise ApiError(
                400,
                "more than one of structured_outputs, response_format and a tool_choice that asks "
                "for a call holds the answer; use one",
            )
        return given[0] if given else None

    def _skip_special_tokens(self) -> bool | None:
        """False where calls and reasoning are marked by special tokens."""
        if self.asked.skip_special_tokens is not None:
            return None
        return None if self._format.skip_special_tokens else False

    def parser(self) -> MessageParser:
        """A reader for one of the outputs."""
        is_held = self.choice in ("none", "auto") and self._structure() is not None
        prompt = "" if is_held else self.text.prompt or ""  # held text holds no thoughts
        return self._format.parser(tools=self.asked.tools, tool_choice=self.choice, prompt=prompt)

    def usage(self) -> dict[str, Any]:
        """What it cost so far."""
        tokens = sum(answer.num_reasoning_tokens for answer in self.answers)
        return usage([self.text], reasoning_tokens=tokens if tokens else None)

    @property
    def texts(self) -> list[RequestText]:
        """What runs for it."""
        return [self.text]

    def last_words(self, error: ApiError) -> bytes:
        """How the stream ends by an error."""
        return last_words(error)

    # -- the whole answer ----------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """The answer, when all of it is there."""
        bits = self.server.deltas([self.text], self.id)
        async with aclosing(bits):
            async for some in bits:
                for _, delta in some:
                    self.answers[delta.index].take(delta)
        told = {
            **self._head("chat.completion"),
            "choices": [answer.choice(i) for i, answer in enumerate(self.answers)],
            "usage": self.usage(),
        }
        if self.asked.prompt_logprobs is not None:
            told["prompt_logprobs"] = prompt_logprobs(self.text)
        if self.asked.return_token_ids:
            told["prompt_token_ids"] = list(self.text.spec.prompt_token_ids)
        return told

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    # -- bit by bit ----------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as chunks."""
        options = self.asked.stream_options
        head = self._head("chat.completion.chunk")
        always = bool(options and options.continuous_usage_stats)
        first: dict[str, Any] = {}  # of the first chunk alone
        if self.asked.return_token_ids:
            first["prompt_token_ids"] = list(self.text.spec.prompt_token_ids)
        bits = self.server.deltas([self.text], self.id)
        async with aclosing(bits):
            async for some in bits:
                for _, delta in some:
                    for choice in self.answers[delta.index].chunks(delta):
                        chunk = {**head, "choices": [choice], **first}
                        first = {}
                        if always:
                            chunk["usage"] = self.usage()
                        yield event(chunk)
        if options and options.include_usage:
            yield event({**head, "choices": [], "usage": self.usage()})
        yield DONE


class Answer:
    """One output, read as a message."""

    def __init__(self, job: ChatJob) -> None:
        self._job = job
        self._parser = job.parser()
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[dict[str, Any]] = []
        self._token_ids: list[int] = []
        self._last: StreamDelta | None = None
        self._has_begun = self._has_calls = False
        self.num_reasoning_tokens = 0

    def read(self, delta: StreamDelta) -> list[MessageDelta]:
        """What came, as parts of a message."""
        self._last = delta
        parts = [self._parser.feed(delta.text)]
        if delta.finish_reason is not None:
            parts.append(self._parser.finish())
        if any(part.reasoning for part in parts) and not any(part.content for part in parts):
            self.num_reasoning_tokens += len(delta.token_ids)
        self._has_calls |= any(part.tool_calls for part in parts)
        if self._has_calls and self._job.asked.parallel_tool_calls is False:
            parts = [_with_one_call(part) for part in parts]
        if not self._job.asked.include_reasoning:
            parts = [MessageDelta(content=p.content, tool_calls=p.tool_calls) for p in parts]
        return parts

    @property
    def stop_reason(self) -> int | str | None:
        """The stop token or string that ended it."""
        return self._last.stop_reason if self._last is not None else None

    def take(self, delta: StreamDelta) -> None:
        """Add what came to the whole."""
        for part in self.read(delta):
            self._content.append(part.content)
            self._reasoning.append(part.reasoning)
            for call in part.tool_calls:
                self._add(call)
        self._token_ids += delta.token_ids
        self._logprobs += self._entries(delta)

    def _add(self, call: ToolCallDelta) -> None:
        function: dict[str, Any] = {"name": "", "arguments": ""}
        known = self._calls.setdefault(
            call.index, {"id": "", "type": "function", "function": function}
        )
        known["id"] = known["id"] or call.id
        known["function"]["name"] = known["function"]["name"] or call.name
        known["function"]["arguments"] += call.arguments

    def choice(self, index: int) -> dict[str, Any]:
        """The whole output."""
        assert self._last is not None
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not self._calls else None,
            "refusal": None,
        }
        if reasoning:
            message["reasoning"] = message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = [self._calls[i] for i in sorted(self._calls)]
        asks = self._last.logprobs is not None
        told: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": {"content": self._logprobs} if asks else None,
            "finish_reason": self.finish_reason(),
            "stop_reason": self._last.stop_reason,
        }
        if self._job.asked.return_token_ids:
            told["token_ids"] = self._token_ids
        return told

    def chunks(self, delta: StreamDelta) -> list[dict[str, Any]]:
        """What came, as choices of chunks."""
        bodies = [_body(part) for part in self.read(delta)]
        bodies = [body for body in bodies if body]
        if not self._has_begun:
            self._has_begun = True
            bodies.insert(0, {"role": "assistant", "content": ""})
        is_over = delta.finish_reason is not None
        shows = delta.logprobs is not None or self._job.asked.return_token_ids
        if is_over or (shows and not bodies):
            bodies.append({})
        choices: list[dict[str, Any]] = [
            {"index": delta.index, "delta": body, "logprobs": None, "finish_reason": None}
            for body in bodies
        ]
        if choices and shows:  # with the last, so that none is told twice
            if delta.logprobs is not None:
                choices[-1]["logprobs"] = {
                    "content": chat_logprobs(delta, self._job.asked.top_logprobs or 0)
                }
            if self._job.asked.return_token_ids:
                choices[-1]["token_ids"] = list(delta.token_ids)
        if is_over:
            choices[-1]["finish_reason"] = self.finish_reason()
            choices[-1]["stop_reason"] = delta.stop_reason
        return choices

    def _entries(self, delta: StreamDelta) -> list[dict[str, Any]]:
        return chat_logprobs(delta, self._job.asked.top_logprobs or 0)

    def finish_reason(self) -> str:
        """As OpenAI's API names it."""
        assert self._last is not None
        reason = self._last.finish_reason or "stop"
        return "tool_calls" if reason == "stop" and self._has_calls else reason


def _with_one_call(part: MessageDelta) -> MessageDelta:
    """Without calls behind the first: only a grammar keeps a model from writing more."""
    first = tuple(call for call in part.tool_calls if not call.index)
    return replace(part, tool_calls=first)


def _body(part: MessageDelta) -> dict[str, Any]:
    """The `delta` of a chunk."""
    body: dict[str, Any] = {}
    if part.content:
        body["content"] = part.content
    if part.reasoning:
        body["reasoning"] = body["reasoning_content"] = part.reasoning
    if part.tool_calls:
        body["tool_calls"] = [
            {
                "index": call.index,
                **({"id": call.id, "type": "function"} if call.id is not None else {}),
                "function": {
                    **({"name": call.name} if call.name is not None else {}),
                    "arguments": call.arguments,
                },
            }
            for call in part.tool_calls
        ]
    return body


def router(server: Server) -> APIRouter:
    """The protocol's routes."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post(
        "/v1/chat/completions",
        response_model=None,
        responses=described(ChatCompletion, body=True, work=True, stream=True),
    )
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        return await respond(
            server,
            request,
            lambda: ChatJob(server, asked, request.state.request_id, server.tenant(request)),
            num_characters=len(str(asked.messages)),  # calls and thoughts included
            compiles=bool(asked.structured_outputs or asked.response_format or asked.tools),
            stream=asked.stream,
        )

    return routes
