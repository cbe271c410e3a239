"""Content, reasoning and tool calls, made of an answer's text as it comes."""

from .answer_format import AnswerFormat, answer_format, check_names
from .deltas import MessageDelta, ToolCallDelta
from .grammar import tool_grammar
from .message_parser import MessageParser

__all__ = [
    "AnswerFormat",
    "MessageDelta",
    "MessageParser",
    "ToolCallDelta",
    "answer_format",
    "check_names",
    "tool_grammar",
]
