"""What every HTTP request passes: its name, its key, its size, and the access log."""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

from ..options import ServeOptions
from .errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health", "/ready"})  # without a key: none of them holds a secret
ANTHROPIC_PATHS = ("/v1/messages",)
_BODY_S = 60.0  # for a body to come whole
_REQUEST_ID = re.compile(r"[!-~]{1,128}")  # visible ASCII
_LINE = '%(client)s "%(method)s %(path)s" %(status)d %(bytes)d %(seconds).4fs %(request_id)s'

_access = logging.getLogger("vkv.access")


class Gate:
    """An ASGI application before another.

    It gives each request a name (`x-request-id`, the caller's if it is one), refuses callers
    without a key and bodies that are too large, and logs what came of it, without prompts.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], options: ServeOptions) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._options.root_path:
            scope["root_path"] = self._options.root_path
        visit = _Visit(scope, send)
        try:
            scope["state"] = {**scope.get("state", {}), "request_id": visit.request_id}
            scope["state"]["key"] = self._check_key(scope)
            limit = _Limit(receive, self._options.max_body_bytes, scope)

            async def send_unless_too_large(message: MutableMapping[str, Any]) -> None:
                if limit.error is None:
                    await visit.send(message)
                elif visit.status is None:  # in place of what the application made of it
                    await self._refuse(scope, visit, limit.error)

            await self._app(scope, limit, send_unless_too_large)
        except ApiError as error:
            await self._refuse(scope, visit, error)
        finally:
            visit.log(self._options.log_format)

    def _check_key(self, scope: Scope) -> int | None:
        """Which key it shows; None where there are none. Raises ApiError 401."""
        if not self._options.keys or path_of(scope) in OPEN_PATHS:
            return None
        shown = _shown_key(scope)
        index = None if shown is None else self._options.key_index(shown)
        if index is None:
            problem = "no API key was shown" if shown is None else "the API key is not known here"
            raise ApiError(
                401,
                f"{problem}; send it as 'Authorization: Bearer KEY'",
                "invalid_api_key",
                more_headers={"www-authenticate": "Bearer"},
            )
        return index

    async def _refuse(self, scope: Scope, visit: "_Visit", error: ApiError) -> None:
        if visit.status is not None:
            raise error
        is_anthropic = path_of(scope).startswith(ANTHROPIC_PATHS)
        body = error.anthropic_body() if is_anthropic else error.body()
        data = json.dumps(body).encode()
        headers = {**error.headers, "content-type": "application/json"}
        headers["content-length"] = str(len(data))
        if error.status in (401, 408, 413):  # the rest of its body is not read
            headers["connection"] = "close"
        await visit.send(
            {
                "type": "http.response.start",
                "status": error.status,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            }
        )
        await visit.send({"type": "http.response.body", "body": data})


class _Limit:
    """Receives a body up to a limit, and within a time.

    Attributes:
        error: that it was more, or late.
    """

    def __init__(self, receive: Receive, most: int, scope: Scope) -> None:
        self._receive = receive
        self._most = most
        self._num_bytes = 0
        self.error: ApiError | None = None
        self._is_whole = False
        self._deadline_s = asyncio.get_running_loop().time() + _BODY_S
        length = _header(scope, b"content-length")
        if length is not None and length.isdigit() and int(length) > most:
            raise self._too_large(int(length))

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self._next()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._most:
                self.error = self._too_large(self._num_bytes)
                raise self.error
        return message

    async def _next(self) -> MutableMapping[str, Any]:
        """What comes next; of a body within its time, and behind it whenever it comes."""
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError:
            self.error = ApiError(
                408, f"the body did not come within {_BODY_S:.0f} s; send it again", "timeout"
            )
            raise self.error from None
        self._is_whole = not message.get("more_body", False)
        return message

    def _too_large(self, num_bytes: int) -> ApiError:
        return ApiError(
            413,
            f"the body has {num_bytes} bytes or more, and {self._most} are allowed; shorten it, or "
            "raise --max-body-bytes",
            "body_too_large",
        )


class _Visit:
    """One request on its way, for the log."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = _header(scope, b"x-request-id")
        is_name = given is not None and _REQUEST_ID.fullmatch(given)
        self.request_id = given if given is not None and is_name else secrets.token_hex(8)
        self.status: int | None = None
        self._scope = scope
        self._send = send
        self._begin_s = time.monotonic()
        self._num_bytes = 0

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass a message on, with the request's name."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": headers}
        else:
            self._num_bytes += len(message.get("body", b""))
        await self._send(message)

    def log(self, log_format: str) -> None:
        """One line, without what was asked or answered."""
        if not _access.isEnabledFor(logging.INFO):
            return
        client = self._scope.get("client")
        entry = {
            "client": client[0] if client else "-",
            "method": self._scope["method"],
            "path": quote(path_of(self._scope)),  # or one with a line break would forge lines
            "status": self.status or 499,  # it hung up before an answer began
            "bytes": self._num_bytes,
            "seconds": round(time.monotonic() - self._begin_s, 4),
            "request_id": self.request_id,
        }
        if log_format == "json":
            _access.info("%s", json.dumps(entry))
        else:
            _access.info(_LINE, entry)


def path_of(scope: Scope) -> str:
    """The path, without the one under which a proxy shows the server."""
    root, path = scope.get("root_path", ""), scope["path"]
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _header(scope: Scope, name: bytes) -> str | None:
    for given, value in scope["headers"]:
        if given == name:
            return value.decode("latin-1")
    return None


def _shown_key(scope: Scope) -> str | None:
    """The key of a request, as OpenAI's clients show it or as Anthropic's."""
    scheme, _, key = (_header(scope, b"authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return _header(scope, b"x-api-key")
