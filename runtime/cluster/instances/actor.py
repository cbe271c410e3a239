"""One instance: an engine in an actor's process, and the thread that serves it.

Ray starts it, and tells whether it lives. Tokens, keys and values do not pass through Ray: callers
have a socket to it.
"""

import gc
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ....vmem import linux
from ....vmem.errors import VkvError
from ...engine.build import build_loop, load
from ...engine.config import EngineConfig
from ...engine.loop import EngineLoop
from ...engine.memory.segments import segment_server
from ...link.addresses import Address, Listener, Place, listen_near
from ...link.carrier import SocketCarrier
from ...link.engine_process import EngineServer
from ...link.face import Face
from ...model.loading import LoadedModel
from ...request.step_output import Failure
from .lending import Lending

FRONT_END = "an instance"  # what the port of an instance is for
_LENDER_S = 10.0  # that a lender may be silent; less where who waits for it would be taken for dead
_GRACE_S = 2.0  # for Ray to end an instance that nobody calls any more

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InstanceOrder:
    """What an instance is to load, and where it is reached.

    Attributes:
        model, device, dtype: as of `LLM`.
        options: of `EngineConfig`.
        path: of the socket on which it listens, on the node of the front end; that of its keys and
            values is beside it. On another node both are in a folder of its own.
        threads: of PyTorch, on a CPU; None for its own choice.
        memory_share: of its node's memory, for keys and values, where `options` say nothing; None
            for what an engine takes by itself.
        front_node: where the front end is.
        is_alone: no other node takes part.
        secret: that all who call each other know.
        silence_s: as of `Place`.
        lends: memory to others, and borrows it; None where requests may be longer than its own.
    """

    model: str | None
    device: str
    dtype: str
    options: dict[str, Any]
    path: str
    threads: int | None = None
    memory_share: float | None = None
    front_node: str = ""
    is_alone: bool = True
    secret: bytes = field(default=b"", repr=False)
    silence_s: float = 60.0
    lends: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """An instance that has loaded its model, or why it did not.

    Attributes:
        pid: of its process, on its node.
        born: when that began, so that no other of its number is taken for it.
        host: of its node, as Ray names it.
        folder: with its sockets; "" if they are in one of the front end's.
        address: where front ends call it.
        lends_at: where other instances borrow memory; None if none is lent.
    """

    pid: int
    born: str
    host: str
    folder: str = ""
    address: Address | None = None
    lends_at: Address | None = None
    failure: Failure | None = None

    @property
    def node(self) -> str:
        """Ray's name of its node; "" if it did not load."""
        return "" if self.address is None else self.address.node


class InstanceActor:
    """The actor's class. What its model cannot be loaded for is told by `ready`."""

    def __init__(self, order: InstanceOrder) -> None:
        node, host = _where()
        pid = os.getpid()
        born = _born(pid) or ""
        self._folder = ""
        try:
            place = Place(
                node=node,
                host="" if order.is_alone else host,
                secret=order.secret,
                silence_s=order.silence_s,
            )
            self._server, address, lends_at = self._build(order, place)
            self._arrived = Arrived(
                pid=pid,
                born=born,
                host=host,
                folder=self._folder,
                address=address,
                lends_at=lends_at,
            )
        except VkvError as error:  # Ray would make text of it
            self.clean()
            self._arrived = Arrived(pid=pid, born=born, host=host, failure=Failure.of(error))
            return
        except BaseException:  # Ray tells it, and ends this process
            self.clean()
            raise
        # Ray's own handler would end the process, and with it what could have moved away.
        signal.signal(signal.SIGTERM, lambda *_: self._server.ask_to_leave())
        gc.collect()
        gc.freeze()
        threading.Thread(target=self._serve, name="vkv-engine", daemon=True).start()

    def ready(self) -> Arrived:
        """Where it is, or why it is of no use."""
        return self._arrived

    def clean(self) -> None:
        """Remove what would be left behind: this process is to end."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def end_neighbour(self, other: Arrived) -> None:
        """Kill another instance of this node, and remove its folder. Returns once it is gone."""
        while _born(other.pid) == other.born:
            with suppress(ProcessLookupError):
                os.kill(other.pid, signal.SIGKILL)
            time.sleep(0.01)
        if other.folder:
            shutil.rmtree(other.folder, ignore_errors=True)

    def _serve(self) -> None:
        try:
            self._server.run()
        except BaseException:  # noqa: BLE001 - logged; nothing may outlive it
            _log.exception("the engine's thread ends, and its process with it")
            os.kill(os.getpid(), signal.SIGKILL)  # whoever waits for it sees the socket closed

    def _build(
        self, order: InstanceOrder, place: Place
    ) -> tuple[EngineServer, Address, Address | None]:
        if order.threads is not None:
            torch.set_num_threads(order.threads)
        config = EngineConfig(**_with_memory(order))
        loaded = load(
            order.model, tokenizer=None, device=order.device, dtype=order.dtype, config=config
        )
        loop = build_loop(loaded, config)
        if loop.engine.fingerprint is not None:
            loop.engine.fingerprint.value()  # now: its files are in memory, and nobody waits
        is_near = place.node == order.front_node
        path = order.path
        if not is_near:
            self._folder = tempfile.mkdtemp(prefix="vkv-instance-")  # which is ours alone
            path = str(Path(self._folder) / "0")
        listener, address = _listen(place, path, is_near)
        timeout_s = min(_LENDER_S, order.silence_s / 3)
        lending = _lending(loaded, loop, order.lends, f"{path}.lend", place, timeout_s)
        server = EngineServer(
            loop,
            Face.of(loaded, loop.engine, config),
            listener,
            idle_trim_s=config.idle_trim_s,
            carrier=SocketCarrier(f"{path}.kv", place=place),
            lending=lending,
            silence_s=None if is_near else 2 * order.silence_s,  # the front end decides first
            on_deserted=self._deserted,
        )
        return server, address, None if lending is None else lending.address

    def _deserted(self) -> None:
        """Nobody is to be served any more. Ray ends this process, if anybody is left to tell it."""
        self.clean()
        alone = threading.Timer(_GRACE_S, os.kill, (os.getpid(), signal.SIGKILL))
        alone.daemon = True
        alone.start()


def _lending(
    loaded: LoadedModel,
    loop: EngineLoop,
    lends: bool | None,
    path: str,
    place: Place,
    timeout_s: float,
) -> Lending | None:
    """If it `lends`; if nobody said so, where requests may be longer than the pool."""
    admission = loop.engine.admission
    if not (admission.longest < admission.max_len - 1 if lends is None else lends):
        return None
    server = segment_server(loaded, loop.engine)
    return None if server is None else Lending(loop, server, path, place, timeout_s=timeout_s)


def _listen(place: Place, path: str, is_near: bool) -> tuple[Listener, Address]:
    """Where the front end calls: at a path on its own node, and else at a port."""
    if is_near:
        return listen_near(path), Address(place.node, path)
    gate = place.open_gate(FRONT_END)
    host, port = gate.getsockname()
    return gate, Address(place.node, "", host, port)


def _with_memory(order: InstanceOrder) -> dict[str, Any]:
    if order.memory_share is None or "kv_memory" in order.options:
        return order.options
    return {**order.options, "kv_memory": int(linux.available_bytes() * order.memory_share)}


def _where() -> tuple[str, str]:
    """Ray's name of this node, and its address in the network."""
    import ray

    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


def _born(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None if it can do nothing any more."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in ("Z", "X") else rest[18]
