"""Messages of several channels: GPT-OSS, in what its authors call harmony.

`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.name
<|constrain|>json<|message|>{…}<|call|>`. The markers are tokens of their own, and no text.
"""

import re

from ..draft import Draft
from ..json_calls import read_value
from ..source import Markers, Reading, Source, Write

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_END, _CALL, _RETURN = "<|end|>", "<|call|>", "<|return|>"
_ENDS = (_END, _CALL, _RETURN, _START, _CHANNEL)
_BODY_ENDS = Markers(_ENDS)
_HEADER_ENDS = Markers((_MESSAGE, _END, _CALL, _RETURN, _START))
_BEGINNINGS = (_START, _CHANNEL, _MESSAGE, "to=")
_MARKUP = re.compile(r"<\|(?:channel|constrain)\|>")
_HEADER_WORDS = ("assistant", "analysis", "commentary", "final", "json")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")


class Harmony:
    """Reads messages: analysis is reasoning, what is said to a function a call, else content.

    Args:
        has_calls: False to leave calls as content.
        has_reasoning: False to leave reasoning as content.
        prompt: which may have begun the first message.
    """

    def __init__(self, *, has_calls: bool, has_reasoning: bool, prompt: str) -> None:
        self._has_calls = has_calls
        self._has_reasoning = has_reasoning
        begun = prompt.rpartition(_START)[2] if _START in prompt else ""
        self._header, self._is_in_body = _begun_message(begun)
        self._num_messages = {"content": 0, "reasoning": 0}

    def read(self, source: Source, draft: Draft) -> Reading[None]:
        """Read all messages."""
        if self._is_in_body:
            marker = yield from self._body(source, draft, self._header)
        else:
            marker = yield from self._first(source, draft)
        while marker:
            header = marker if marker == _CHANNEL else ""
            if marker not in (_START, _CHANNEL):
                draft.content((yield from source.skip_space()))
                if not (yield from source.comes(*_BEGINNINGS)):
                    marker = yield from source.scan(_BODY_ENDS, draft.content)
                    continue
            marker = yield from self._message(source, draft, header)

    def _first(self, source: Source, draft: Draft) -> Reading[str]:
        """Read the message that the prompt has begun; text without a header is content."""
        space = yield from source.skip_space()
        if _CHANNEL in self._header or (yield from source.comes(*_BEGINNINGS)):
            return (yield from self._message(source, draft, self._header + space))
        draft.content(space)
        return (yield from source.scan(_BODY_ENDS, draft.content))

    def _message(self, source: Source, draft: Draft, header: str) -> Reading[str]:
        """Read a header and what follows. Returns the marker that ended it; empty at the end."""
        parts = [header]
        marker = yield from source.scan(_HEADER_ENDS, parts.append)
        header = "".join(parts)
        if marker == _MESSAGE:
            return (yield from self._body(source, draft, header))
        text = _MARKUP.sub("", header)
        if not all(map(_is_of_a_header, text.split())):  # a channel without a message
            draft.content(text)
        return marker

    def _body(self, source: Source, draft: Draft, header: str) -> Reading[str]:
        """Read a message behind its header. Returns the marker that ended it; empty at the end."""
        recipient, channel = _RECIPIENT.search(header), _CHANNEL_NAME.search(header)
        if recipient and self._has_calls:
            return (yield from _read_call(source, draft, recipient[1]))
        is_reasoning = self._has_reasoning and bool(channel) and channel[1] == "analysis"
        if is_reasoning:
            draft.begin_reasoning()
        write = self._separated(draft.reasoning if is_reasoning else draft.content, is_reasoning)
        return (yield from source.scan(_BODY_ENDS, write))

    def _separated(self, write: Write, is_reasoning: bool) -> Write:
        """Part a message from the one before it."""
        kind = "reasoning" if is_reasoning else "content"
        if self._num_messages[kind]:
            write("\n")
        self._num_messages[kind] += 1
        return write


def _is_of_a_header(word: str) -> bool:
    """Whether a header has such a word, which may be cut off."""
    return word.startswith("to=") or any(known.startswith(word) for known in _HEADER_WORDS)


def _begun_message(text: str) -> tuple[str, bool]:
    """Of a prompt's last message: the header as far as it is there, and whether it is complete.

    A message that has ended as well is none to go on with.
    """
    header, marker, body = text.partition(_MESSAGE)
    if marker and any(end in body for end in (_END, _CALL, _RETURN)):
        return "", False
    return header, bool(marker)


def _read_call(source: Source, draft: Draft, recipient: str) -> Reading[str]:
    """Read arguments. What looks like a marker within their strings is text."""
    draft.begin_call(recipient.removeprefix("functions."))
    yield from source.skip_space()
    if (yield from source.peek()) in ("{", "["):
        yield from read_value(source, draft.arguments, _ENDS)
    yield from source.skip_space()
    marker = yield from source.reach(_BODY_ENDS, draft.arguments, is_text=False)
    if not marker:
        source.drop()
        return ""
    draft.end_call()
    return source.take(len(marker))
