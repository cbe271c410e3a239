"""`<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes, Qwen 2.5, Qwen 3 and others."""

import re

from ..draft import Draft
from ..json_calls import CallReader
from ..source import Reading, Source
from .base import as_text

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_BETWEEN = re.compile(r"[\s,}]+")  # calls of one tag, or a brace too many


class Hermes:
    """Calls as JSON between tags, of which the closing one may be missing. For one answer."""

    openers = (_OPENING, _CLOSING)

    def __init__(self) -> None:
        self._is_open = False  # a call came, and its closing tag is still to come

    def read_start(self, source: Source, draft: Draft) -> Reading[None]:
        """There is none that needs no tag."""
        yield from ()

    def read(self, opener: str, source: Source, draft: Draft) -> Reading[str]:
        """Read what a tag says: one call, or several at times."""
        was_open, self._is_open = self._is_open, False
        if opener == _CLOSING:
            return "" if was_open else opener
        before = opener + (yield from source.skip_space())
        while (yield from source.peek()) == "{":
            reader = CallReader(source, draft, stops=(_CLOSING,))
            if (text := (yield from reader.read())) is not None:
                return (yield from as_text(source, "" if self._is_open else before, text))
            self._is_open = True
            yield from source.read_run(_BETWEEN)
        if not self._is_open:
            return (yield from as_text(source, before, ""))
        if not (yield from source.comes(_CLOSING)) and source.is_cut_within(_CLOSING):
            source.drop()
        return ""
