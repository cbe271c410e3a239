"""A response under way, and the protocol's routes."""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from ....frontend.text_stream import RequestText
from ...http.errors import ApiError
from ...http.streams import event
from ...server import Server
from ..chat import ChatJob
from ..logprobs import chat_logprobs
from ..responding import respond
from ..shapes import responses as shapes
from ..shapes.base import described
from .output_items import Event, OutputItems
from .request import ResponsesRequest

_ENDS = {"length": "incomplete", "abort": "cancelled"}


class ResponseJob:
    """One response under way."""

    def __init__(
        self, server: Server, asked: ResponsesRequest, request_id: str, tenant: str
    ) -> None:
        self._asked = asked.told()
        self.job = ChatJob(server, asked.as_chat(), request_id, tenant)
        name = asked.request_id or request_id
        self.job.id = f"resp_{name}"
        self._items = OutputItems(name)
        self._num_told = 0

    @property
    def texts(self) -> list[RequestText]:
        """What runs for it."""
        return [self.job.text]

    async def run(self) -> dict[str, Any]:
        """The response, when all of it is there."""
        async with aclosing(self._told()) as told:
            async for _ in told:
                pass
        return self._ended()

    async def events(self) -> AsyncGenerator[bytes]:
        """The response as events."""
        has_begun = False
        async with aclosing(self._told()) as told:
            async for one in told:
                if not has_begun:  # not before: what is refused has a status then
                    has_begun = True
                    begun = self._response("in_progress")
                    yield self._numbered({"type": "response.created", "response": begun})
                    yield self._numbered({"type": "response.in_progress", "response": begun})
                if one is not None:
                    yield self._numbered(one)
        ended = self._ended()
        kind = "completed" if ended["status"] == "completed" else "incomplete"
        yield self._numbered({"type": f"response.{kind}", "response": ended})

    def last_words(self, error: ApiError) -> bytes:
        """How the stream ends by an error."""
        for _ in self._items.close("incomplete"):
            pass
        failed = self._response("failed")
        failed["error"] = {"code": "server_error", "message": error.message}
        return self._numbered({"type": "response.failed", "response": failed})

    async def _told(self) -> AsyncGenerator[Event | None]:
        """Events of the items; None for what came and shows nothing yet."""
        job = self.job
        async with aclosing(job.server.deltas([job.text], job.id)) as bits:
            async for some in bits:
                yield None
                for _, delta in some:
                    parts = job.answers[0].read(delta)
                    entries = chat_logprobs(delta, job.asked.top_logprobs or 0)
                    for part in parts:
                        for one in self._items.take(part, entries):
                            yield one
                        entries = []
        for one in self._items.close(self._status()):
            yield one

    def _status(self) -> str:
        """Of the item at the end: whether the model came to its end."""
        is_whole = self.job.answers[0].finish_reason() not in _ENDS
        return "completed" if is_whole else "incomplete"

    def _ended(self) -> dict[str, Any]:
        reason = self.job.answers[0].finish_reason()
        told = self._response(_ENDS.get(reason, "completed"))
        if reason == "length":
            told["incomplete_details"] = {"reason": "max_output_tokens"}
        if told["status"] == "completed":
            told["completed_at"] = int(time.time())
        return told

    def _response(self, status: str) -> dict[str, Any]:
        """The response as it stands."""
        job = self.job
        params = job.text.spec.params
        return {
            "id": job.id,
            "object": "response",
            "created_at": job.created,
            "completed_at": None,
            "status": status,
            "model": job.model,
            "output": list(self._items.done),
            "error": None,
            "incomplete_details": None,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "usage": None if status == "in_progress" else self._usage(),
            **self._asked,
        }

    def _usage(self) -> dict[str, Any]:
        told = self.job.usage()
        cached = told["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": told["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": told["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": sum(a.num_reasoning_tokens for a in self.job.answers)
            },
            "total_tokens": told["total_tokens"],
        }

    def _numbered(self, told: Event) -> bytes:
        number, self._num_told = self._num_told, self._num_told + 1
        return event({**told, "sequence_number": number}, told["type"])


def router(server: Server) -> APIRouter:
    """The protocol's routes."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post(
        "/v1/responses",
        response_model=None,
        responses=described(shapes.Response, body=True, work=True, stream=True),
    )
    async def responses(request: Request, asked: ResponsesRequest) -> Response:
        """Answer a conversation, of which nothing is kept."""
        return await respond(
            server,
            request,
            lambda: ResponseJob(server, asked, request.state.request_id, server.tenant(request)),
            num_characters=len(str(asked.input)),
            compiles=bool(asked.text or asked.tools),
            stream=asked.stream,
        )

    for path, method in _kept():
        routes.add_api_route(
            path,
            _not_kept,
            methods=[method],
            response_model=None,
            responses=described(None, 404),
            status_code=404,
        )
    return routes


def _kept() -> Iterator[tuple[str, str]]:
    """Routes to what other servers keep."""
    yield "/v1/responses/{response_id}", "GET"
    yield "/v1/responses/{response_id}", "DELETE"
    yield "/v1/responses/{response_id}/input_items", "GET"
    yield "/v1/responses/{response_id}/cancel", "POST"


async def _not_kept(response_id: str) -> Response:
    """Responses are not kept."""
    raise ApiError(
        404,
        f"there is no response {response_id!r}: this server keeps none; a response is told once, "
        "by POST /v1/responses",
        "not_found",
    )
