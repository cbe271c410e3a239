"""Answers of `/v1/messages`."""

from typing import Any, Literal

from .base import Shape


class TextBlock(Shape):
    """What the model says."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Shape):
    """What the model thinks."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(Shape):
    """What the model calls."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Any


class MessageUsage(Shape):
    """What a message cost."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class Message(Shape):
    """An answered conversation."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class Count(Shape):
    """How many tokens a conversation has."""

    input_tokens: int
