"""JSON as models write it, read as it comes: values passed on as text, and calls as objects.

Values are passed on as they stand, however long: only brackets and strings are followed. So wrong
JSON goes through as text, too. One fault is mended: line breaks and other control characters
within strings, which models often leave unescaped.
"""

import json
import re
from typing import Any

from .draft import Draft
from .source import Reading, Source, Write

_IN_STRING = re.compile(r'[^"\\\x00-\x1f]+')
_OUTSIDE = re.compile(r'[^"{}\[\]<]+')  # up to what may be a bracket, a string, or a marker
_SCALAR = re.compile(r'[^\s",:{}\[\]<]+')
_ARGUMENTS = ("arguments", "parameters")
_MEMBERS = {"name", "type", "id", *_ARGUMENTS}


def read_string(source: Source, write: Write) -> Reading[bool]:
    """Write a string whose opening quote comes next. False if it is cut off."""
    write(source.take(1))
    while char := (yield from source.peek()):
        if plain := source.match(_IN_STRING):
            write(plain)
        elif char == '"':
            write(source.take(1))
            return True
        elif char == "\\":
            if not (yield from source.has(2)):
                write(source.take(1))
                return False
            write(source.take(2))
        else:
            write(json.dumps(source.take(1))[1:-1])
    return False


def read_value(source: Source, write: Write, stops: tuple[str, ...] = ()) -> Reading[bool]:
    """Write the value that comes next. False if it is cut off, or ended by one of `stops`.

    Stops count outside of strings, where they can be no JSON, and stay to be read.
    """
    depth = 0
    while char := (yield from source.peek()):
        if stops and (yield from source.comes(*stops)):
            return False
        if char == '"':
            if not (yield from read_string(source, write)):
                return False
        elif char in "{[":
            depth += 1
            write(source.take(1))
        elif char in "}]":
            if not depth:
                return False
            depth -= 1
            write(source.take(1))
        elif depth:
            write(source.match(_OUTSIDE) or source.take(1))
        else:
            return (yield from _read_scalar(source, write))
        if not depth:
            return True
    return False


def _read_scalar(source: Source, write: Write) -> Reading[bool]:
    """Write a number or a word; False if there is none."""
    is_there = False
    while (yield from source.peek()) and (text := source.match(_SCALAR)):
        write(text)
        is_there = True
    return is_there


class CallReader:
    """Reads one call, `{"name": …, "arguments": …}` in either order, or with `parameters`.

    Args:
        source: where the opening brace comes next.
        draft: what gets the call, from the moment that it is known to be one.
        strict: an object is a call only if it has arguments, which are an object, and no members
            that calls do not have. For text where any other object may stand as well.
        stops: markers that end the call even if braces are missing.
    """

    def __init__(
        self, source: Source, draft: Draft, *, strict: bool = False, stops: tuple[str, ...] = ()
    ) -> None:
        self._source = source
        self._draft = draft
        self._is_strict = strict
        self._stops = stops
        self._name: str | None = None
        self._early: list[str] = []  # arguments before the name is known
        self._has_arguments = self._has_begun = False

    def read(self) -> Reading[str | None]:
        """Read the object. None if it was a call, else what was read of it."""
        self._source.record()
        is_whole = yield from self._members()
        if not self._has_begun:
            return self._source.recorded()
        if is_whole:
            self._draft.end_call()
        return None

    def _members(self) -> Reading[bool]:
        """Read up to the closing brace. False where the object is cut off or none."""
        source = self._source
        source.take(1)
        while True:
            yield from source.skip_space()
            char = yield from source.peek()
            if char in ("}", ","):
                source.take(1)
                if char == "}":
                    return True
                continue
            key = (yield from self._string()) if char == '"' else None
            yield from source.skip_space()
            if key is None or (yield from source.peek()) != ":":
                return False
            source.take(1)
            yield from source.skip_space()
            if not (yield from self._member(key)):
                return False

    def _member(self, key: str) -> Reading[bool]:
        """Read a member's value. False where it is cut off, or shows that this is no call."""
        if self._is_strict and key not in _MEMBERS:
            return False
        if key == "name" and self._name is None:
            self._name = yield from self._string()
            if not self._name:
                return False
            if self._has_arguments or not self._is_strict:
                self._begin()
            return True
        if key in _ARGUMENTS and not self._has_arguments:
            return (yield from self._arguments())
        return (yield from read_value(self._source, _drop, self._stops))

    def _arguments(self) -> Reading[bool]:
        char = yield from self._source.peek()
        if self._is_strict and char != "{":
            return False
        self._has_arguments = True
        if self._name is not None:
            self._begin()
        if char in ("{", "["):
            return (yield from read_value(self._source, self._write, self._stops))
        parts: list[str] = []
        is_whole = yield from read_value(self._source, parts.append, self._stops)
        self._write(_unpacked("".join(parts)))
        return is_whole

    def _begin(self) -> None:
        if self._has_begun:
            return
        assert self._name is not None
        self._has_begun = True
        self._source.recorded()
        self._draft.begin_call(self._name)
        for text in self._early:
            self._draft.arguments(text)

    def _write(self, text: str) -> None:
        if self._has_begun:
            self._draft.arguments(text)
        else:
            self._early.append(text)

    def _string(self) -> Reading[str | None]:
        """Read a string and return what it says; None if there is none, or it is cut off."""
        if (yield from self._source.peek()) != '"':
            return None
        parts: list[str] = []
        is_whole = yield from read_string(self._source, parts.append)
        text = _loaded("".join(parts)) if is_whole else None
        return text if isinstance(text, str) else None


def read_array(source: Source, draft: Draft, stops: tuple[str, ...] = ()) -> Reading[str | None]:
    """Read calls in an array whose bracket comes next. None if all was calls, else the rest."""
    opening = source.take(1)
    has_calls = False
    while True:
        space = yield from source.skip_space()
        char = yield from source.peek()
        if char == "{":
            text = yield from CallReader(source, draft, stops=stops).read()
            if text is not None:
                return text if has_calls else opening + space + text
            has_calls = True
        elif char == "," and has_calls:
            source.take(1)
        else:
            closing = source.take(1) if char == "]" else ""
            return None if has_calls else opening + space + closing


def _loaded(text: str) -> Any:
    """What a piece of JSON says; None if it is none, or says what is no text."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            value.encode()  # half a surrogate pair cannot be sent to anybody
        return value
    except (ValueError, RecursionError):
        return None


def _unpacked(text: str) -> str:
    """Arguments that are no object: JSON within a string is taken out, `null` are none."""
    value = _loaded(text)
    if isinstance(value, str):
        return value.strip() or "{}"
    return "{}" if text == "null" else text


def _drop(text: str) -> None:
    """Take a value that says nothing of a call."""
