"""One answer, parsed as it comes."""

from collections.abc import Callable

from .deltas import MessageDelta
from .draft import Draft
from .source import Markers, Reading, Source

Reader = Callable[[Source, Draft], Reading[None]]
"""Makes a draft of a source's text."""

_NOTHING = Markers(())


class MessageParser:
    """Makes content, reasoning and calls of an answer's text. For one answer, and one thread.

    However the text is cut into pieces, what comes of them together is the same. Nothing that is
    in the text raises an error.

    Args:
        read: how answers are written.
        draft: takes what is read.
    """

    def __init__(self, read: Reader, draft: Draft) -> None:
        self._source = Source()
        self._draft = draft
        self._reading = _read_all(read, self._source, draft)

    def feed(self, text: str) -> MessageDelta:
        """What became known by the text that follows."""
        self._source.push(text)
        next(self._reading)  # it waits again at the latest when all text is read
        return self._draft.take()

    def finish(self) -> MessageDelta:
        """What was held back, now that no more will come.

        A call that was cut off is given as far as it came, so that its arguments are no whole
        JSON. What was not known to be a call by then is content.
        """
        self._source.close()
        for _ in self._reading:
            raise AssertionError("a reader waits for text behind the end")
        self._draft.close()
        return self._draft.take()


def _read_all(read: Reader, source: Source, draft: Draft) -> Reading[None]:
    """Also what a reader leaves unread."""
    yield from read(source, draft)
    yield from source.scan(_NOTHING, draft.content)
