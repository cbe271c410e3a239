"""Carries keys and values between engines in several processes of one machine, over Unix sockets.

    source                                   target
    connect ── which, from, to ────────────▶ looks up what was offered
    Channel.send ── stage, bytes, sum ─────▶ Channel.receive

A connection is for one stage. At the target it is served on a thread of its own, while the engine
computes.
"""

import itertools
import logging
import socket
import threading
from contextlib import suppress
from pathlib import Path

import msgspec

from ...allocator.transfer import Incoming, Outgoing
from ...allocator.transfer.channels import Channel, ChannelJob, CopyChannel, PageChannel
from ...vmem.errors import InvalidOperation, VkvError

_TIMEOUT_S = 10.0  # that the other side may be silent
_MOST_WAITING = 64

_log = logging.getLogger(__name__)


class _Offer(msgspec.Struct, frozen=True, array_like=True):
    """Where tokens are to go: a socket, and what they are called there."""

    path: str
    number: int
    by_pages: bool


class _Call(msgspec.Struct, frozen=True, array_like=True):
    """What a source says first: which offer it takes up, and with which tokens."""

    number: int
    start: int
    stop: int


class SocketCarrier:
    """As of `Carrier`, between processes that share a folder.

    Args:
        path: of the socket that this process listens on; it is made with the first offer.
        is_checked: compare checksums of what was copied.

    Attributes:
        num_bytes, num_pages: that were copied from here, and that were handed over, so far.
    """

    moves_pages = True

    def __init__(self, path: str, *, is_checked: bool = False) -> None:
        self.num_bytes = self.num_pages = 0
        self._path = path
        self._is_checked = is_checked
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._offered: dict[int, tuple[Incoming, list[ChannelJob]]] = {}
        self._listener: socket.socket | None = None

    # -- at the target -------------------------------------------------------------------------

    def offer(self, incoming: Incoming) -> bytes:
        """As of `Carrier`."""
        with self._lock:
            known = [n for n, (offered, _) in self._offered.items() if offered is incoming]
            number = known[0] if known else next(self._numbers)
            if not known:
                self._listen()
                self._offered[number] = incoming, []
        return msgspec.msgpack.encode(_Offer(self._path, number, incoming.by_pages))

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
            listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes up who accepts
            listener.close()
            Path(self._path).unlink(missing_ok=True)

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(self._path)
            self._listener.listen(_MOST_WAITING)
            threading.Thread(
                target=self._accept, args=(self._listener,), name="vkv-carrier", daemon=True
            ).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
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

    def carry(self, outgoing: Outgoing, address: bytes, start: int, stop: int) -> ChannelJob:
        """As of `Carrier`."""
        offer = msgspec.msgpack.decode(address, type=_Offer)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(offer.path)
            _send(connection, msgspec.msgpack.encode(_Call(offer.number, start, stop)))
            channel = self._channel(connection, offer.by_pages)
            job = channel.send(outgoing, start, stop)
        except (OSError, VkvError) as error:  # a refusal of the system's ends the move, no more
            connection.close()
            raise InvalidOperation(
                f"nothing goes to {offer.path} ({error}); begin another move"
            ) from error
        except BaseException:
            connection.close()
            raise
        threading.Thread(
            target=self._run, args=(job, channel), name="vkv-carry", daemon=True
        ).start()
        return job

    def _channel(self, connection: socket.socket, by_pages: bool) -> Channel:
        kind = PageChannel if by_pages else CopyChannel
        return kind(connection, timeout_s=_TIMEOUT_S, is_checked=self._is_checked)

    def _run(self, job: ChannelJob, channel: Channel) -> None:
        job.run()
        channel.close()
        if job.error is None:
            self.num_bytes += job.num_bytes
            self.num_pages += job.num_pages


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
