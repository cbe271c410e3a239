"""Carries keys and values between engines in several processes: over Unix sockets within a node,
and over TCP between nodes.

    source                                   target
    connect ── number, start, stop ────────▶ looks up what was offered
    Channel.send ── stage, bytes, sum ─────▶ Channel.receive

A connection is for one stage. At the target it is served on a thread of its own, while the engine
computes; at the source, what goes over a network is on a thread from the first packet on.
"""

import itertools
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from ...allocator.transfer import Incoming, Outgoing
from ...allocator.transfer.channels import Channel, ChannelJob, CopyChannel, PageChannel
from ...vmem.errors import InvalidOperation, VkvError
from .addresses import Address, Listener, Place, close_listeners, listen_at, serve_callers

_TIMEOUT_S = 10.0  # that the other side may be silent
_PURPOSE = "keys and values"

_log = logging.getLogger(__name__)


class _Offer(msgspec.Struct, frozen=True, array_like=True):
    """Where tokens are to go: who takes them, and what they are called there."""

    address: Address
    number: int
    by_pages: bool


class _Call(msgspec.Struct, frozen=True, array_like=True):
    """What a source says first: which offer it takes up, and with which tokens."""

    number: int
    start: int
    stop: int


class SocketCarrier:
    """As of `Carrier`, between processes of one node, which share a folder, or of several.

    Args:
        path: of the Unix socket that this process listens on; if the place is one that other nodes
            call, it listens on a TCP port, too.
        place: where this process is; by default on the one node that there is.
        is_checked: compare checksums of what was copied.

    Raises OSError or InvalidOperation if it cannot listen.
    """

    moves_pages = True

    def __init__(self, path: str, *, place: Place | None = None, is_checked: bool = False) -> None:
        self._place = place or Place()
        self._address = Address(self._place.node, path)
        self._is_checked = is_checked
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._offered: dict[int, tuple[Incoming, list[ChannelJob]]] = {}
        self._carrying: list[ChannelJob] = []
        self._carried = (0, 0)
        self._listeners: list[Listener] = []
        self._listen()

    @property
    def node(self) -> str:
        """As of `Carrier`."""
        return self._place.node

    # -- at the target -------------------------------------------------------------------------

    def offer(self, incoming: Incoming) -> bytes:
        """As of `Carrier`."""
        with self._lock:
            known = [n for n, (offered, _) in self._offered.items() if offered is incoming]
            number = known[0] if known else next(self._numbers)
            if not known:
                self._offered[number] = incoming, []
        return msgspec.msgpack.encode(_Offer(self._address, number, incoming.by_pages))

    def withdraw(self, incoming: Incoming) -> None:
        """As of `Carrier`."""
        with self._lock:
            mine = [n for n, (offered, _) in self._offered.items() if offered is incoming]
            jobs = [job for number in mine for job in self._offered.pop(number)[1]]
        for job in jobs:
            job.cancel()

    def close(self) -> None:
        """Take nothing more. Closing twice is harmless."""
        with self._lock:
            listeners, self._listeners = self._listeners, []
        close_listeners(listeners)
        if listeners:
            Path(self._address.path).unlink(missing_ok=True)

    def _listen(self) -> None:
        self._listeners, self._address = listen_at(self._address.path, self._place, _PURPOSE)
        for listener in self._listeners:
            threading.Thread(
                target=serve_callers, args=(listener, self._begin), name="vkv-carrier", daemon=True
            ).start()

    def _begin(self, connection: socket.socket) -> None:
        threading.Thread(
            target=self._serve, args=(connection,), name="vkv-carrier", daemon=True
        ).start()

    def _serve(self, connection: socket.socket) -> None:
        """Take one stage."""
        with connection:
            try:
                connection.settimeout(_TIMEOUT_S)
                call = msgspec.msgpack.decode(_receive(connection), type=_Call)
                with self._lock:
                    if call.number not in self._offered:
                        raise InvalidOperation(f"{call} takes up what is not offered")
                    incoming, jobs = self._offered[call.number]
                    channel = self._channel(connection, incoming.by_pages)
                    job = channel.receive(incoming, call.start, call.stop)
                    jobs.append(job)
                job.run()
            except (OSError, EOFError, msgspec.DecodeError, VkvError) as error:
                _log.warning("tokens did not come: %s", error)

    # -- at the source -------------------------------------------------------------------------

    @property
    def num_carried(self) -> tuple[int, int]:
        """Bytes that were copied from here, and pages that were handed over, so far."""
        with self._lock:
            done = [job for job in self._carrying if job.is_done]
            self._carrying = [job for job in self._carrying if job not in done]
            good = [job for job in done if job.error is None]
            num_bytes, num_pages = self._carried
            self._carried = (
                num_bytes + sum(job.num_bytes for job in good),
                num_pages + sum(job.num_pages for job in good),
            )
            return self._carried

    def carry(self, outgoing: Outgoing, address: bytes, start: int, stop: int) -> ChannelJob:
        """As of `Carrier`. Whether another node answers is told by the job."""
        offer = msgspec.msgpack.decode(address, type=_Offer)
        call = msgspec.msgpack.encode(_Call(offer.number, start, stop))
        connection: socket.socket | None = None

        def open_it(there: socket.socket) -> None:
            self._place.finish_call(there, offer.address, _PURPOSE, _TIMEOUT_S)
            _send(there, call)

        try:
            connection = self._place.begin_call(offer.address, _TIMEOUT_S)
            if self._place.is_near(offer.address):
                _send(connection, call)
                channel = self._channel(connection, offer.by_pages)
            else:
                channel = self._channel(connection, offer.by_pages, open_it)
            job = channel.send(outgoing, start, stop)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if not isinstance(error, OSError | VkvError):
                raise
            # A refusal of the system's ends the move, no more.
            raise InvalidOperation(
                f"nothing goes to {offer.address} ({error}); begin another move"
            ) from error
        with self._lock:
            self._carrying.append(job)
        thread = threading.Thread(target=_run, args=(job, channel), name="vkv-carry", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # there can be no more threads: this move ends, no more
            _log.warning("nothing goes to %s: %s", offer.address, error)
            job.cancel()
            channel.close()
        return job

    def _channel(
        self,
        connection: socket.socket,
        by_pages: bool,
        opening: Callable[[socket.socket], None] | None = None,
    ) -> Channel:
        if by_pages:
            return PageChannel(connection, timeout_s=_TIMEOUT_S, is_checked=self._is_checked)
        return CopyChannel(
            connection, timeout_s=_TIMEOUT_S, is_checked=self._is_checked, opening=opening
        )


def _run(job: ChannelJob, channel: Channel) -> None:
    job.run()
    channel.close()


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(bytes([len(message)]) + message)


def _receive(connection: socket.socket) -> bytes:
    """Raises EOFError if the other side hangs up before the end."""
    found = b""
    wanted = 1
    while len(found) < wanted:
        piece = connection.recv(wanted - len(found))
        if not piece:
            raise EOFError("the caller has hung up")
        found += piece
        wanted = 1 + found[0]
    return found[1:]
