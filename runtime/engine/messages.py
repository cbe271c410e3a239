"""What an engine is told, as plain data that a process can send to another."""

import msgspec

from ..request.continuation import Continuation
from ..request.spec import RequestSpec


class Add(msgspec.Struct, frozen=True, tag=True):
    """A new request. A refusal comes back as the request's output."""

    spec: RequestSpec


class Resume(msgspec.Struct, frozen=True, tag=True):
    """A sequence that goes on after the tokens it has. Those are not told again.

    Its keys and values are found where they are parked, or computed. A refusal comes back as the
    sequence's output.
    """

    continuation: Continuation


class Finish(msgspec.Struct, frozen=True, tag=True):
    """One of a request's sequences has all the text it needs; its slot is parked.

    No output comes back, and those that were under way are to be ignored.
    """

    request_id: str
    index: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Drop all that is unfinished of a request; its pages go back at once.

    Its sequences end with the finish reason "abort". Without effect on what is not there.
    """

    request_id: str


class SetPriority(msgspec.Struct, frozen=True, tag=True):
    """All that is unfinished of a request has another priority from now on.

    Without effect on what is not there, and where requests are not scheduled by priority.
    """

    request_id: str
    priority: int


Message = Add | Resume | Finish | Abort | SetPriority
