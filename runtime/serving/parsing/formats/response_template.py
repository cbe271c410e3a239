"""`transformers`' own description of answers, which a tokenizer may bring (`response_template`)."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from .....vmem.errors import InvalidConfig
from ..draft import Draft
from ..source import Reading, Source

_REASONING = ("reasoning_content", "reasoning", "thinking")
_CONTENT, _CALLS = "content", "tool_calls"
_BAD_TEXT = (ValueError, KeyError, TypeError, RecursionError)  # of a part that is not as described


def check_template(template: Mapping[str, Any]) -> None:
    """Raises InvalidConfig for a template that says what a message here has no place for."""
    remedy = "choose how to read answers by tool_call_parser and reasoning_parser"
    try:
        ResponseParser(_with_content(template), prefix="")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidConfig(f"the tokenizer's response_template is wrong: {error}; {remedy}") from (
            error
        )
    known = (*_REASONING, _CONTENT, _CALLS)
    if unknown := sorted(set(template["fields"]) - set(known)):
        raise InvalidConfig(
            f"the tokenizer's response_template has the fields {', '.join(unknown)}, and messages "
            f"here have {', '.join(known)}; {remedy}"
        )
    for name in {*_REASONING, _CONTENT} & set(template["fields"]):
        field = template["fields"][name]
        if field.get("content", "text") != "text" or field.get("transform") is not None:
            raise InvalidConfig(
                f"the tokenizer's response_template makes {name!r} of more than its text, which "
                f"cannot be told while it comes; {remedy}"
            )


class TemplateReader:
    """Reads one answer by a tokenizer's response template.

    Calls are given when they are whole. One that is not as the template says, or was cut off, is
    content.

    Args:
        template: that was checked.
        tools: as the request has them, for the types of arguments; None to leave calls as text.
        has_reasoning: False to leave reasoning as text.
        prompt: which may have begun the message.
    """

    def __init__(
        self,
        template: Mapping[str, Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        has_reasoning: bool,
        prompt: str,
    ) -> None:
        self._template = _with_content(template)
        unread = [] if has_reasoning else list(_REASONING)
        unread += [_CALLS] if tools is None else []
        for name in unread:
            self._template["fields"].pop(name, None)
        self._tools: list[Any] = [dict(tool) for tool in tools or ()]
        self._parser = ResponseParser(self._template, prefix=prompt, tools=self._tools)
        self._calls_text: list[str] = []  # of the part under way, if it has calls
        self._read: list[str] = []  # since shortly before it began

    def read(self, source: Source, draft: Draft) -> Reading[None]:
        """Read to the end, a character at a time, so that pieces make no difference."""
        self._take([event for event in self._parser.initial_events if _opens(event)], draft)
        while (yield from source.peek()):
            text = source.take(1)
            self._read.append(text)
            try:
                self._take(self._parser.feed(text), draft)
            except _BAD_TEXT:  # go on behind the part that could not be read
                draft.content("".join(self._calls_text))
                self._parser = ResponseParser(self._template, prefix="", tools=self._tools)
        try:
            self._take(self._parser.finalize()[1], draft)
        except _BAD_TEXT:
            draft.content(self._cut_text())

    def _cut_text(self) -> str:
        """The text of a part that was cut off, with what may be the beginning of a marker."""
        told, read = "".join(self._calls_text), "".join(self._read)
        return read[read.find(told) :] if told else ""

    def _take(self, events: Sequence[Mapping[str, Any]], draft: Draft) -> None:
        for event in events:
            field, kind = event["field"], event["type"]
            if kind == "region_open":
                self._calls_text, self._read = [], self._read[-1:]
                if field in _REASONING:
                    draft.begin_reasoning()
            elif kind == "region_close" and field == _CALLS:
                self._close_calls(event["value"], draft)
            elif kind == "region_chunk" and field == _CALLS:
                self._calls_text.append(event["text"])
            elif kind == "region_chunk":
                self._read = []
                (draft.content if field == _CONTENT else draft.reasoning)(event["text"])

    def _close_calls(self, value: Any, draft: Draft) -> None:
        calls = [_call(item) for item in (value if isinstance(value, list) else [value])]
        if None in calls:
            draft.content("".join(self._calls_text))
            return
        for name, arguments in filter(None, calls):
            draft.begin_call(name)
            draft.arguments(arguments)


def _with_content(template: Mapping[str, Any]) -> dict[str, Any]:
    """A template by which text outside of all parts is content, and no part has to be there."""
    template = copy.deepcopy(dict(template))
    fields = template["fields"]
    if _CONTENT not in fields and all("open" in f or "open_pattern" in f for f in fields.values()):
        fields[_CONTENT] = {}
    for field in fields.values():
        field["optional"] = True
    return template


def _opens(event: Mapping[str, Any]) -> bool:
    """Whether an event of the prompt's says in which part the answer begins."""
    return event["type"] == "region_open"


def _call(value: Any) -> tuple[str, str] | None:
    """A call's name and arguments; None if it is none."""
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return function["name"], text or "{}"
