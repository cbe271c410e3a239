"""What a parser says of an answer, a piece at a time."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """A piece of a call.

    Attributes:
        index: which of the answer's calls, from 0.
        id: the call's; only in its first piece.
        name: of the tool, whole; only in the first piece.
        arguments: text that follows on what came before; all pieces together are JSON, if the
            model wrote JSON and came to its end.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, kw_only=True)
class MessageDelta:
    """What an answer got: each field follows on what came before."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
