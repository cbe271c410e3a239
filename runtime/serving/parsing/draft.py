"""The message that a parser makes out, as far as it was not handed over yet."""

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, field

from .deltas import MessageDelta, ToolCallDelta


def plain_call_id() -> str:
    """A call's id as OpenAI writes them."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Nine letters and digits: Mistral's templates refuse all other ids."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass
class _Call:
    """What a call got since it was last handed over."""

    id: str | None = None
    name: str | None = None
    arguments: list[str] = field(default_factory=list)


class Draft:
    """Gathers content, reasoning and calls, and hands over what has come to each.

    White space is held back until it is known to be a part of the text. Around reasoning it is
    none. Around calls it is none unless other content follows, from which it then parts what came
    before.
    """

    def __init__(self, new_id: Callable[[], str] = plain_call_id) -> None:
        self._new_id = new_id
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, _Call] = {}
        self._content_space: list[str] = []
        self._reasoning_space: list[str] = []
        self._has_content = self._has_reasoning = self._is_reasoned = False
        self._num_calls = 0
        self._has_arguments = False  # the call under way

    # -- text ----------------------------------------------------------------------------------

    def content(self, text: str) -> None:
        """Add to what the user reads."""
        if not self._has_content and (self._is_reasoned or self._num_calls):
            self._content_space.clear()
            text = text.lstrip()
        if _add(text, self._content, self._content_space):
            self._has_content = True

    def begin_reasoning(self) -> None:
        """Reasoning begins; white space before it is no content, nor is that behind it."""
        self._is_reasoned = True

    def reasoning(self, text: str) -> None:
        """Add to what the model thinks."""
        if not self._has_reasoning:
            text = text.lstrip()
        if _add(text, self._reasoning, self._reasoning_space):
            self._has_reasoning = self._is_reasoned = True

    # -- calls ---------------------------------------------------------------------------------

    def begin_call(self, name: str) -> None:
        """A call of a tool begins."""
        self._calls[self._num_calls] = _Call(self._new_id(), name)
        self._num_calls += 1
        self._has_arguments = False

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call under way."""
        assert self._num_calls, "no call has begun"
        if text:
            self._calls.setdefault(self._num_calls - 1, _Call()).arguments.append(text)
            self._has_arguments = True

    def end_call(self) -> None:
        """The call under way is whole; one without arguments gets empty ones."""
        if not self._has_arguments:
            self.arguments("{}")

    # -- handing over --------------------------------------------------------------------------

    def close(self) -> None:
        """The answer has ended: white space at the end of a plain answer is a part of it."""
        if not self._num_calls and (self._has_content or not self._is_reasoned):
            self._content += self._content_space
        self._content_space.clear()

    def take(self) -> MessageDelta:
        """What has come since the last call."""
        delta = MessageDelta(
            content="".join(self._content),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(
                ToolCallDelta(
                    index=index, id=call.id, name=call.name, arguments="".join(call.arguments)
                )
                for index, call in self._calls.items()
            ),
        )
        self._content, self._reasoning, self._calls = [], [], {}
        return delta


def _add(text: str, parts: list[str], space: list[str]) -> bool:
    """Add text and the space before it, but hold the space at its end back. False if all is."""
    body = text.rstrip()
    if not body:
        if text:
            space.append(text)
        return False
    parts += [*space, body]
    space[:] = [text[len(body) :]] if len(text) > len(body) else []
    return True
