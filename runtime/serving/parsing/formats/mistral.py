"""`[TOOL_CALLS][{"name": …, "arguments": …}]`, and newer, `[TOOL_CALLS]name[ARGS]{…}`: Mistral."""

import re

from ..draft import Draft
from ..json_calls import CallReader, read_array, read_value
from ..source import Markers, Reading, Source
from .base import as_text

_OPENING, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_STOPS = (_OPENING,)
_NAME = re.compile(r"[\w.:/-]+")
_BEHIND_ID = Markers((_ARGUMENTS,))


class Mistral:
    """Calls behind a marker: a list of objects, or a name and arguments."""

    openers = (_OPENING,)

    def read_start(self, source: Source, draft: Draft) -> Reading[None]:
        """There is none that needs no marker."""
        yield from ()

    def read(self, opener: str, source: Source, draft: Draft) -> Reading[str]:
        """Read the calls behind a marker; each of the new form has a marker of its own."""
        before = opener + (yield from source.skip_space())
        char = yield from source.peek()
        if char == "[":
            text = yield from read_array(source, draft, _STOPS)
        elif char == "{":
            text = yield from CallReader(source, draft, stops=_STOPS).read()
        else:
            text = yield from _read_named(source, draft)
        return "" if text is None else (yield from as_text(source, before, text, _ID, _ARGUMENTS))


def _read_named(source: Source, draft: Draft) -> Reading[str | None]:
    """Read a name and its arguments. None if it was a call, else what was read."""
    name = yield from source.read_run(_NAME)
    marker = yield from source.comes(_ID, _ARGUMENTS)
    if not name or not (marker or (yield from source.peek()) == "{"):
        return name
    source.take(len(marker))
    if marker == _ID:  # the model's own, which may be one that was there before
        yield from source.scan(_BEHIND_ID, _drop)
    draft.begin_call(name)
    yield from source.skip_space()
    if (yield from read_value(source, draft.arguments, _STOPS)):
        draft.end_call()
    return None


def _drop(text: str) -> None:
    """Take an id that is not used."""
