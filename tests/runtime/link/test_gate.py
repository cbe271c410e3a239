"""A door for who knows the secret: strangers neither pass nor keep others out."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from vkv.runtime.link import gate as gates
from vkv.runtime.link.gate import Gate, introduce

_SECRET = b"s" * 32
_GREETING_BYTES = len(gates.MAGIC) + 32


class _Doors:
    """Makes gates, and calls at them."""

    def __init__(self) -> None:
        self._opened: list[Any] = []

    def gate(self, **options: Any) -> Gate:
        settings: dict[str, Any] = {"secret": _SECRET, "purpose": "tests", "silence_s": 60.0}
        found = Gate("127.0.0.1", **{**settings, **options})
        self._opened.append(found)
        return found

    def call(self, gate: Gate) -> socket.socket:
        connection = socket.create_connection(gate.getsockname(), timeout=10)
        self._opened.append(connection)
        return connection

    def close(self) -> None:
        for one in reversed(self._opened):
            one.close()


@pytest.fixture
def doors() -> Iterator[_Doors]:
    doors = _Doors()
    yield doors
    doors.close()


def _is_hung_up_on(connection: socket.socket) -> bool:
    """Whether the other side closes, whatever it has said before."""
    try:
        while connection.recv(1 << 12):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def _nobody_is_let_in(gate: Gate) -> bool:
    gate.setblocking(False)
    with pytest.raises(BlockingIOError):
        gate.accept()
    return True


def test_both_sides_know_the_secret_and_talk(doors: _Doors) -> None:
    gate = doors.gate()
    caller = doors.call(gate)
    introduce(caller, secret=_SECRET, purpose="tests")
    caller.sendall(b"at once")
    there, name = gate.accept()
    with there:
        assert name == caller.getsockname()
        assert there.recv(7, socket.MSG_WAITALL) == b"at once"
        there.sendall(b"yes")
        assert caller.recv(3) == b"yes"
        for option in (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE):
            assert there.getsockopt(socket.IPPROTO_TCP, option) > 0
        assert there.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert not gate.num_refused


@pytest.mark.parametrize(
    "known", [{"secret": b"x" * 32, "purpose": "tests"}, {"secret": _SECRET, "purpose": "others"}]
)
def test_who_has_another_secret_or_another_door_in_mind_is_hung_up_on(
    doors: _Doors, known: dict[str, Any]
) -> None:
    gate = doors.gate()
    with pytest.raises(ConnectionError, match="another cluster"):
        introduce(doors.call(gate), **known)
    assert gate.num_refused == 1
    assert _nobody_is_let_in(gate)


@pytest.mark.parametrize(
    "words",
    [b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 4, bytes(64), b"\xff" * (1 << 16)],
    ids=["http", "zeros", "much"],
)
def test_garbage_is_hung_up_on(doors: _Doors, words: bytes) -> None:
    gate = doors.gate()
    stranger = doors.call(gate)
    with suppress(ConnectionError):  # it may be hung up on meanwhile
        stranger.sendall(words)
    assert _is_hung_up_on(stranger)
    assert _nobody_is_let_in(gate)
    introduce(doors.call(gate), secret=_SECRET, purpose="tests")


def test_a_proof_is_of_no_use_again(doors: _Doors) -> None:
    """What a caller said is said once more, by who does not know the secret."""
    gate = doors.gate()
    caller = doors.call(gate)
    greeting = caller.recv(_GREETING_BYTES, socket.MSG_WAITALL)
    nonce = b"n" * 32
    said = nonce + gates.prove(_SECRET, "caller", "tests", greeting[len(gates.MAGIC) :] + nonce)
    caller.sendall(said)
    assert len(caller.recv(32, socket.MSG_WAITALL)) == 32
    stranger = doors.call(gate)
    stranger.recv(_GREETING_BYTES, socket.MSG_WAITALL)
    stranger.sendall(said)
    assert _is_hung_up_on(stranger)
    assert gate.num_refused == 1


def _impostor(answer: Callable[[bytes], bytes]) -> tuple[socket.socket, threading.Thread]:
    """Listens, and answers what a caller says."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(gates.MAGIC + b"m" * 32)
            connection.sendall(answer(connection.recv(64, socket.MSG_WAITALL)))
            _is_hung_up_on(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    return listener, thread


@pytest.mark.parametrize(
    "answer",
    [lambda said: b"p" * 32, lambda said: said[32:]],
    ids=["anything", "the caller's own proof"],
)
def test_who_listens_must_know_it_too(answer: Callable[[bytes], bytes]) -> None:
    listener, thread = _impostor(answer)
    with listener, socket.create_connection(listener.getsockname(), timeout=10) as caller:
        with pytest.raises(ConnectionError, match="does not know this cluster's secret"):
            introduce(caller, secret=_SECRET, purpose="tests")
        caller.close()
        thread.join(10)
        assert not thread.is_alive()


def test_something_else_that_listens_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = socket.create_connection(listener.getsockname(), timeout=10)
        there, _ = listener.accept()
        with caller, there:
            there.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 4)
            with pytest.raises(ConnectionError, match="no instance of this version"):
                introduce(caller, secret=_SECRET, purpose="tests")


def test_who_says_nothing_is_hung_up_on_in_time(doors: _Doors) -> None:
    gate = doors.gate(patience_s=0.2)
    silent, slow = doors.call(gate), doors.call(gate)
    began_s = time.monotonic()
    while time.monotonic() - began_s < 5:  # a byte now and then gains no time
        try:
            slow.sendall(b"a")
        except OSError:
            break
        time.sleep(0.02)
    assert _is_hung_up_on(silent)
    assert _is_hung_up_on(slow)
    assert time.monotonic() - began_s < 5
    assert gate.num_refused == 2


def test_many_strangers_keep_nobody_out(doors: _Doors, caplog: pytest.LogCaptureFixture) -> None:
    gate = doors.gate(most_waiting=8, patience_s=60.0)
    with caplog.at_level(logging.WARNING):
        strangers = [doors.call(gate) for _ in range(40)]
        friend = doors.call(gate)
        introduce(friend, secret=_SECRET, purpose="tests")
        for stranger in strangers[:32]:  # the oldest made way
            assert _is_hung_up_on(stranger)
    there, _ = gate.accept()
    there.close()
    assert len(caplog.records) == 1  # strangers write no logs


def test_once_it_is_closed_nobody_waits(doors: _Doors) -> None:
    gate = doors.gate()
    waiting = doors.call(gate)
    waiting.recv(_GREETING_BYTES, socket.MSG_WAITALL)
    ended: list[OSError] = []

    def accept() -> None:
        try:
            gate.accept()
        except OSError as error:
            ended.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    gate.close()
    gate.close()
    thread.join(10)
    assert len(ended) == 1
    assert _is_hung_up_on(waiting)
    with pytest.raises(OSError, match=r"refused|reset"):
        doors.call(gate)


def test_the_secret_is_in_no_text() -> None:
    from vkv.runtime.cluster.instances.actor import InstanceOrder
    from vkv.runtime.link.addresses import Place

    secret = b"not to be seen"
    order = InstanceOrder(
        model=None, device="cpu", dtype="auto", options={}, path="/x", secret=secret
    )
    assert "not to be seen" not in f"{order!r} {Place(secret=secret)!r}"
