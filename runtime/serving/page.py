"""The page on which one watches requests take memory, and the stream of maps that it draws."""

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import msgspec
from fastapi import APIRouter, Response

from ...vmem.errors import VkvError
from ..engine.memory.memory_map import MemoryMap
from .cluster_map import ClusterMap, InstanceMap, Loans, Moving
from .http.errors import ApiError
from .http.streams import EventStream, event, last_words

_BETWEEN_S = 0.1  # of two maps
_TROUBLE_S = 1.0  # until an engine that could not answer is asked again
_KEEP_ALIVE_S = 15.0
_PAGE = Path(__file__).parent / "static" / "index.html"
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class MapSource(Protocol):
    """What has maps to show: `AsyncLLM`, or an engine in another process."""

    async def memory_map(self) -> MemoryMap: ...


@runtime_checkable
class ClusterMapSource(Protocol):
    """What has maps of several instances to show."""

    async def cluster_map(self) -> ClusterMap: ...


class Frame(msgspec.Struct, frozen=True, omit_defaults=True):
    """A map, and when it was drawn, in seconds of a clock that only runs forward.

    The other fields are as of `ClusterMap`, and are there where there are instances.
    """

    time_s: float
    map: MemoryMap
    instances: tuple[InstanceMap, ...] = ()
    moves: tuple[Moving, ...] = ()
    num_moved: int = 0
    num_recomputed: int = 0
    loans: tuple[Loans, ...] = ()

    @classmethod
    def of(cls, shown: MemoryMap | ClusterMap) -> Self:
        """What is shown now."""
        if isinstance(shown, MemoryMap):
            return cls(time.monotonic(), shown)
        parts = {name: getattr(shown, name) for name in shown.__struct_fields__}
        return cls(time.monotonic(), **parts)


class Trouble(msgspec.Struct, frozen=True):
    """Why there is no map for now."""

    message: str


def page_router(
    source: MapSource,
    *,
    keep_alive_s: float = _KEEP_ALIVE_S,
    is_open: Callable[[], bool] = lambda: True,
) -> APIRouter:
    """The page at `/`, and its stream of maps at `/memory/stream`.

    Args:
        source: asked at most ten times a second, and only while somebody looks; for the map of a
            cluster, if it has one.
        keep_alive_s: without a change, until a stream gets a comment.
        is_open: False once the server shuts down: the streams end then.
    """
    routes = APIRouter(tags=["page"])
    html = _PAGE.read_text(encoding="utf-8")
    headers = _headers(html)
    projector = Projector(source, is_open)

    @routes.get("/", response_model=None, include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=headers)

    @routes.get("/memory/stream", response_model=None)
    async def stream() -> Response:
        """Server-sent events: what every slot holds, whenever that has changed."""
        return EventStream(projector.watch(), last_words, keep_alive_s=keep_alive_s)

    return routes


class Projector:
    """Shows the newest map to any number of viewers. Of one event loop.

    One task asks the source while there is a viewer. A viewer that is slow misses maps and gets
    the newest; a map that looks like the one before is not shown again.
    """

    def __init__(self, source: MapSource, is_open: Callable[[], bool] = lambda: True) -> None:
        self._look: Callable[[], Awaitable[MemoryMap | ClusterMap]] = (
            source.cluster_map if isinstance(source, ClusterMapSource) else source.memory_map
        )
        self._is_open = is_open
        self._num_viewers = 0
        self._asking: asyncio.Task[None] | None = None
        self._shown: MemoryMap | ClusterMap | Trouble | None = None
        self._event = b""  # that shows it
        self._number = 0  # of events so far
        self._news = asyncio.Event()  # the next one: set once, then another takes its place

    @property
    def num_viewers(self) -> int:
        """Who is looking now."""
        return self._num_viewers

    async def watch(self) -> AsyncGenerator[bytes]:
        """Events for one viewer: the newest map or trouble, then each that it has time for.

        Raises ApiError 503 once the server shuts down, and what went wrong if asking did.
        """
        self._num_viewers += 1
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask())
        seen = 0
        try:
            while True:
                if not self._is_open():
                    raise ApiError(503, "the server is shutting down", "unavailable")
                if self._asking.done():
                    self._asking.result()
                if self._shown is None or seen == self._number:
                    await self._news.wait()
                    continue
                seen = self._number
                yield self._event
        finally:
            self._leave()

    def _leave(self) -> None:
        self._num_viewers -= 1
        if not self._num_viewers and self._asking is not None:
            self._asking.cancel()
            self._asking, self._shown = None, None

    async def _ask(self) -> None:
        try:
            while self._is_open():
                await self._ask_once()
        finally:
            self._tell()

    async def _ask_once(self) -> None:
        begin_s = time.monotonic()
        try:
            self._show(await self._look())
        except VkvError as error:  # said to the viewers, as it may pass
            self._show(Trouble(str(error)))
            await asyncio.sleep(_TROUBLE_S)
        else:
            await asyncio.sleep(max(0.0, begin_s + _BETWEEN_S - time.monotonic()))

    def _show(self, what: MemoryMap | ClusterMap | Trouble) -> None:
        if what == self._shown:
            return
        self._shown = what
        self._number += 1
        if isinstance(what, Trouble):
            self._event = event(what, "trouble")
        else:
            self._event = event(Frame.of(what))
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def _headers(html: str) -> dict[str, str]:
    """Of the page: nothing runs or loads that is not in it, and it talks to its server alone."""
    digests: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        digests[kind].append(f"'sha256-{digest}'")
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(digests["script"]),
        "style-src": " ".join(digests["style"]),
        "img-src": "data:",  # its icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
