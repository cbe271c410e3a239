"""SHIM: plain text until the parsers are there."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, kw_only=True)
class MessageDelta:
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class MessageParser:
    def feed(self, text):
        return MessageDelta(content=text)

    def finish(self):
        return MessageDelta()


class AnswerFormat:
    skip_special_tokens = True

    def parser(self, *, tools, tool_choice, prompt):
        return MessageParser()


def answer_format(tokenizer, *, tool_call_parser="auto", reasoning_parser="auto"):
    return AnswerFormat()


def tool_grammar(tools, tool_choice, parallel):
    raise NotImplementedError
