"""Where a process is reached, and by what: a Unix socket on its own node, TCP from any other."""

import errno
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ...vmem.errors import InvalidOperation
from .gate import Gate, family_of, introduce, watch_over

_BACKLOG = 64
_PAUSE_S = 0.1  # before the system is asked again for what it had none of
_CLOSED = (errno.EBADF, errno.EINVAL)  # what a listener says that was closed, or is just now

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """What accepts connections: a socket that listens, or a `Gate`."""

    def fileno(self) -> int: ...
    def setblocking(self, flag: bool, /) -> None: ...
    def getsockname(self) -> Any: ...
    def accept(self) -> tuple[socket.socket, Any]: ...
    def close(self) -> None: ...


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Where a process listens.

    Attributes:
        node: that it is on.
        path: of a Unix socket there; "" for none.
        host, port: for other nodes; port 0 for none.
    """

    node: str = ""
    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return self.path if not self.port else f"{self.host}:{self.port}"

    def told(self) -> str:
        """As a text that another process is told."""
        return msgspec.json.encode(self).decode()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process is, and what it must know to be called from other nodes and to call them.

    Attributes:
        node: names the machine: whoever is on it shares files and memory.
        host: its address in the network; "" for a process that no other node calls.
        secret: that all processes of a cluster know (`Gate`).
        silence_s: after so long without a sign of it a machine counts as gone.
    """

    node: str = ""
    host: str = ""
    secret: bytes = field(default=b"", repr=False)
    silence_s: float = 60.0

    def is_near(self, address: Address) -> bool:
        """Whether an address is reached without a network."""
        return address.node == self.node and bool(address.path)

    def open_gate(self, purpose: str) -> Gate:
        """Listen for other nodes. Raises OSError if `host` is no address of this machine."""
        return Gate(self.host, secret=self.secret, purpose=purpose, silence_s=self.silence_s)

    def begin_call(self, address: Address, timeout_s: float) -> socket.socket:
        """A socket for an address: connected if it is near, and else to be `finish_call`ed.

        `timeout_s` is its time limit. Raises OSError if nobody is there; InvalidOperation if it
        cannot be reached from here at all.
        """
        if not self.is_near(address) and not address.port:
            raise InvalidOperation(f"{address} is on another node, and listens on none but its own")
        family = socket.AF_UNIX if self.is_near(address) else family_of(address.host)
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        if self.is_near(address):
            try:
                connection.connect(address.path)
            except OSError:
                connection.close()
                raise
        return connection

    def finish_call(
        self, connection: socket.socket, address: Address, purpose: str, timeout_s: float
    ) -> None:
        """Connect over the network, and prove who calls. Without effect where it is near.

        Another thread may shut the socket down meanwhile, which ends it at once. Raises OSError,
        also where each of its parts takes longer than `timeout_s`.
        """
        if self.is_near(address):
            return
        before = connection.gettimeout()
        connection.settimeout(timeout_s)  # so it waits for the system, not in it
        connection.connect((address.host, address.port))
        introduce(connection, secret=self.secret, purpose=purpose)
        watch_over(connection, self.silence_s)
        connection.settimeout(before)

    def call(self, address: Address, purpose: str, timeout_s: float) -> socket.socket:
        """A connection, ready for use. Raises OSError or InvalidOperation."""
        connection = self.begin_call(address, timeout_s)
        try:
            self.finish_call(connection, address, purpose, timeout_s)
        except OSError:
            connection.close()
            raise
        return connection


def listen_at(path: str, place: Place, purpose: str) -> tuple[list[Listener], Address]:
    """Listen on a Unix socket, and on a TCP port too where other nodes call; and where that is.

    Raises OSError or InvalidOperation.
    """
    listeners: list[Listener] = [listen_near(path)]
    address = Address(place.node, path)
    if place.host:
        try:
            gate = place.open_gate(purpose)
        except OSError:
            close_listeners(listeners)
            raise
        listeners.append(gate)
        host, port = gate.getsockname()
        address = msgspec.structs.replace(address, host=host, port=port)
    return listeners, address


def close_listeners(listeners: Iterable[Listener]) -> None:
    """Close what others accept from, in this moment perhaps."""
    for listener in listeners:
        if isinstance(listener, socket.socket):
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes up who accepts
        listener.close()


def serve_callers(listener: Listener, serve: Callable[[socket.socket], None]) -> None:
    """Hand each that calls to `serve`, until the listener is closed. For a thread of its own.

    Where the system has no descriptor or thread for a caller, it goes on after a moment.
    """
    while True:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in _CLOSED:
                return
            _log.warning("a caller could not be let in, and may wait: %s", error)
            time.sleep(_PAUSE_S)
            continue
        try:
            serve(connection)
        except (OSError, RuntimeError) as error:  # RuntimeError: there can be no more threads
            _log.warning("a caller could not be served, and is hung up on: %s", error)
            connection.close()


def listen_near(path: str) -> socket.socket:
    """Listen on a Unix socket, which its folder protects.

    Raises InvalidOperation if others than this user may enter the folder.
    """
    folder = Path(path).parent
    found = folder.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise InvalidOperation(
            f"{folder} has mode {stat.S_IMODE(found.st_mode):o} and belongs to user "
            f"{found.st_uid}, so others could call; make it yours alone (chmod 700)"
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
