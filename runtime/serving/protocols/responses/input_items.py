"""Items that a request brings, as messages of a conversation."""

import json
import reprlib
from collections.abc import Sequence
from typing import Any

from ...http.errors import ApiError

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXTS = ("input_text", "output_text", "text")


def conversation(
    instructions: str | None, given: str | list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The messages that a model reads. Raises ApiError for an item that is not understood."""
    messages = _Messages()
    if instructions is not None:
        messages.say("system", instructions)
    if isinstance(given, str):
        messages.say("user", given)
    elif not given:
        raise _wrong("input is an empty list; give at least one item")
    else:
        for item in given:
            messages.take(item)
    return messages.done


class _Messages:
    """A conversation, item by item.

    What an assistant thought, said and called one after the other is one message.

    Attributes:
        done: the messages so far.
    """

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []

    def say(self, role: str, text: str) -> None:
        """A message of its own."""
        self.done.append({"role": role, "content": text})

    def take(self, item: dict[str, Any]) -> None:
        """What follows."""
        kind = item.get("type", "message")
        if kind == "message":
            self._message(item)
        elif kind == "function_call":
            self._call(item)
        elif kind == "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else _text(output, _TEXTS)
            self.done.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        elif kind == "reasoning":
            self._reasoning(item)
        elif kind == "item_reference":
            raise _wrong("an item_reference needs a server that keeps items; send the item itself")
        else:
            raise _wrong(
                f"an item of type {kind!r} is not understood here; use message, function_call, "
                "function_call_output or reasoning"
            )

    def _message(self, item: dict[str, Any]) -> None:
        role, content = item.get("role"), item.get("content")
        if role not in _ROLES:
            raise _wrong(f"a message's role is {role!r}; use {', '.join(_ROLES)}")
        text = content if isinstance(content, str) else _text(content, _TEXTS)
        last = self._assistant() if role == "assistant" else None
        if last is not None and not last["content"] and "tool_calls" not in last:
            last["content"] = text  # it follows what was thought
        else:
            self.say(_ROLES[role], text)

    def _call(self, item: dict[str, Any]) -> None:
        name, arguments = item.get("name"), item.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise _wrong(
                f"{reprlib.repr(item)} is no function_call; give it a name, and arguments as JSON"
            )
        try:
            json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise _wrong(
                f"the arguments {reprlib.repr(arguments)} of a function_call are no JSON ({error})"
            ) from error
        function = {"name": name, "arguments": arguments}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        message = self._assistant() or self._begin()
        message.setdefault("tool_calls", []).append(call)

    def _reasoning(self, item: dict[str, Any]) -> None:
        thoughts = _text(item.get("content") or (), ("reasoning_text",))
        thoughts = thoughts or _text(item.get("summary") or (), ("summary_text",))
        if not thoughts and item.get("encrypted_content"):
            raise _wrong(
                "a reasoning item has encrypted_content alone, which this server cannot read; "
                "leave the item out"
            )
        if thoughts:
            self._begin()["reasoning_content"] = thoughts

    def _assistant(self) -> dict[str, Any] | None:
        """The last message, if it is the assistant's."""
        last = self.done[-1] if self.done else None
        return last if last is not None and last["role"] == "assistant" else None

    def _begin(self) -> dict[str, Any]:
        self.say("assistant", "")
        return self.done[-1]


def _text(parts: Any, kinds: Sequence[str]) -> str:
    """The text of parts that are text alone."""
    if not isinstance(parts, list | tuple):
        raise _wrong(f"{reprlib.repr(parts)} is no content; give a text, or a list of parts")
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            raise _wrong("a part of type 'refusal' is not understood there; send it as output_text")
        if kind not in kinds or not isinstance(part.get("text"), str):
            raise _wrong(
                f"a part {reprlib.repr(part)} is not understood there; models take text alone, in "
                f"parts of type {' or '.join(kinds)}"
            )
    return "\n".join(part["text"] for part in parts)


def _wrong(message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", "input")
