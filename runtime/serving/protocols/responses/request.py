"""What a request of `/v1/responses` asks, and the same as a conversation."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from ...http.errors import ApiError
from ...http.streams import encode_json
from ..chat import ChatRequest
from ..fields import HARMLESS, Asked, Strict
from .input_items import conversation

_NO_STATE = "nothing is kept between requests; send the whole conversation as input"
LOGPROBS = "message.output_text.logprobs"
_SAME = (  # under the same name in a conversation
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "stop",
    "ignore_eos",
    "cache_salt",
    "priority",
    "request_id",
    "parallel_tool_calls",
    "chat_template_kwargs",
)


class TextFormat(Strict):
    """What the answer's text keeps to."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    def as_chat(self) -> dict[str, Any]:
        """As `response_format` has it. Raises ApiError."""
        if self.type != "json_schema":
            return {"type": self.type}
        if self.schema_ is None or self.name is None:
            raise ApiError(
                400,
                "text.format is json_schema without a name and a schema; give both",
                "invalid_value",
                "text.format",
            )
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_}}


class TextConfig(Strict):
    """`text`: of which form the answer is."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = Field(
        None, description="medium alone; say how long an answer is to be in the instructions."
    )


class Reasoning(Strict):
    """`reasoning`: how much the model thinks before it answers."""

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Taken, and of no effect: reasoning is told in full."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description=HARMLESS
    )


class StreamOptions(Strict):
    """`stream_options` of this API."""

    include_obfuscation: bool | None = Field(None, description=HARMLESS)


class ResponsesRequest(Asked):
    """A conversation to be answered."""

    not_here: ClassVar[dict[str, str]] = {
        "previous_response_id": _NO_STATE,
        "conversation": _NO_STATE,
        "prompt": "there are no prompts kept here; send its text as instructions",
        "max_tool_calls": "this server calls no tools itself; leave it out",
        "messages": "it is input here; messages are for /v1/chat/completions",
        "max_tokens": "it is max_output_tokens here",
        "response_format": "it is text.format here",
        "reasoning_effort": "it is reasoning.effort here",
        "context_management": "conversations are taken as they are; leave it out",
        "moderation": "nothing would read it; leave it out",
        "n": "a response has one answer; use /v1/chat/completions for several",
    }

    input: str | list[dict[str, Any]] = Field(description="A text, or a list of items.")
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None
    top_logprobs: int | None = Field(None, ge=0)
    include: list[str] | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = Field(None, description="false: nothing is kept between requests.")
    background: bool | None = Field(None, description="false: an answer is waited for.")
    truncation: Literal["disabled"] | None = Field(
        None, description="disabled: a conversation is taken whole, or refused."
    )
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, description=HARMLESS)
    prompt_cache_key: str | None = Field(None, description=HARMLESS)
    prompt_cache_retention: str | None = Field(None, description=HARMLESS)

    def as_chat(self) -> ChatRequest:
        """The same as a conversation. Raises ApiError."""
        self._check_state()
        given: dict[str, Any] = {
            name: value for name in _SAME if (value := getattr(self, name)) is not None
        }
        given["messages"] = conversation(self.instructions, self.input)
        if self.max_output_tokens is not None:
            given["max_tokens"] = self.max_output_tokens
        if self.tools:
            given["tools"] = [_tool(tool) for tool in self.tools]
        if self.tool_choice is not None:
            given["tool_choice"] = _choice(self.tool_choice)
        if self.text is not None and self.text.format is not None:
            given["response_format"] = self.text.format.as_chat()
        if self.reasoning is not None and self.reasoning.effort is not None:
            given["reasoning_effort"] = self.reasoning.effort
        return ChatRequest(**given, **self._logprobs())

    def _check_state(self) -> None:
        """Refuse what only a server that keeps responses can do."""
        for name in ("store", "background"):
            if getattr(self, name):
                raise ApiError(
                    400,
                    f"{name} is true, and this server keeps no responses; leave it out",
                    "not_supported",
                    name,
                )

    def _logprobs(self) -> dict[str, Any]:
        for name in self.include or ():
            if name not in (LOGPROBS, "reasoning.encrypted_content"):  # it is told in clear
                raise ApiError(
                    400,
                    f"include has {name!r}, which no answer here has; use {LOGPROBS!r}, or leave "
                    "it out",
                    "invalid_value",
                    "include",
                )
        if LOGPROBS in (self.include or ()):
            return {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.top_logprobs:
            raise ApiError(
                400,
                f"top_logprobs is {self.top_logprobs}, and nothing would show them; set include to "
                f"[{LOGPROBS!r}]",
                "invalid_value",
                "top_logprobs",
            )
        return {}

    def told(self) -> dict[str, Any]:
        """What a response tells of its request. Raises ApiError for what cannot be told."""
        text = self.text.model_dump(by_alias=True, exclude_none=True) if self.text else {}
        told = {
            "instructions": self.instructions,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "tool_choice": self.tool_choice or "auto",
            "tools": [{"strict": None, "parameters": None, **tool} for tool in self.tools or ()],
            "max_output_tokens": self.max_output_tokens,
            "top_logprobs": self.top_logprobs or 0,
            "text": {"format": {"type": "text"}, **text},
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None},
            "previous_response_id": None,
            "truncation": "disabled",
            "background": False,
            "store": False,
            "service_tier": "default",
            "user": self.user,
        }
        for name, value in told.items():
            _check_text(name, value)
        return told


def _check_text(name: str, value: Any) -> None:
    try:
        encode_json(value)
    except UnicodeEncodeError as error:
        raise ApiError(
            400,
            f"{name} has half of a surrogate pair, which is no character; leave it out",
            "invalid_value",
            name,
        ) from error


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as a conversation has it."""
    if tool.get("type") != "function":
        raise ApiError(
            400,
            f"a tool is of type {tool.get('type')!r}, which this server does not have; describe "
            "tools as {'type': 'function', 'name': …, 'parameters': …}",
            "invalid_value",
            "tools",
        )
    function = {"name": tool.get("name"), "parameters": tool.get("parameters") or {}}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _choice(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(choice, str):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    raise ApiError(
        400,
        f"tool_choice is of type {choice.get('type')!r}, which this server does not have; use "
        "none, auto, required or {'type': 'function', 'name': …}, and give only tools that may "
        "be called",
        "invalid_value",
        "tool_choice",
    )
