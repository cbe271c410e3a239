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

from ...engine.build import build_loop, load
from ...engine.config import EngineConfig
from ...link.carrier import SocketCarrier
from ...link.engine_process import EngineServer
from ...link.face import Face

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
    """The actor's class. It is ready once it is there: a model that cannot be loaded raises."""

    def __init__(self, order: InstanceOrder) -> None:
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
        self._server = EngineServer(
            loop,
            face,
            listener,
            idle_trim_s=config.idle_trim_s,
            carrier=SocketCarrier(f"{order.path}.kv"),
        )
        # Ray's own handler would end the process, and with it what could have moved away.
        signal.signal(signal.SIGTERM, lambda *_: self._server.ask_to_leave())
        gc.collect()
        gc.freeze()
        threading.Thread(target=self._serve, name="vkv-engine", daemon=True).start()

    def ready(self) -> int:
        """The process's id."""
        return os.getpid()

    def _serve(self) -> None:
        try:
            self._server.run()
        except BaseException:  # noqa: BLE001 - logged; nothing may outlive it
            _log.exception("the engine's thread ends, and its process with it")
            os.kill(os.getpid(), signal.SIGKILL)  # whoever waits for it sees the socket closed
