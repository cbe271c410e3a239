"""Answers of `/v1/responses`."""

from typing import Any, Literal

from .base import Shape
from .openai import CachedTokens, ChosenLogprob, ReasoningTokens

ItemStatus = Literal["completed", "incomplete"]


class OutputText(Shape):
    """A message's text."""

    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[ChosenLogprob]


class MessageItem(Shape):
    """What the model says."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningText(Shape):
    """The text of thoughts."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Shape):
    """What the model thinks."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[None]
    content: list[ReasoningText]


class CallItem(Shape):
    """What the model calls; its arguments are JSON if it came to its end."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class InputTokens(CachedTokens):
    """Tokens of the prompt that were known."""

    cache_write_tokens: int


class ResponseUsage(Shape):
    """What a response cost."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class Incomplete(Shape):
    """Why an answer has no end."""

    reason: Literal["max_output_tokens"]


class Response(Shape):
    """An answered conversation, and what was asked."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "cancelled"]
    model: str
    output: list[MessageItem | ReasoningItem | CallItem]
    error: None
    incomplete_details: Incomplete | None
    usage: ResponseUsage
    temperature: float
    top_p: float
    instructions: str | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    max_output_tokens: int | None
    top_logprobs: int
    text: dict[str, Any]
    reasoning: dict[str, Any]
    previous_response_id: None
    truncation: Literal["disabled"]
    background: Literal[False]
    store: Literal[False]
    service_tier: Literal["default"]
    user: str | None
