"""What a way of writing calls within text has to say, and how an answer is read by it."""

from dataclasses import dataclass
from typing import Protocol

from ..draft import Draft
from ..source import Markers, Reading, Source, Write


class CallFormat(Protocol):
    """How a model writes calls among its text."""

    @property
    def openers(self) -> tuple[str, ...]:
        """Markers with which a call may begin anywhere."""
        ...

    def read_start(self, source: Source, draft: Draft) -> Reading[None]:
        """Read calls that only stand where the content begins."""
        ...

    def read(self, opener: str, source: Source, draft: Draft) -> Reading[str]:
        """Read calls behind an opener. Returns text that was none of them."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReasoningMarks:
    """Between what a model's reasoning stands."""

    opening: str
    closing: str


def read_answer(
    source: Source,
    draft: Draft,
    *,
    calls: CallFormat | None,
    marks: ReasoningMarks | None,
    is_reasoning: bool,
) -> Reading[None]:
    """Read reasoning, then content, with calls in either.

    Args:
        source: the answer.
        draft: takes what is read.
        calls: how they are written; None to take them for text.
        marks: of reasoning; None if there is none. It can only begin where the answer begins.
        is_reasoning: the prompt has opened it already; if the model does so again, that is left
            out.
    """
    if marks is not None:
        draft.content((yield from source.skip_space()))
        if (yield from source.comes(marks.opening)):
            source.take(len(marks.opening))
            is_reasoning = True
        if is_reasoning:
            draft.begin_reasoning()
            yield from _read_text(source, draft, draft.reasoning, calls, marks.closing)
    if calls is not None:
        yield from calls.read_start(source, draft)
    yield from _read_text(source, draft, draft.content, calls)


def _read_text(
    source: Source, draft: Draft, write: Write, calls: CallFormat | None, closing: str = ""
) -> Reading[None]:
    """Read text and calls up to a closing marker, or to the end."""
    openers = calls.openers if calls is not None else ()
    markers = Markers((*openers, closing) if closing else openers)
    while marker := (yield from source.scan(markers, write)):
        if marker == closing:
            return
        assert calls is not None
        write((yield from calls.read(marker, source, draft)))


def as_text(source: Source, before: str, text: str, *expected: str) -> Reading[str]:
    """What stands for text that was no call: with the markup before it, unless it was cut off.

    At the end of an answer, or within a marker that was expected, it may be a call that had no
    time to show itself as one.
    """
    if source.is_cut_within(*expected):
        source.drop()
    is_cut = not (yield from source.peek())
    return text if is_cut else before + text
