"""Whole messages over a stream socket that never blocks."""

import socket
import struct
from collections import deque

_LENGTH = struct.Struct("!I")
_CHUNK_BYTES = 1 << 18


class Frames:
    """Messages on a connected socket: four bytes of length, then that many.

    Neither direction waits. What the system does not take at once is kept, and goes with the next
    `flush`.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()
        self.num_kept_bytes = 0

    def fileno(self) -> int:
        """For selectors and event loops."""
        return self._socket.fileno()

    @property
    def has_kept(self) -> bool:
        """True while something waits for the other side to read."""
        return bool(self._outgoing)

    def write(self, message: bytes) -> None:
        """Send a message, or keep what the system does not take.

        Raises OSError if nobody is there.
        """
        whole = memoryview(_LENGTH.pack(len(message)) + message)
        self._outgoing.append(whole)
        self.num_kept_bytes += len(whole)
        if len(self._outgoing) == 1:
            self.flush()

    def flush(self) -> None:
        """Send what was kept, as far as the system takes it. Raises OSError if nobody is there."""
        while self._outgoing:
            part = self._outgoing[0]
            try:
                sent = self._socket.send(part)
            except BlockingIOError:
                return
            self.num_kept_bytes -= sent
            if sent < len(part):
                self._outgoing[0] = part[sent:]
            else:
                self._outgoing.popleft()

    def read(self) -> list[bytes]:
        """The messages that have come whole. Raises EOFError, which says why, once the other side
        is gone."""
        over: str | None = None
        while True:
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError as error:  # also of a machine that is silent, or cannot be reached
                over = f"the connection broke: {error}"
                break
            if not chunk:
                over = "its process has ended"
                break
            self._incoming += chunk
            if len(chunk) < _CHUNK_BYTES:
                break
        messages = self._take_whole()
        if over is not None and not messages:
            raise EOFError(over)
        return messages

    def _take_whole(self) -> list[bytes]:
        messages, start = [], 0
        while len(self._incoming) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming, start)
            end = start + _LENGTH.size + length
            if len(self._incoming) < end:
                break
            messages.append(bytes(self._incoming[start + _LENGTH.size : end]))
            start = end
        del self._incoming[:start]
        return messages

    def close(self) -> None:
        """Hang up. Closing twice is harmless."""
        self._socket.close()
