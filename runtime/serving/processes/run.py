"""`vkv serve`: an engine's process, front processes, and who looks after them."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import ssl
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
from fastapi import APIRouter
from prometheus_client.multiprocess import mark_process_dead

from ....vmem.errors import InvalidConfig
from ...adapters.adapters import adapter_folder
from ...cluster.policies import Llumnix, Scaling
from ...engine.config import EngineConfig
from ...link.engine_process import REFUSED
from ...link.remote import RemoteEngine
from ..metrics import SHARED
from ..options import ServeOptions
from ..parsing import check_names
from .children import Child, EngineSocket
from .front import AT_ONCE, Front, FrontOrder
from .logs import configure_logs

if TYPE_CHECKING:
    from ..cluster_engine import ClusterEngine

_FIRST_REST_S, _LONGEST_REST_S = 0.5, 30.0  # before a process that died is started again

BUILT_IN = "tiny-chat"  # what the built-in model is called, where no name was given

_log = logging.getLogger(__name__)


def serve(
    options: ServeOptions, *, model: str | None, device: str, dtype: str, engine: dict[str, Any]
) -> int:
    """Serve until a signal ends it; returns the exit status.

    Args:
        engine: options of `EngineConfig`. Weights of tenants come from the file of keys.

    Raises InvalidConfig if the address cannot be listened on, a parser is unknown, or an adapter is
    called as the model is.
    """
    if options.tenant_weights:
        engine = {**engine, "tenant_weights": options.tenant_weights}
        EngineConfig(**engine)  # to refuse it here, and not in the engine's process
    if adapters := engine.get("adapters"):
        folders = {name: str(adapter_folder(path)) for name, path in adapters.items()}
        engine = {**engine, "adapters": folders}
    configure_logs(options.log_format)
    check_names(options.tool_call_parser, options.reasoning_parser)
    if not options.served_model_name:
        options = dataclasses.replace(options, served_model_name=(model or BUILT_IN,))
    if taken := {*engine.get("adapters", ())}.intersection(options.served_model_name):
        raise InvalidConfig(f"{min(taken)!r} names the model and an adapter; rename one of them")
    check_certificate(options)
    listener = listen(options)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        supervisor = Supervisor(options, (model, device, dtype, engine), listener)
        return runner.run(supervisor.run())


def check_certificate(options: ServeOptions) -> None:
    """Raises InvalidConfig for a certificate that HTTPS could not be served with."""
    if options.ssl_certfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise InvalidConfig(
            f"ssl_certfile {options.ssl_certfile} with ssl_keyfile {options.ssl_keyfile}: {error}; "
            "give a certificate and its key, as PEM"
        ) from error


def listen(options: ServeOptions) -> socket.socket:
    """The socket that callers reach. Raises InvalidConfig."""
    if options.uds is not None:
        _unlink_old(options.uds)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: Any = options.uds
    else:
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except socket.gaierror as error:
            raise InvalidConfig(f"host is {options.host!r}: {error.strerror}") from error
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        where = options.uds or f"{options.host}:{options.port}"
        remedy = "use another --port, or 0 for any" if options.uds is None else "use another --uds"
        raise InvalidConfig(
            f"{where} cannot be listened on: {error.strerror or error}; {remedy}"
        ) from error
    listener.listen(2048)
    return listener


def _unlink_old(path: str) -> None:
    """Take a socket away that is left of a server. Raises InvalidConfig if that still listens."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        if caller.connect_ex(path) == 0:
            raise InvalidConfig(
                f"{path} cannot be listened on: another server does; use another --uds"
            )
    Path(path).unlink()


def shown_address(options: ServeOptions, listener: socket.socket) -> str:
    """Where callers reach it."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    scheme = "https" if options.ssl_certfile else "http"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


class Supervisor:
    """Keeps the processes: one engine, and fronts, of which a single one is this process."""

    def __init__(
        self,
        options: ServeOptions,
        engine: tuple[str | None, str, str, dict[str, Any]],
        listener: socket.socket,
    ) -> None:
        self._options = options
        self._engine = engine
        self._listener = listener
        self._socket = EngineSocket()
        self._child: Child | None = None
        self._fronts: list[Child] = []
        self._front: Front | None = None
        self._ending = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Serve; returns the exit status."""
        self._hear_signals()
        _log.info("listening on %s", shown_address(self._options, self._listener))
        if self._options.is_cluster:
            return await self._run_cluster()
        keeping = asyncio.ensure_future(self._keep_engine())
        try:
            if self._options.api_server_count == 1:
                await self._run_front(RemoteEngine(self._socket.path))
            else:
                count = self._options.api_server_count
                with tempfile.TemporaryDirectory(prefix="vkv-metrics-") as shared:
                    os.environ[SHARED] = shared  # for the fronts
                    await asyncio.gather(*(self._keep_front() for _ in range(count)))
        finally:
            self._ending.set()
            if self._child is not None:
                await asyncio.to_thread(self._child.stop)
            await keeping
            self._socket.close()
            self._listener.close()
        return self._status

    def _hear_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            loop.add_signal_handler(number, self._end)

    async def _run_front(
        self, engine: "RemoteEngine | ClusterEngine", routes: Sequence[APIRouter] = ()
    ) -> None:
        self._front = Front(self._options, engine, routes)
        await self._front.run(self._listener)
        self._status = self._front.status or self._status

    async def _run_cluster(self) -> int:
        """Serve instances, which the front starts and ends; returns the exit status."""
        from ..cluster_engine import ClusterEngine  # what only engines need, and Ray
        from ..protocols.cluster import cluster_router

        model, device, dtype, engine = self._engine
        options, roles = self._options, self._options.roles
        policy: Any = options.cluster_policy
        if options.max_instances is not None:
            scaling = Scaling(least=options.instances, most=options.max_instances)
            policy = Llumnix(scaling=scaling)
        cluster = ClusterEngine(
            model=model,
            device=device,
            dtype=dtype,
            instances=options.instances,
            roles=None if roles is None else [role.strip() for role in roles.split(",")],
            policy=policy,
            lending=options.lending,
            address=options.ray_address,
            **engine,
        )
        cluster.on_started = self._hear_signals
        try:
            await self._run_front(cluster, [cluster_router(cluster, options)])
        finally:
            self._socket.close()
            self._listener.close()
        return self._status

    def _end(self) -> None:
        number = AT_ONCE if self._ending.is_set() else signal.SIGTERM
        self._ending.set()
        if self._front is not None:
            self._front.end()
        for front in self._fronts:
            with contextlib.suppress(ProcessLookupError):
                front.signal(number)

    async def _keep_engine(self) -> None:
        """Start the engine, and again if it dies and that was asked for."""
        rest_s, was_ever_ready = _FIRST_REST_S, False
        while not self._ending.is_set():
            began_s = asyncio.get_running_loop().time()
            self._child = self._socket.start(*self._engine)
            status = await asyncio.to_thread(self._child.wait)
            if self._ending.is_set():
                return
            if status != REFUSED:
                _log.error("the engine's process ended with status %d", status)
            was_ever_ready |= self._socket.was_ready
            if not was_ever_ready:  # nor would another be
                self._status = status if status > 0 else 1
                self._end()
                return
            if not self._options.restart_engine:
                _log.error("it is not started again; --restart-engine would")
                return
            if asyncio.get_running_loop().time() - began_s > _LONGEST_REST_S:
                rest_s = _FIRST_REST_S
            await self._rest(rest_s)
            rest_s = min(2 * rest_s, _LONGEST_REST_S)

    async def _rest(self, seconds: float) -> None:
        """Wait for so long, or until the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ending.wait()

    async def _keep_front(self) -> None:
        """Start a front process, and again if it dies before its time."""
        order = FrontOrder(
            options=self._options,
            engine_path=self._socket.path,
            listener=self._listener.fileno(),
        )
        while not self._ending.is_set():
            front = Child(Front.__module__, order, (self._listener.fileno(),))
            self._fronts.append(front)
            status = await asyncio.to_thread(front.wait)
            self._fronts.remove(front)
            mark_process_dead(front.pid)
            if status == REFUSED and not self._ending.is_set():  # so would another be
                self._status = REFUSED
                self._end()
            if not self._ending.is_set():
                _log.error("a front process ended with status %d, and is started again", status)
                await self._rest(_FIRST_REST_S)
