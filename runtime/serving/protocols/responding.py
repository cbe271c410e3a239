"""From a request to its answer, in whichever protocol: a place, the work, and an end."""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

from fastapi import Request, Response

from ...frontend.text_stream import RequestText
from ..http.errors import ApiError
from ..http.streams import EventStream, json_response, placed, unless_gone
from ..server import Server


class Job(Protocol):
    """A request under way, in the words of a protocol."""

    @property
    def texts(self) -> Sequence[RequestText]:
        """What runs for it."""
        ...

    async def run(self) -> dict[str, Any]:
        """The answer, when all of it is there."""
        ...

    def events(self) -> AsyncGenerator[bytes]:
        """The answer as events."""
        ...

    def last_words(self, error: ApiError) -> bytes:
        """How the stream ends by an error."""
        ...


async def respond(
    server: Server,
    request: Request,
    make: Callable[[], Job],
    *,
    num_characters: int,
    compiles: bool,
    stream: bool | None,
) -> Response:
    """Make a job, if there is a place for it, and answer with what it says, whole or bit by bit.

    `num_characters` and `compiles` are as of `Server.prepare`.
    """
    server.check_room(request)
    job = await server.prepare(make, num_characters, compiles=compiles)
    place = server.place(request, job.texts)
    if not stream:
        with place:
            return json_response(await unless_gone(request, job.run()))
    return EventStream(
        placed(place, job.events()),
        job.last_words,
        keep_alive_s=server.options.sse_keep_alive_interval,
    )
