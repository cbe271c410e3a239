"""`<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`: Qwen3-Coder.

Values stand as plain text. What JSON they are is in the tool's schema.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..draft import Draft
from ..source import Markers, Reading, Source, Write
from ..tools import Tool
from ..values import json_value, types_of
from .base import as_text

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME = re.compile(r"[^\s<>]+")
_BEHIND = ("\n" + _CLOSING, _CLOSING)  # a function
_VALUE_ENDS = Markers((_PARAMETER_END, _PARAMETER, _FUNCTION_END, _CLOSING))


class Qwen3Coder:
    """Calls as tags, of which those around a function may be missing. For one answer.

    Args:
        tools: whose schemas say what values are; what is in none is a string.
    """

    openers = (_OPENING, _CLOSING, _FUNCTION, _FUNCTION_END)

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._schemas = {tool.name: tool.parameters for tool in tools}
        self._is_open = False  # a call came, and its outer closing tag is still to come

    def read_start(self, source: Source, draft: Draft) -> Reading[None]:
        """There is none that needs no tag."""
        yield from ()

    def read(self, opener: str, source: Source, draft: Draft) -> Reading[str]:
        """Read a function, behind the outer tag or without it."""
        if opener in (_CLOSING, _FUNCTION_END):
            text = "" if self._is_open else opener
            self._is_open &= opener != _CLOSING
            return text
        self._is_open = False
        if opener == _OPENING:
            opener += yield from source.skip_space()
            if not (yield from source.comes(_FUNCTION)):
                return (yield from as_text(source, opener, "", _FUNCTION))
            opener += source.take(len(_FUNCTION))
        name = yield from source.read_run(_NAME)
        if (yield from source.peek()) != ">" or not name:
            return (yield from as_text(source, opener, name))
        source.take(1)
        self._is_open = True
        draft.begin_call(name)
        arguments = _Arguments(source, draft, self._schemas.get(name, {}))
        if (yield from arguments.read()):
            draft.end_call()
        if not (yield from source.comes(*_BEHIND)) and source.is_cut_within(*_BEHIND):
            source.drop()
        return arguments.rest


class _Arguments:
    """Reads the parameters of one function as the members of an object.

    Attributes:
        rest: what was read last and is no parameter.
    """

    def __init__(self, source: Source, draft: Draft, schema: Mapping[str, Any]) -> None:
        self._source = source
        self._draft = draft
        self._schema = schema
        self._num_members = 0
        self.rest = ""

    def read(self) -> Reading[bool]:
        """Read up to the end of the function. False if it is cut off."""
        source = self._source
        ends = (_FUNCTION_END, _CLOSING)
        while True:
            yield from source.skip_space()
            marker = yield from source.comes(_PARAMETER, *ends)
            if source.is_cut_within(_PARAMETER, *ends):
                source.drop()
                return False
            if marker != _PARAMETER:
                source.take(len(marker) if marker == _FUNCTION_END else 0)
                is_whole = bool(marker or (yield from source.peek()))
                if is_whole and self._num_members:
                    self._draft.arguments("}")
                return is_whole
            source.take(len(marker))
            name = yield from source.read_run(_NAME)
            if (yield from source.peek()) != ">":
                self.rest = marker + name if (yield from source.peek()) else ""
                return False
            source.take(1)
            if not (yield from self._member(name)):
                return False

    def _member(self, name: str) -> Reading[bool]:
        """Read a value up to its tag, or to the next one if that is missing."""
        opening = ", " if self._num_members else "{"
        self._num_members += 1
        self._draft.arguments(f"{opening}{json.dumps(name, ensure_ascii=False)}: ")
        types = types_of(name, self._schema)
        if types == {"string"}:
            self._draft.arguments('"')
            is_whole = yield from self._value(self._write_string)
            if is_whole:
                self._draft.arguments('"')
            return is_whole
        parts: list[str] = []
        is_whole = yield from self._value(parts.append)
        self._draft.arguments(json_value("".join(parts), types))
        return is_whole

    def _write_string(self, text: str) -> None:
        self._draft.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    def _value(self, write: Write) -> Reading[bool]:
        """Write a value without the line breaks that stand around it. False if it is cut off."""
        source = self._source
        if (yield from source.peek()) == "\n":
            source.take(1)
        held = ""

        def pass_on(text: str) -> None:
            nonlocal held
            text, held = held + text, ""
            if text.endswith("\n"):
                text, held = text[:-1], "\n"
            if text:
                write(text)

        marker = yield from source.reach(_VALUE_ENDS, pass_on, is_text=False)
        if marker == _PARAMETER_END:
            source.take(len(marker))
        elif not marker:  # cut off, perhaps within a tag
            source.drop()
        return bool(marker)
