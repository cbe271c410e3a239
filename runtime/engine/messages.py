"""What an engine is told, as plain data that a process can send to another."""

import msgspec

from ..request.spec import RequestSpec


class Add(msgspec.Struct, frozen=True, tag=True):
    """A new request. A refusal comes back as the request's output."""

    spec: RequestSpec


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


Message = Add | Finish | Abort
