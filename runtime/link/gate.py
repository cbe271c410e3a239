"""A TCP door that strangers do not pass: both sides prove that they know one secret.

    caller                        who listens
                            ◀──   magic, nonce
    nonce, proof            ──▶   compared; whoever is wrong is hung up on
                            ◀──   proof

A proof is the HMAC-SHA256, under the secret, of who speaks, what the door is for and both nonces.
So none is of use twice, at another door, or to the other side. Nothing that a caller says is parsed
before its proof was compared. What follows is neither encrypted nor signed: whoever can change
packets between two machines can change tokens, keys and values.
"""

import errno
import hmac
import logging
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

MAGIC = b"vkv door 1\n"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_SAID_BYTES = _NONCE_BYTES + _PROOF_BYTES
_BACKLOG = 64

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Caller:
    """Somebody who has proved nothing yet."""

    connection: socket.socket
    nonce: bytes
    until_s: float
    said: bytearray = field(default_factory=bytearray)


class Gate:
    """A listener, as a socket is one, of callers that know the secret. For any thread.

    A thread of its own hears those that have not proved it: `most_waiting` at most, each for
    `patience_s` at most. One more costs the oldest of them its place, so that many who say nothing
    keep nobody out who knows.

    Args:
        host: to listen on; the system chooses the port.
        secret: what callers must know.
        purpose: what the door is for; a proof for another is none.
        silence_s: as of `watch_over`, for those let in.

    Attributes:
        num_refused: callers that were hung up on.

    Raises OSError if there is no such address here.
    """

    def __init__(
        self,
        host: str,
        *,
        secret: bytes,
        purpose: str,
        silence_s: float,
        most_waiting: int = 64,
        patience_s: float = 5.0,
    ) -> None:
        assert secret, "a door without a secret is none"
        self.num_refused = 0
        self._secret = secret
        self._purpose = purpose
        self._silence_s = silence_s
        self._most_waiting = most_waiting
        self._patience_s = patience_s
        self._listener = socket.create_server(
            (host, 0), family=family_of(host), backlog=_BACKLOG, reuse_port=False
        )
        self._listener.setblocking(False)
        self._name = self._listener.getsockname()
        self._callers: dict[_Caller, None] = {}  # the oldest first
        self._let_in: deque[socket.socket] = deque()
        self._bell, self._ringer = socket.socketpair()  # a byte for each that was let in
        self._accepting = threading.Lock()
        self._is_closed = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="vkv-gate", daemon=True)
        self._thread.start()

    # -- as of a socket that listens -----------------------------------------------------------

    def fileno(self) -> int:
        """Readable while there is somebody to `accept`."""
        return self._bell.fileno()

    def setblocking(self, flag: bool) -> None:
        """As of a socket."""
        self._bell.setblocking(flag)

    def getsockname(self) -> tuple[str, int]:
        """Host and port."""
        return self._name[0], self._name[1]

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        """The next connection that was let in, blocking, and from where. Raises as a socket does;
        OSError once the gate is closed."""
        with self._accepting:
            if self._bell.fileno() < 0 or not self._bell.recv(1):
                self._bell.close()
                raise OSError(errno.EBADF, "the gate is closed")
        try:
            connection = self._let_in.popleft()
        except IndexError:  # closed in this moment
            raise OSError(errno.EBADF, "the gate is closed") from None
        try:
            name = connection.getpeername()
        except OSError:  # gone already, as whoever reads will see
            name = ("", 0)
        return connection, (name[0], name[1])

    def close(self) -> None:
        """Let nobody in any more. Closing twice is harmless."""
        if self._is_closed:
            return
        self._is_closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread up
        self._thread.join()
        if self._accepting.acquire(blocking=False):  # or whoever waits there closes it
            self._bell.close()
            self._accepting.release()
        while self._let_in:
            self._let_in.popleft().close()

    # -- the gate's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closed:
                for key, _ in self._selector.select(self._wait_s()):
                    if key.data is None:
                        self._greet()
                    elif key.data in self._callers:
                        self._hear(key.data)
                self._hang_up_on_the_late()
        finally:
            for caller in list(self._callers):
                self._forget(caller)
                caller.connection.close()
            self._selector.close()
            self._listener.close()
            self._ringer.close()  # wakes up who accepts

    def _wait_s(self) -> float | None:
        oldest = next(iter(self._callers), None)
        return None if oldest is None else max(0.0, oldest.until_s - time.monotonic())

    def _greet(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(0.1)  # it stays readable, and there may be room again
            return
        connection.setblocking(False)
        caller = _Caller(
            connection, secrets.token_bytes(_NONCE_BYTES), time.monotonic() + self._patience_s
        )
        if len(self._callers) >= self._most_waiting:
            self._refuse(next(iter(self._callers)), "others call, and it says nothing")
        self._callers[caller] = None
        self._selector.register(connection, selectors.EVENT_READ, caller)
        self._say(caller, MAGIC + caller.nonce)

    def _hear(self, caller: _Caller) -> None:
        try:
            came = caller.connection.recv(_SAID_BYTES - len(caller.said))
        except BlockingIOError:
            return
        except OSError:
            came = b""
        if not came:
            self._refuse(caller, "it hung up")
            return
        caller.said += came
        if len(caller.said) < _SAID_BYTES:
            return
        nonce, proof = bytes(caller.said[:_NONCE_BYTES]), bytes(caller.said[_NONCE_BYTES:])
        nonces = caller.nonce + nonce
        if not hmac.compare_digest(proof, self._proof("caller", nonces)):
            self._refuse(caller, "it does not know the secret")
        elif self._say(caller, self._proof("listener", nonces)):
            self._forget(caller)
            caller.connection.setblocking(True)
            watch_over(caller.connection, self._silence_s)
            self._let_in.append(caller.connection)
            self._ringer.send(b"!")

    def _say(self, caller: _Caller, words: bytes) -> bool:
        """Say a few bytes, which fit into the buffer of who reads at all."""
        try:
            if caller.connection.send(words) == len(words):
                return True
        except OSError:  # it has gone
            pass
        self._refuse(caller, "it reads nothing")
        return False

    def _proof(self, speaker: str, nonces: bytes) -> bytes:
        return prove(self._secret, speaker, self._purpose, nonces)

    def _hang_up_on_the_late(self) -> None:
        now_s = time.monotonic()
        for caller in list(self._callers):
            if caller.until_s > now_s:
                return
            self._refuse(caller, "it took too long")

    def _refuse(self, caller: _Caller, why: str) -> None:
        if not self.num_refused:  # the first one only: strangers write no logs
            _log.warning("a caller at the port for %s was hung up on: %s", self._purpose, why)
        self.num_refused += 1
        self._forget(caller)
        caller.connection.close()

    def _forget(self, caller: _Caller) -> None:
        del self._callers[caller]
        self._selector.unregister(caller.connection)


def introduce(connection: socket.socket, *, secret: bytes, purpose: str) -> None:
    """Prove to a `Gate` that one knows the secret, and have it prove the same.

    Args:
        connection: blocking, with a time limit of its own.

    Raises OSError; ConnectionError if the other side does not know the secret, or hangs up, as it
    does on who does not.
    """
    greeting = _read(connection, len(MAGIC) + _NONCE_BYTES)
    if not greeting.startswith(MAGIC):
        raise ConnectionError("what answers there is no instance of this version")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    nonces = greeting[len(MAGIC) :] + nonce
    connection.sendall(nonce + prove(secret, "caller", purpose, nonces))
    proof = _read(connection, _PROOF_BYTES)
    if not hmac.compare_digest(proof, prove(secret, "listener", purpose, nonces)):
        raise ConnectionError("what answers there does not know this cluster's secret")


def prove(secret: bytes, speaker: str, purpose: str, nonces: bytes) -> bytes:
    """What only who knows the secret can say; of fixed length, as `nonces` is."""
    return hmac.digest(secret, MAGIC + f"{speaker}\n{purpose}\n".encode() + nonces, "sha256")


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    found = b""
    while len(found) < num_bytes:
        piece = connection.recv(num_bytes - len(found))
        if not piece:
            raise ConnectionError("it hung up: it is of another cluster, or has ended")
        found += piece
    return found


def family_of(host: str) -> socket.AddressFamily:
    """Of an address in digits."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def watch_over(connection: socket.socket, silence_s: float) -> None:
    """Have the system end a TCP connection to a machine that has been silent for some `silence_s`,
    whether or not there is something to send."""
    third_s = max(1, round(silence_s / 3))
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, third_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, third_s),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(silence_s * 1000))),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    ):
        connection.setsockopt(level, option, value)
