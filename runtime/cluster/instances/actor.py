"""One instance: an engine in an actor's process, and the thread that serves it.

Ray starts it, and tells whether it lives. Tokens, keys and values do not pass through Ray: callers
have a socket to it.
"""

import gc
import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass
from typing import Any

import torch

from ....vmem.errors import VkvError
from ...engine.build import build_loop, load
from ...engine.config import EngineConfig
from ...link.carrier import SocketCarrier
from ...link.engine_process import EngineServer
from ...link.face import Face
from ...request.step_output import Failure

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InstanceOrder:
    """What an instance is to load, and where it is reached.

    Attributes:
        model, device, dtype: as of `LLM`.
        options: of `EngineConfig`.
        path: of the socket on which it listens; that of its keys and values is beside it.
        threads: of PyTorch, on a CPU; None for its own choice.
    """

    model: str | None
    device: str
    dtype: str
    options: dict[str, Any]
    path: str
    threads: int | None = None


class InstanceActor:
    """The actor's class. What its model cannot be loaded for is told by `ready`."""

    def __init__(self, order: InstanceOrder) -> None:
        self._failure: Failure | None = None
        try:
            self._server = _build(order)
        except VkvError as error:  # Ray would make text of it
            self._failure = Failure.of(error)
            return
        # Ray's own handler would end the process, and with it what could have moved away.
        signal.signal(signal.SIGTERM, lambda *_: self._server.ask_to_leave())
        gc.collect()
        gc.freeze()
        threading.Thread(target=self._serve, name="vkv-engine", daemon=True).start()

    def ready(self) -> tuple[int, Failure | None]:
        """The process's id, and why it is of no use."""
        return os.getpid(), self._failure

    def _serve(self) -> None:
        try:
            self._server.run()
        except BaseException:  # noqa: BLE001 - logged; nothing may outlive it
            _log.exception("the engine's thread ends, and its process with it")
            os.kill(os.getpid(), signal.SIGKILL)  # whoever waits for it sees the socket closed


def _build(order: InstanceOrder) -> EngineServer:
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    config = EngineConfig(**order.options)
    loaded = load(
        order.model, tokenizer=None, device=order.device, dtype=order.dtype, config=config
    )
    loop = build_loop(loaded, config)
    face = Face.of(loaded, loop.engine, config)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(order.path)
    listener.listen(16)
    carrier = SocketCarrier(f"{order.path}.kv")
    return EngineServer(loop, face, listener, idle_trim_s=config.idle_trim_s, carrier=carrier)
