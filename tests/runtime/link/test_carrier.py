"""Tokens on their way between two processes, on one node and on two; and what ends a move alone."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from allocator_model import KIND, FlakyHostDriver, make_cache
from kv_peer import digest
from vkv.allocator.transfer import Incoming, Outgoing, TransferKey, Transfers
from vkv.runtime.link.addresses import Place
from vkv.runtime.link.carrier import SocketCarrier
from vkv.vmem.errors import DriverError, InvalidOperation


def _refuse(*args: object) -> Any:
    raise DriverError("injected")


@pytest.mark.parametrize("by_pages", [False, True])
def test_a_refused_call_ends_the_move_alone(tmp_path: Path, by_pages: bool) -> None:
    carrier = SocketCarrier(str(tmp_path / "kv"))
    incoming: Any = SimpleNamespace(
        by_pages=by_pages, num_held=0, spans=_refuse, record_fence=_refuse
    )
    outgoing: Any = SimpleNamespace(
        key=TransferKey("a/0", 1),
        num_tokens=9,
        spans=_refuse,
        lend=_refuse,
        record_fence=lambda: SimpleNamespace(wait=lambda: None),
    )
    address = carrier.offer(incoming)
    with pytest.raises(InvalidOperation, match="injected"):
        carrier.carry(outgoing, address, 0, 9)
    carrier.close()
    with pytest.raises(InvalidOperation, match="begin another move"):
        carrier.carry(outgoing, address, 0, 9)


def test_without_a_thread_to_spare_a_move_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrier = SocketCarrier(str(tmp_path / "kv"))
    fence = SimpleNamespace(wait=lambda: None)
    incoming: Any = SimpleNamespace(
        by_pages=False, num_held=0, spans=lambda *_: [], record_fence=lambda: fence
    )
    outgoing: Any = SimpleNamespace(
        key=TransferKey("a/0", 1), num_tokens=9, spans=lambda *_: [], record_fence=lambda: fence
    )
    address = carrier.offer(incoming)
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "vkv-carry":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    job = carrier.carry(outgoing, address, 0, 9)
    assert job.is_done
    assert isinstance(job.error, InvalidOperation)
    carrier.withdraw(incoming)
    carrier.close()


_NUM_TOKENS = 140
_SECRET = b"k" * 32


class _End:
    """One side: a cache, its transfers, and a carrier."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.cache = make_cache(KIND["ragged"], FlakyHostDriver(4096), rows=9, movable=True)
        self.transfers = Transfers(self.cache)
        self.carrier = SocketCarrier(str(folder / "kv"), place=place)
        self._begun: list[Outgoing | Incoming] = []

    def begin(self) -> tuple[Outgoing, int]:
        """Something to send, and its digest."""
        slot = self.cache.open()
        self.cache.grow(slot, _NUM_TOKENS)
        for stream in self.cache.spans(slot, 0, _NUM_TOKENS):
            for piece in stream:
                piece.random_(1, 255)
        outgoing = self.transfers.send(TransferKey("a/0", 1), slot, _NUM_TOKENS)
        self._begun.append(outgoing)
        return outgoing, digest(self.cache, slot, _NUM_TOKENS)

    def expect(self) -> Incoming:
        tokens = list(range(_NUM_TOKENS))
        incoming = self.transfers.receive(TransferKey("a/0", 1), tokens)
        self._begun.append(incoming)
        incoming.make_room(_NUM_TOKENS)
        return incoming

    def close(self) -> None:
        self.carrier.close()
        for transfer in self._begun:
            transfer.abort()  # without effect on what was committed
        self.cache.shutdown()
        self.cache.pool.driver.close()


@contextmanager
def _ends(tmp_path: Path, *places: Place) -> Iterator[tuple[_End, _End]]:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir(mode=0o700)
    ends = [_End(folder, place) for folder, place in zip(folders, places, strict=True)]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()


def _place(node: str, secret: bytes = _SECRET) -> Place:
    return Place(node=node, host="127.0.0.1", secret=secret)


@pytest.mark.parametrize("nodes", [("one", "one"), ("one", "other")])
def test_tokens_go_to_the_same_node_and_to_another(tmp_path: Path, nodes: tuple[str, str]) -> None:
    with _ends(tmp_path, _place(nodes[0]), _place(nodes[1])) as (source, target):
        if nodes[0] != nodes[1]:
            (tmp_path / "b" / "kv").unlink()  # nobody needs the other's socket
        outgoing, before = source.begin()
        incoming = target.expect()
        address = target.carrier.offer(incoming)
        assert target.carrier.offer(incoming) == address
        job = source.carrier.carry(outgoing, address, 0, _NUM_TOKENS)
        assert job.wait(30)
        assert job.error is None
        assert source.carrier.num_carried == (job.num_bytes, 0)
        assert job.num_bytes > 0
        incoming.commit()
        slot = incoming.claim()
        assert slot is not None
        assert digest(target.cache, slot, _NUM_TOKENS) == before
        outgoing.commit()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda place: replace(place, secret=b"x" * 32), "another cluster"),
        (lambda place: replace(place, node="a third"), ""),
    ],
)
def test_a_source_that_does_not_know_the_secret_brings_nothing(
    tmp_path: Path, change: Callable[[Place], Place], why: str
) -> None:
    with _ends(tmp_path, change(_place("one")), _place("other")) as (source, target):
        outgoing, _ = source.begin()
        incoming = target.expect()
        job = source.carrier.carry(outgoing, target.carrier.offer(incoming), 0, _NUM_TOKENS)
        assert job.wait(30)
        assert (why in str(job.error)) if why else job.error is None
        outgoing.abort()
        target.carrier.withdraw(incoming)
        incoming.abort()


def test_a_machine_that_does_not_answer_holds_no_engine_up(tmp_path: Path) -> None:
    """Nobody accepts, and the line of those that call is full: the connection never comes about."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1) as silent,
        _ends(tmp_path, _place("one"), _place("other")) as (source, _),
        ExitStack() as line,
    ):
        for _ in range(4):
            caller = line.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(silent.getsockname())
        outgoing, _ = source.begin()
        address = msgspec.msgpack.encode([["other", "", *silent.getsockname()], 0, False])
        began_s = time.monotonic()
        job = source.carrier.carry(outgoing, address, 0, _NUM_TOKENS)
        assert time.monotonic() - began_s < 5
        assert not job.is_done
        job.cancel()
        assert time.monotonic() - began_s < 5
        assert job.error is not None
        outgoing.abort()
        assert source.carrier.num_carried == (0, 0)


def test_pages_are_not_lent_to_another_node(tmp_path: Path) -> None:
    with _ends(tmp_path, _place("one"), _place("other")) as (source, target):
        outgoing, _ = source.begin()
        incoming: Any = SimpleNamespace(by_pages=True)
        with pytest.raises(InvalidOperation, match="copy the tokens"):
            source.carrier.carry(outgoing, target.carrier.offer(incoming), 0, _NUM_TOKENS)
        outgoing.abort()


def test_a_node_that_others_do_not_call_says_so(tmp_path: Path) -> None:
    with _ends(tmp_path, Place(node="one"), Place(node="other")) as (source, target):
        outgoing, _ = source.begin()
        incoming = target.expect()
        with pytest.raises(InvalidOperation, match="listens on none but its own"):
            source.carrier.carry(outgoing, target.carrier.offer(incoming), 0, _NUM_TOKENS)
        outgoing.abort()
        target.carrier.withdraw(incoming)
        incoming.abort()


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    with pytest.raises(InvalidOperation, match="chmod 700"):
        SocketCarrier(str(tmp_path / "kv"))
