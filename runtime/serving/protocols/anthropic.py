"""`/v1/messages`, as Anthropic's clients speak it."""

import json
import reprlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from ...frontend.text_stream import RequestText
from ..http.errors import ApiError
from ..http.streams import event, json_response
from ..parsing import MessageDelta
from ..server import Server
from .chat import ChatJob, ChatRequest, chat_options
from .fields import Strict
from .responding import respond
from .shapes.anthropic import Count, Message
from .shapes.base import AnthropicError, described

_STOP_REASONS = {
    "length": "max_tokens",
    "abort": "max_tokens",  # cut off as well, and of what there is for that the nearest
    "tool_calls": "tool_use",
}


class OutputFormat(Strict):
    """A schema that the answer keeps to."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """Of which form the answer is, and how much the model thinks before it."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(Strict):
    """A conversation as Anthropic's API has it."""

    not_here: ClassVar[dict[str, str]] = {
        "mcp_servers": "this server calls no others; leave it out",
        "container": "this server runs no code; leave it out",
        "context_management": "conversations are taken as they are; leave it out",
        "output_format": "it is output_config.format",
        "priority": "this API has none; OpenAI's routes take it",
    }

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None

    def as_chat(self, **more: Any) -> ChatRequest:
        """The same as OpenAI's API has it. Raises ApiError."""
        given: dict[str, Any] = {"model": self.model, **more}
        said = list(_messages(self.messages))
        if not said:
            raise _wrong("the messages' contents are empty lists; give a block at least")
        given["messages"] = [*_system(self.system), *said]
        if self.tools:
            given["tools"] = [_tool(tool) for tool in self.tools]
        if self.tool_choice is not None:
            given |= _choice(self.tool_choice)
        if self.output_config is not None:
            given |= _output(self.output_config)
        thinking = (self.thinking or {}).get("type")
        if thinking is not None:
            given["chat_template_kwargs"] = {"enable_thinking": thinking != "disabled"}
        return ChatRequest(**given)


class MessagesRequest(CountRequest):
    """A conversation to be answered."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = False
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def asked(self) -> ChatRequest:
        """The same as OpenAI's API has it. Raises ApiError."""
        more = {
            name: value
            for name in ("max_tokens", "temperature", "top_p", "top_k")
            if (value := getattr(self, name)) is not None
        }
        if self.stop_sequences:
            more["stop"] = self.stop_sequences
        return self.as_chat(**more)


# -- from Anthropic's words to OpenAI's ------------------------------------------------------------


def _wrong(message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", "messages")


def _system(system: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if system is None:
        return []
    return [{"role": "system", "content": system if isinstance(system, str) else _text(system)}]


def _text(blocks: Any) -> str:
    """The text of blocks that are text alone. Raises ApiError for anything else."""
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise _wrong(f"{reprlib.repr(blocks)} is no content; give a text, or a list of blocks")
    for block in blocks:
        if block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise _wrong(f"a block of type {block.get('type')!r} is not understood there; use text")
    return "\n".join(block["text"] for block in blocks)


def _messages(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise _wrong(f"a message's role is {role!r}; use user, assistant or system")
        if isinstance(content, str):
            yield {"role": role, "content": content}
        elif not isinstance(content, list) or not all(isinstance(b, dict) for b in content):
            raise _wrong(f"{reprlib.repr(content)} is no content; give a text, or a list of blocks")
        elif role == "user":
            yield from _of_user(content)
        elif role == "system":
            yield {"role": role, "content": _text(content)}
        else:
            yield _of_assistant(content)


def _of_user(blocks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Results of tools first, as OpenAI's API wants them, and then what the user says."""
    said = []
    for block in blocks:
        if block.get("type") == "tool_result":
            content = block.get("content") or ""
            yield {
                "role": "tool",
                "tool_call_id": block.get("tool_use_id"),
                "content": content if isinstance(content, str) else _text(content),
            }
        else:
            said.append(block)
    if said:
        yield {"role": "user", "content": _text(said)}


def _of_assistant(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    said, calls = [], []
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_use":
            arguments = json.dumps(block.get("input") or {})
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            message["reasoning_content"] = block.get("thinking", "")
        else:
            said.append(block)
    message["content"] = _text(said)
    if calls:
        message["tool_calls"] = calls
    return message


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise ApiError(
            400,
            f"a tool is of type {tool['type']!r}, which this server does not have; describe tools "
            "by name and input_schema",
            "invalid_value",
            "tools",
        )
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema") or {}}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _output(config: OutputConfig) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if config.effort is not None:
        given["reasoning_effort"] = config.effort
    if config.format is not None:
        schema = {"name": "output", "schema": config.format.schema_}
        given["response_format"] = {"type": "json_schema", "json_schema": schema}
    return given


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    kind = choice.get("type")
    known: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    if kind == "tool":
        known["tool"] = {"type": "function", "function": {"name": choice.get("name")}}
    if not isinstance(kind, str) or kind not in known:
        raise ApiError(
            400,
            f"tool_choice is {choice!r}; its type is auto, any, none, or tool with a name",
            "invalid_value",
            "tool_choice",
        )
    return {
        "tool_choice": known[kind],
        "parallel_tool_calls": not choice.get("disable_parallel_tool_use"),
    }


# -- and back --------------------------------------------------------------------------------------


class MessagesJob:
    """One message under way."""

    def __init__(
        self, server: Server, asked: MessagesRequest, request_id: str, tenant: str
    ) -> None:
        self.job = ChatJob(server, asked.asked(), request_id, tenant)
        self.job.id = f"msg_{request_id}"

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.job.id,
            "type": "message",
            "role": "assistant",
            "model": self.job.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        told = self.job.usage()
        cached = told["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": told["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": told["completion_tokens"],
        }

    def _end(self) -> dict[str, Any]:
        """Why it ended."""
        (answer,) = self.job.answers
        reason, stop = answer.finish_reason(), answer.stop_reason
        told = _STOP_REASONS.get(reason, "end_turn")
        if reason == "stop" and isinstance(stop, str):
            told = "stop_sequence"
        return {"stop_reason": told, "stop_sequence": stop if isinstance(stop, str) else None}

    @property
    def texts(self) -> list[RequestText]:
        """What runs for it."""
        return [self.job.text]

    async def run(self) -> dict[str, Any]:
        """The message, when all of it is there."""
        blocks = _Blocks()
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                for _ in blocks.take(part):
                    pass
        return {**self._message(blocks.finished()), **self._end()}

    async def events(self) -> AsyncGenerator[bytes]:
        """The message as events."""
        blocks = _Blocks()
        has_begun = False
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                if not has_begun:  # not before: what is refused has a status then
                    has_begun = True
                    yield _event("message_start", message=self._message([]))
                for told in blocks.take(part):
                    yield told
        for told in blocks.close():
            yield told
        yield _event("message_delta", delta=self._end(), usage=self._usage())
        yield _event("message_stop")

    def last_words(self, error: ApiError) -> bytes:
        """How the stream ends by an error."""
        return event(error.anthropic_body(), "error")

    async def _parts(self) -> AsyncGenerator[MessageDelta]:
        job = self.job
        async with aclosing(job.server.deltas([job.text], job.id)) as bits:
            async for some in bits:
                for _, delta in some:
                    for part in job.answers[0].read(delta):
                        yield part


class _Blocks:
    """Parts of a message as Anthropic's blocks, one open at a time."""

    def __init__(self) -> None:
        self._done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._key: tuple[str, int] | None = None
        self._pieces: list[str] = []

    def take(self, part: MessageDelta) -> Iterator[bytes]:
        """What came, as events."""
        if part.reasoning:
            yield from self._put(("thinking", 0), {"thinking": "", "signature": ""}, part.reasoning)
        if part.content:
            yield from self._put(("text", 0), {"text": ""}, part.content)
        for call in part.tool_calls:
            start = {"id": call.id or "", "name": call.name or "", "input": {}}
            yield from self._put(("tool_use", call.index), start, call.arguments)

    def _put(self, key: tuple[str, int], start: dict[str, Any], piece: str) -> Iterator[bytes]:
        if key != self._key:
            yield from self.close()
            self._key, self._open, self._pieces = key, {"type": key[0], **start}, []
            yield _event("content_block_start", index=len(self._done), content_block=self._open)
        if piece:
            self._pieces.append(piece)
            delta = {
                "thinking": {"type": "thinking_delta", "thinking": piece},
                "text": {"type": "text_delta", "text": piece},
                "tool_use": {"type": "input_json_delta", "partial_json": piece},
            }[key[0]]
            yield _event("content_block_delta", index=len(self._done), delta=delta)

    def close(self) -> Iterator[bytes]:
        """The open block is complete."""
        if self._open is None:
            return
        text, kind = "".join(self._pieces), self._open["type"]
        whole = dict(self._open)
        if kind == "tool_use":
            whole["input"] = _arguments(text)
        else:
            whole[kind] = text
        yield _event("content_block_stop", index=len(self._done))
        self._done.append(whole)
        self._open = self._key = None

    def finished(self) -> list[dict[str, Any]]:
        """All blocks, when no more will come."""
        for _ in self.close():
            pass
        return self._done


def _arguments(text: str) -> Any:
    """A call's arguments; as a text where the model has not finished them."""
    try:
        return json.loads(text) if text else {}
    except ValueError:
        return {"unfinished": text}


def _event(name: str, **data: Any) -> bytes:
    return event({"type": name, **data}, name)


def router(server: Server) -> APIRouter:
    """The protocol's routes."""
    routes = APIRouter(tags=["Anthropic"])

    @routes.post(
        "/v1/messages",
        response_model=None,
        responses=described(Message, body=True, work=True, stream=True, error=AnthropicError),
    )
    async def messages(request: Request, asked: MessagesRequest) -> Response:
        """Answer a conversation."""
        return await respond(
            server,
            request,
            lambda: MessagesJob(server, asked, request.state.request_id, server.tenant(request)),
            num_characters=len(str(asked.messages)),
            compiles=bool(asked.tools or asked.output_config),
            stream=asked.stream,
        )

    @routes.post(
        "/v1/messages/count_tokens",
        response_model=None,
        responses=described(Count, 404, body=True, error=AnthropicError),
    )
    async def count_tokens(asked: CountRequest) -> Response:
        """How many tokens a conversation has."""
        server.check_ready()
        chat = asked.as_chat()
        count = await server.prepare(lambda: _count(server, chat), len(str(asked.messages)))
        return json_response({"input_tokens": count})

    return routes


def _count(server: Server, chat: ChatRequest) -> int:
    """Tokens of a conversation, of more than the model takes, too. Raises as `ChatJob`."""
    server.model_name(chat.model)
    model = server.maker(chat.model).model
    server.answers(model).parser(tools=chat.tools, tool_choice=chat.choice(), prompt="")  # checks
    options = chat_options(server, chat)
    return len(server.requests.front_end.render_chat(chat.messages, options, model))
