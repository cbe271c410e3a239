"""The text of an answer, read in order while it is still being written.

A reader is a generator that yields wherever it needs more text. So it is written as if all of it
were there, and what it finds cannot depend on how the text was cut into pieces.
"""

import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

_T = TypeVar("_T")

Reading = Generator[None, None, _T]
"""Reads of a source, and comes to a value; yields for more text."""
Write = Callable[[str], object]
"""Takes the text that follows."""

_SPACE = re.compile(r"\s+")


class Markers:
    """Literal texts to be looked for, none of which is a part of another."""

    def __init__(self, markers: Iterable[str]) -> None:
        self.texts = tuple(dict.fromkeys(markers))
        assert all(self.texts), "an empty marker is everywhere"
        assert not any(a != b and a in b for a in self.texts for b in self.texts)
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        self._beginnings = {text[:n] for text in self.texts for n in range(1, len(text))}
        self._longest = max(map(len, self._beginnings), default=0)

    def num_held(self, text: str) -> int:
        """Characters at the end of a text with which a marker may begin."""
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0


class Source:
    """Text that comes in pieces and is read once, from its beginning to its end."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # what is before it has been read
        self._record: list[str] | None = None
        self._is_over = False

    def push(self, text: str) -> None:
        """Add text at the end."""
        assert not self._is_over, "the end was told already"
        self._text = self._text[self._at :] + text
        self._at = 0

    def close(self) -> None:
        """No more text will come."""
        self._is_over = True

    # -- looking ahead -------------------------------------------------------------------------

    def has(self, length: int) -> Reading[bool]:
        """Whether so many characters are still to be read."""
        while len(self._text) - self._at < length:
            if self._is_over:
                return False
            yield
        return True

    def peek(self) -> Reading[str]:
        """The next character, which stays to be read; empty at the end."""
        there = yield from self.has(1)
        return self._text[self._at] if there else ""

    def comes(self, *markers: str) -> Reading[str]:
        """Which of some markers comes next, all of which stays to be read; empty if none does."""
        while True:
            for marker in markers:
                if self._text.startswith(marker, self._at):
                    return marker
            length = len(self._text) - self._at
            rest = self._text[self._at :] if length < max(map(len, markers)) else None
            if rest is None or not any(marker.startswith(rest) for marker in markers):
                return ""
            if self._is_over:
                return ""
            yield

    def is_cut_within(self, *markers: str) -> bool:
        """Whether the text ends with the beginning of a marker, and nothing else is to be read."""
        rest = self._text[self._at :] if self._is_over else ""
        return bool(rest) and any(marker.startswith(rest) for marker in markers)

    # -- reading -------------------------------------------------------------------------------

    def take(self, length: int) -> str:
        """Read characters that are known to be there."""
        text = self._text[self._at : self._at + length]
        assert len(text) == length
        self._at += length
        if self._record is not None:
            self._record.append(text)
        return text

    def match(self, pattern: re.Pattern[str]) -> str:
        """Read what a pattern matches of the text that is there; it may go on behind that."""
        found = pattern.match(self._text, self._at)
        return self.take(len(found[0])) if found else ""

    def read_run(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Read all that a class of characters matches, however it comes."""
        parts = []
        while (yield from self.peek()) and (text := self.match(pattern)):
            parts.append(text)
        return "".join(parts)

    def skip_space(self) -> Reading[str]:
        """Read white space up to other text, or to the end. Returns it."""
        return (yield from self.read_run(_SPACE))

    def scan(self, markers: Markers, write: Write) -> Reading[str]:
        """Write all text up to the first of the markers and read that too.

        Returns the marker; empty if the end came first. What may be the beginning of a marker is
        held back until it is known.
        """
        marker = yield from self.reach(markers, write)
        return self.take(len(marker))

    def reach(self, markers: Markers, write: Write, *, is_text: bool = True) -> Reading[str]:
        """As `scan`, but the marker stays to be read.

        So does the beginning of one with which the text is cut off, unless that `is_text` then.
        """
        while True:
            found = markers.pattern.search(self._text, self._at)
            if found:
                self._write(found.start() - self._at, write)
                return found[0]
            rest = self._text[self._at :]
            held = 0 if self._is_over and is_text else markers.num_held(rest)
            self._write(len(rest) - held, write)
            if self._is_over:
                return ""
            yield

    def drop(self) -> None:
        """Leave unread all that is there."""
        self._at = len(self._text)

    def _write(self, length: int, write: Write) -> None:
        if length:
            write(self.take(length))

    # -- going back ----------------------------------------------------------------------------

    def record(self) -> None:
        """Keep what is read from here on, for `recorded`."""
        self._record = []

    def recorded(self) -> str:
        """What was read since `record`; nothing more is kept."""
        assert self._record is not None
        text, self._record = "".join(self._record), None
        return text
