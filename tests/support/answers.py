"""Answers as parsers make them out, and as models write them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from vkv.runtime.serving.parsing import AnswerFormat, MessageDelta, MessageParser, answer_format

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": ["boolean", "null"]},
                    "near": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@dataclass(frozen=True)
class Answer:
    """All that came of an answer; calls are names and arguments, as text."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def by_names(calls: str, reasoning: str = "none") -> AnswerFormat:
    """A format that needs no tokenizer."""
    return answer_format(None, tool_call_parser=calls, reasoning_parser=reasoning)


def tokenizer(
    template: str | dict[str, str] | None = None,
    special: Iterable[str] = (),
    plain: Iterable[str] = (),
    **more: Any,
) -> PreTrainedTokenizerFast:
    """One that knows a chat template and added tokens, and no words."""
    own = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    own.add_special_tokens([AddedToken(text, special=True) for text in special])
    own.add_tokens([AddedToken(text, special=False) for text in plain])
    return PreTrainedTokenizerFast(tokenizer_object=own, chat_template=template, **more)


def parser(
    answers: AnswerFormat,
    *,
    tools: Sequence[Mapping[str, Any]] | None = TOOLS,
    tool_choice: str = "auto",
    prompt: str = "",
) -> MessageParser:
    """A parser of one answer, with tools."""
    return answers.parser(tools=tools, tool_choice=tool_choice, prompt=prompt)


def feed(reader: MessageParser, pieces: Iterable[str]) -> list[MessageDelta]:
    """What comes of each piece, and of the end."""
    return [*map(reader.feed, pieces), reader.finish()]


def whole(deltas: Iterable[MessageDelta]) -> Answer:
    """Deltas put together, each of which has to keep the rules of deltas."""
    deltas = list(deltas)
    calls: list[list[str]] = []
    ids = set()
    for call in (call for delta in deltas for call in delta.tool_calls):
        if call.index == len(calls):
            assert call.name, "a call begins with its name"
            assert call.id, "a call begins with its id"
            assert call.id not in ids, "a call has an id of its own"
            ids.add(call.id)
            calls.append([call.name, ""])
        assert call.index == len(calls) - 1, "calls come one behind the other"
        calls[-1][1] += call.arguments
    later = [c for d in deltas for c in d.tool_calls if c.id is not None or c.name is not None]
    assert len(later) == len(calls), "id and name come once"
    return Answer(
        content="".join(delta.content for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas),
        calls=tuple((name, arguments) for name, arguments in calls),
    )


def read(answers: AnswerFormat, pieces: Iterable[str], **how: Any) -> Answer:
    """What comes of a text's pieces."""
    return whole(feed(parser(answers, **how), pieces))


def cut(text: str, places: Iterable[int]) -> list[str]:
    """A text in pieces, some of which may be empty."""
    places = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


# -- as models write them ----------------------------------------------------------------------


def as_hermes(name: str, arguments: Any) -> str:
    """A call of Qwen 3."""
    body = {"name": name, "arguments": arguments}
    return f"\n<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>"


def as_named_mistral(name: str, arguments: Any) -> str:
    """A call of Mistral since its 11th tokenizer."""
    return f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}"


def as_mistral(calls: Sequence[tuple[str, Any]]) -> str:
    """Calls of Mistral before."""
    bodies = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return f"[TOOL_CALLS] {json.dumps(bodies, ensure_ascii=False)}" if calls else ""


def as_llama(calls: Sequence[tuple[str, Any]]) -> str:
    """Calls of Llama 3."""
    return "; ".join(
        json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)
        for name, arguments in calls
    )


def as_harmony(name: str, arguments: Any) -> str:
    """A call of GPT-OSS, behind another message."""
    return (
        f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json"
        f"<|message|>{json.dumps(arguments, ensure_ascii=False)}<|call|>"
    )


def as_coder(name: str, arguments: Mapping[str, Any]) -> str:
    """A call of Qwen3-Coder."""
    members = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n"
        "</parameter>\n"
        for key, value in arguments.items()
    )
    return f"\n<tool_call>\n<function={name}>\n{members}</function>\n</tool_call>"
