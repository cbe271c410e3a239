"""A front process: HTTP until it is told to end, and then no stream without its end."""

import asyncio
import contextlib
import logging
import pickle
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from fastapi import APIRouter

from ....vmem.errors import UsageError, VkvError
from ...link.engine_process import REFUSED, die_with_parent
from ...link.face import Face
from ...link.remote import RemoteEngine
from ..http.app import build_app
from ..http.connections import Connection
from ..options import ServeOptions
from ..server import Server
from .logs import configure_logs

if TYPE_CHECKING:  # which imports what only engines need
    from ..cluster_engine import ClusterEngine

_CLOSE_S = 2.0  # for connections that are open when all requests have ended
_LOOK_S = 0.05
AT_ONCE = signal.SIGUSR1  # what the parent says to one that ends already

_log = logging.getLogger(__name__)


class _Http(uvicorn.Server):
    """uvicorn, without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Front:
    """Serves HTTP on a socket, for an engine elsewhere.

    Args:
        routes: further ones, for operators.

    Attributes:
        status: to exit with: REFUSED if an option does not fit the model, 1 if there will be no
            engine; the log says why.
    """

    def __init__(
        self,
        options: ServeOptions,
        engine: "RemoteEngine | ClusterEngine",
        routes: Sequence[APIRouter] = (),
    ) -> None:
        self._engine = engine
        self.server = Server(options, engine)
        engine.on_welcome = self._meet
        engine.on_refusal = self._refuse
        self.status = 0
        self._patience_s = options.shutdown_timeout
        self._http = _Http(
            uvicorn.Config(
                build_app(self.server, routes),
                loop="none",
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(_CLOSE_S),
                ssl_certfile=options.ssl_certfile,
                ssl_keyfile=str(options.ssl_keyfile) if options.ssl_keyfile else None,
            )
        )
        self._draining: asyncio.Task[None] | None = None

    async def run(self, listener: socket.socket) -> None:
        """Serve until `end` was called, and all that was under way has ended."""
        connecting = asyncio.ensure_future(self._engine.stay_connected())
        connecting.add_done_callback(self._check_connection)
        try:
            await self._http.serve(sockets=[listener])
        finally:
            connecting.cancel()
            self._engine.close()

    def _check_connection(self, connecting: "asyncio.Task[None]") -> None:
        """End if what was to find the engine has failed: nobody else would."""
        if connecting.cancelled() or (error := connecting.exception()) is None:
            return
        cause = None if isinstance(error, VkvError) else error  # whose message says it all
        _log.error("there will be no engine: %s", error, exc_info=cause)
        self.status = 1
        self.drain()

    def _meet(self, face: Face) -> None:
        try:
            self.server.meet(face)
        except UsageError as error:
            self._refuse(error)

    def _refuse(self, error: UsageError) -> None:
        _log.error("%s", error)
        self.status = REFUSED
        self.drain()

    def end(self) -> None:
        """Take no more requests, and end when those under way have; called again: at once."""
        if self._draining is not None:
            self._patience_s = 0.0
        self.drain()

    def drain(self) -> None:
        """The same, however often it is called."""
        if self._draining is None:
            self.server.is_draining = True
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        waited_s = 0.0
        while self.server.num_under_way and waited_s < self._patience_s:
            await asyncio.sleep(_LOOK_S)
            waited_s += _LOOK_S
        if self.server.num_under_way:
            _log.warning("%d requests are aborted", self.server.num_under_way)
            self.server.requests.abort_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    while self.server.num_under_way:
                        await asyncio.sleep(_LOOK_S)
        self._http.should_exit = True


@dataclass(frozen=True, kw_only=True)
class FrontOrder:
    """What a front process is told."""

    options: ServeOptions
    engine_path: str
    listener: int


def main() -> None:
    """Serve as standard input orders, until SIGTERM or until that input ends."""
    order: FrontOrder = pickle.load(sys.stdin.buffer)
    configure_logs(order.options.log_format)
    die_with_parent(sys.stdin.fileno())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(order))


async def _run(order: FrontOrder) -> None:
    front = Front(order.options, RemoteEngine(order.engine_path))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, front.drain)  # service managers tell all processes
    loop.add_signal_handler(AT_ONCE, front.end)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the parent decides
    await front.run(socket.socket(fileno=order.listener))
    if front.status:
        sys.exit(front.status)
