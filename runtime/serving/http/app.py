"""The HTTP application of a front process."""

import difflib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ....vmem.errors import VkvError
from ..page import page_router
from ..protocols import anthropic, chat, completions, operations, responses, tokens
from ..protocols.fields import Strict
from ..server import Server
from .errors import ApiError, internal_error, refusal
from .gate import ANTHROPIC_PATHS, Gate, path_of
from .streams import Gone, json_response

_log = logging.getLogger(__name__)


def build_app(server: Server, more: Sequence[APIRouter] = ()) -> Callable[..., Awaitable[None]]:
    """An ASGI application of all routes and `more`, behind the `Gate`."""
    app = _Application(title="vkv", summary="Large language models over virtual-memory KV.")
    for protocol in (chat, completions, responses, anthropic, tokens, operations):
        app.include_router(protocol.router(server))
    for routes in more:
        app.include_router(routes)
    app.include_router(
        page_router(
            server.engine,
            keep_alive_s=server.options.sse_keep_alive_interval,
            is_open=lambda: not server.is_draining,
        )
    )
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(VkvError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(Gone, _gone)
    app.add_exception_handler(Exception, _failed)
    return Gate(app, server.options)


class _Application(FastAPI):
    """Describes itself without FastAPI's own answer to a wrong body, which has the status 400."""

    def openapi(self) -> dict[str, Any]:
        """The description, made once."""
        if self.openapi_schema is None:
            told = super().openapi()
            for operations in told["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                told["components"]["schemas"].pop(name, None)
        return super().openapi()


async def _told(request: Request, error: Any) -> Response:
    assert isinstance(error, ApiError), error
    is_anthropic = path_of(request.scope).startswith(ANTHROPIC_PATHS)
    response = json_response(error.anthropic_body() if is_anthropic else error.body(), error.status)
    response.headers.update(error.headers)
    return response


async def _refused(request: Request, error: Any) -> Response:
    told = refusal(error)
    if told.status >= 500 and told.status != 503:
        _log.error("request %s failed: %s", request.state.request_id, error)
    return await _told(request, told)


async def _plain(request: Request, error: Any) -> Response:
    assert isinstance(error, HTTPException), error
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _told(
        request, ApiError(error.status_code, message, more_headers=error.headers or {})
    )


async def _failed(request: Request, error: Any) -> Response:
    return await _told(request, internal_error())  # it is raised again, for the log


async def _gone(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _invalid(request: Request, error: Any) -> Response:
    assert isinstance(error, RequestValidationError), error
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(where)
    if first["type"] == "extra_forbidden":
        message = _unknown_field(request, where[-1])
    elif first["type"] == "model_attributes_type" and not where and not _says_json(request):
        kind = request.headers.get("content-type")
        came = f"comes as {kind!r}" if kind else "comes without a type"
        message = f"the body {came}, and JSON is read; send 'content-type: application/json'"
    elif first["type"] == "json_invalid":
        message, name = f"the body is no JSON: {first.get('ctx', {}).get('error', '')}", ""
    elif len({error["loc"][:2] for error in error.errors()}) < len(error.errors()):
        name = where[0]  # of several forms none fits, which its description tells better
        message = f"{name} has none of the forms that it may have{_described(request, name)}"
    else:
        message = f"{name or 'the body'}: {first['msg']}"
    return await _told(request, ApiError(400, message, "invalid_value", name or None))


def _says_json(request: Request) -> bool:
    return "json" in request.headers.get("content-type", "").lower()


def _unknown_field(request: Request, name: str) -> str:
    """What to say of a field that no request of this route has."""
    kind = _body_kind(request)
    if kind is None:
        return f"there is no field {name!r} there; leave it out"
    if name in kind.not_here:
        return f"there is no field {name!r} here: {kind.not_here[name]}"
    close = difflib.get_close_matches(name, kind.model_fields, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "leave it out"
    return f"there is no field {name!r} here; {hint}"


def _described(request: Request, name: str) -> str:
    kind = _body_kind(request)
    field = kind.model_fields.get(name) if kind is not None else None
    return f": {field.description}" if field is not None and field.description else ""


def _body_kind(request: Request) -> type[Strict] | None:
    """The model of the route's body."""
    dependant = getattr(request.scope.get("route"), "dependant", None)
    for field in getattr(dependant, "body_params", ()):
        kind = getattr(field, "type_", None) or field.field_info.annotation
        if isinstance(kind, type) and issubclass(kind, Strict):
            return kind
    return None
