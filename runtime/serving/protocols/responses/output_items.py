"""Items of an answer, and the events that tell of them."""

from collections.abc import Iterator
from typing import Any

from ...parsing import MessageDelta

Event = dict[str, Any]
_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class OutputItems:
    """What an answer consists of, one item open at a time.

    Args:
        name: of the response, for the items' names.

    Attributes:
        done: the items that are complete.
    """

    def __init__(self, name: str) -> None:
        self.done: list[dict[str, Any]] = []
        self._name = name
        self._open: dict[str, Any] | None = None
        self._key: tuple[str, int] | None = None
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []  # of the open message
        self._waiting: list[dict[str, Any]] = []  # of tokens whose text is not told yet

    def take(self, part: MessageDelta, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """What came, with the log probabilities of its tokens.

        Those of tokens that are no text of a message are left out.
        """
        self._waiting += logprobs
        if part.reasoning:
            yield from self._put(("reasoning", 0), {}, part.reasoning)
        for call in part.tool_calls:
            start = {"call_id": call.id or "", "name": call.name or ""}
            yield from self._put(("function_call", call.index), start, call.arguments)
        if part.content:
            yield from self._put(("message", 0), {}, part.content)
        elif part.reasoning or part.tool_calls:
            self._waiting = []

    def close(self, status: str = "completed") -> Iterator[Event]:
        """The open item gets no more."""
        if self._open is None:
            return
        if self._waiting and self._open["type"] == "message":
            yield self._delta("")
        whole = self._whole(status)
        yield from self._done_events(whole)
        yield self._event("response.output_item.done", item=whole)
        self.done.append(whole)
        self._open = self._key = None
        self._logprobs, self._waiting = [], []

    def _put(self, key: tuple[str, int], start: dict[str, Any], piece: str) -> Iterator[Event]:
        if key != self._key:
            waiting, self._waiting = self._waiting, []  # they belong to what begins
            yield from self.close()
            self._waiting = waiting
            yield from self._begin(key, start)
        if piece:
            self._pieces.append(piece)
            yield self._delta(piece)

    def _begin(self, key: tuple[str, int], start: dict[str, Any]) -> Iterator[Event]:
        kind = key[0]
        self._key, self._pieces = key, []
        self._open = {
            "id": f"{_PREFIXES[kind]}_{self._name}_{len(self.done)}",
            "type": kind,
            **start,
        }
        yield self._event("response.output_item.added", item=self._empty())
        if kind != "function_call":
            yield self._event("response.content_part.added", content_index=0, part=self._part(""))

    def _delta(self, piece: str) -> Event:
        assert self._open is not None
        kind = self._open["type"]
        more: dict[str, Any] = {"item_id": self._open["id"], "delta": piece}
        if kind == "function_call":
            return self._event("response.function_call_arguments.delta", **more)
        if kind == "reasoning":
            return self._event("response.reasoning_text.delta", content_index=0, **more)
        more["logprobs"], self._waiting = self._waiting, []
        self._logprobs += more["logprobs"]
        return self._event("response.output_text.delta", content_index=0, **more)

    def _done_events(self, whole: dict[str, Any]) -> Iterator[Event]:
        text, kind = "".join(self._pieces), whole["type"]
        more: dict[str, Any] = {"item_id": whole["id"]}
        if kind == "function_call":
            name = "response.function_call_arguments.done"
            yield self._event(name, arguments=text, name=whole["name"], **more)
            return
        more["content_index"] = 0
        if kind == "reasoning":
            yield self._event("response.reasoning_text.done", text=text, **more)
        else:
            logprobs = self._logprobs
            yield self._event("response.output_text.done", text=text, logprobs=logprobs, **more)
        yield self._event("response.content_part.done", part=self._part(text), **more)

    def _event(self, kind: str, **data: Any) -> Event:
        if "item_id" not in data and "item" not in data:
            assert self._open is not None
            data["item_id"] = self._open["id"]
        return {"type": kind, "output_index": len(self.done), **data}

    # -- items ---------------------------------------------------------------------------------

    def _empty(self) -> dict[str, Any]:
        """The open item as it begins."""
        assert self._open is not None
        kind = self._open["type"]
        item = {**self._open, "status": "in_progress"}
        if kind == "function_call":
            return {**item, "arguments": ""}
        if kind == "reasoning":
            return {**item, "summary": [], "content": []}
        return {**item, "role": "assistant", "content": []}

    def _whole(self, status: str) -> dict[str, Any]:
        item, text = {**self._empty(), "status": status}, "".join(self._pieces)
        if item["type"] == "function_call":
            return {**item, "arguments": text}
        return {**item, "content": [self._part(text)]}

    def _part(self, text: str) -> dict[str, Any]:
        assert self._open is not None
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": list(self._logprobs),
        }
