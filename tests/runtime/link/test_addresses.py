"""Those that call are served until the listener is closed, whatever the system is short of."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from vkv.runtime.link import addresses
from vkv.runtime.link.addresses import close_listeners, listen_near, serve_callers


class _Listener(socket.socket):
    """One whose next calls for a connection fail as the system may have them fail."""

    errors: list[int]

    def accept(self) -> tuple[socket.socket, object]:
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Listener]:
    monkeypatch.setattr(addresses, "_PAUSE_S", 0.01)
    tmp_path.chmod(0o700)
    listener = _Listener(fileno=listen_near(str(tmp_path / "door")).detach())
    listener.errors = []
    yield listener
    listener.close()


def _call(listener: _Listener) -> socket.socket:
    caller = socket.socket(socket.AF_UNIX)
    caller.settimeout(10)
    caller.connect(listener.getsockname())
    return caller


def test_a_system_without_descriptors_ends_no_door(listener: _Listener) -> None:
    listener.errors = [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED]

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.sendall(b"!")

    thread = threading.Thread(target=serve_callers, args=(listener, serve))
    thread.start()
    with _call(listener) as caller:
        assert caller.recv(1) == b"!"
    close_listeners([listener])
    thread.join(10)
    assert not thread.is_alive()


def test_who_cannot_be_served_is_hung_up_on_and_the_next_is_served(listener: _Listener) -> None:
    served: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        served.append(connection)
        if len(served) == 1:
            raise RuntimeError("can't start new thread")
        with connection:
            connection.sendall(b"!")

    thread = threading.Thread(target=serve_callers, args=(listener, serve))
    thread.start()
    with _call(listener) as first, _call(listener) as second:
        assert first.recv(1) == b""
        assert second.recv(1) == b"!"
    close_listeners([listener])
    thread.join(10)
    assert not thread.is_alive()
