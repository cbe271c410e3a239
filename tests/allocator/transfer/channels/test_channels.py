"""Tokens through channels: what arrives, what is copied, and what a bad peer can do (nothing)."""

import dataclasses
import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import pytest
from allocator_model import KIND, Model, make_cache, make_paged, one_thread
from kv_peer import Peer, connected, descriptors, digest
from standin import StandIn
from vkv.allocator import KVCache, KVLayout, PagePool
from vkv.allocator.transfer import Copier, TransferKey, Transfers, TransferState
from vkv.allocator.transfer.channels import CopyChannel, PageChannel, wire
from vkv.allocator.transfer.channels.sockets import Answer, Stage
from vkv.vmem import HostDriver
from vkv.vmem.errors import (
    DriverError,
    InvalidConfig,
    InvalidOperation,
    OutOfPages,
    TransferError,
)

__all__ = ["one_thread"]  # a fixture

CHANNELS = ["copies", "pages"]


@contextmanager
def peers(channel: str, *, tcp: bool = False, **options: Any) -> Iterator[tuple[Peer, Peer]]:
    """Two ends in this process; whatever was done, nothing is left at the end."""
    before = descriptors()
    ours, theirs = connected(tcp)
    near, far = Peer(ours, channel, **options), Peer(theirs, channel, **options)
    try:
        yield near, far
    finally:
        near.shutdown()
        far.shutdown()
    assert descriptors() == before


def left(peer: Peer) -> dict[str, int]:
    """What a peer still has; descriptors are both peers' and counted by `peers`."""
    return {name: n for name, n in peer.counts().items() if n and name != "descriptors"}


def meanwhile(action: Callable[[], Any]) -> Callable[[], Any]:
    """Begin `action` on a thread; what is returned waits for its result."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(action()))
    thread.start()

    def result() -> Any:
        thread.join(20)
        assert found, "it hangs, or failed"
        return found[0]

    return result


def stage(near: Peer, far: Peer, name: str, start: int, stop: int, **options: Any) -> tuple:
    """One stage from `near` to `far`; what each side says of it."""
    arriving = meanwhile(lambda: far.receive(name, start, stop, **options))
    sent = near.send(name, start, stop)
    return sent, arriving()


# -- what arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_checked", [False, True])
@pytest.mark.parametrize("tcp", [False, True])
def test_copies_come_in_stages_while_tokens_get_more(tcp: bool, is_checked: bool) -> None:
    with peers("copies", tcp=tcp, is_checked=is_checked) as (near, far):
        near.fill("a", 40)
        (error, num_bytes, _), (other, received, _) = stage(near, far, "a", 0, 40)
        assert (error, other) == ("''", "''")
        token_bytes = near.cache.geometry.token_format.token_bytes
        assert num_bytes == received == 40 * token_bytes
        whole = near.fill("a", 90)
        sent, _ = stage(near, far, "a", 40, 90, num_reserved=120)
        assert sent == ("''", 50 * token_bytes, 0)
        assert far.commit_receipt("a", 90) == whole
        near.end_sending("a", is_done=True)
        assert far.slots["a"].promised_tokens == 120
        near.close("a")
        far.close("a")
        for peer in (near, far):
            assert not left(peer)


def test_pages_come_without_a_byte_copied() -> None:
    with peers("pages") as (near, far):
        whole = near.fill("a", 90)
        num_pages = near.slots["a"].num_pages
        before = far.cache.pool.driver.counters["create"]
        assert stage(near, far, "a", 0, 90, num_reserved=140) == (("''", 0, num_pages),) * 2
        assert far.commit_receipt("a", 90) == whole
        near.end_sending("a", is_done=True)
        near.close("a")
        assert not left(near)
        assert far.digest("a") == whole
        assert far.cache.pool.driver.counters["create"] == before
        far.fill("a", 140)
        far.close("a")
        assert not left(far)


@pytest.mark.parametrize("is_checked", [False, True])
def test_what_others_share_is_copied_beside_the_pages(is_checked: bool) -> None:
    with peers("pages", is_checked=is_checked) as (near, far):
        near.fill("a", 90)
        near.fork("a", "b", 60)
        whole = near.fill("b", 120)
        shared = near.cache.layout.whole_pages_per_range(60)
        total = near.slots["b"].num_pages
        sent, received = stage(near, far, "b", 0, 120)
        assert sent == received == ("''", sum(shared) * 4096, total - sum(shared))
        assert far.commit_receipt("b", 120) == whole
        near.end_sending("b", is_done=True)
        parent = near.digest("a")
        far.fill("b", 140)
        assert near.digest("a") == parent


@pytest.mark.parametrize("is_checked", [False, True])
def test_pages_of_another_size_and_blocks_take_copies(is_checked: bool) -> None:
    """Also into ranges that end inside of pages, and from as many pieces as there are blocks."""
    near = make_paged(block_tokens=7, rows=4)
    layout = KVLayout(
        near.layout.layers, near.layout.dtype, 150, 4096, layers_per_range=1, split_kv=True
    )
    with ExitStack() as stack:
        stack.enter_context(near)
        caches = [
            stack.enter_context(
                KVCache(
                    dataclasses.replace(layout, page_bytes=size),
                    PagePool(stack.enter_context(HostDriver(size)), 1 << 22),
                    num_slots=2,
                )
            )
            for size in (4096, 16384)
        ]
        model = Model(near)
        request = model.open()
        assert request is not None
        assert model.grow(request, list(range(70)))
        digests, slot, source = [digest(near, request.slot, 70)], request.slot, near
        for number, target in enumerate(caches):
            ends = [CopyChannel(sock, is_checked=is_checked) for sock in connected()]
            key = TransferKey(f"{number}", 0)
            outgoing = Transfers(source).send(key, slot, 70)
            incoming = Transfers(target).receive(key, request.tokens)
            arriving = meanwhile(lambda: ends[1].receive(incoming, 0, 70).run())  # noqa: B023
            ends[0].send(outgoing, 0, 70).run()
            arriving()
            outgoing.commit()
            incoming.commit()
            claimed = incoming.claim()
            assert claimed is not None
            slot, source = claimed, target
            digests.append(digest(target, slot, 70))
            for end in ends:
                end.close()
        assert len(set(digests)) == 1


def test_only_what_the_receiver_lacks_is_sent() -> None:
    with peers("copies") as (near, far):
        near.fill("a", 90, seed=3)
        far.fill("old", 40, seed=3)
        far.park("old")
        incoming = far.transfers.receive(TransferKey("a", 0), list(range(90)))
        assert incoming.num_held == 40
        with pytest.raises(InvalidOperation, match="begin there"):
            far.channel.receive(incoming, 0, 90)
        sent, _ = stage(near, far, "a", 40, 90)
        assert sent[1] == 50 * near.cache.geometry.token_format.token_bytes
        assert far.commit_receipt("a", 90) == near.digest("a")


def test_jobs_run_beside_on_a_copier() -> None:
    with peers("copies") as (near, far):
        whole = near.fill("a", 100)
        copiers = [Copier(near.cache.pool.driver.device) for _ in range(2)]
        outgoing = near.transfers.send(TransferKey("a", 0), near.slots["a"], 100)
        incoming = far.transfers.receive(TransferKey("a", 0), list(range(100)))
        jobs = [
            (
                copiers[0].submit(near.channel.send(outgoing, start, start + 20)),
                copiers[1].submit(far.channel.receive(incoming, start, start + 20)),
            )
            for start in range(0, 100, 20)
        ]
        assert all(job.wait(20) and job.error is None for pair in jobs for job in pair)
        assert far.commit_receipt("a", 100) == whole
        outgoing.abort()
        for copier in copiers:
            copier.stop()


# -- what is refused, and leaves both in step ----------------------------------------------------


def test_a_receiver_without_memory_says_so_and_may_be_asked_again() -> None:
    with peers("pages") as (near, far):
        near.fill("a", 140)
        near.fork("a", "b", 100)
        incoming = far.transfers.receive(TransferKey("a", 0), list(range(140)), by_pages=True)
        limit, far.cache.pool.limit_pages = far.cache.pool.limit_pages, 0
        driver = far.cache.pool.driver
        driver.fail_after, driver.fail_short = 2, True
        sent, received = stage(near, far, "a", 0, 140)
        driver.fail_after = None
        far.cache.pool.limit_pages = limit
        assert "would not have the tokens" in sent[0]
        assert "injected" in sent[0]
        assert "Error" in received[0] or "OutOf" in received[0]
        assert incoming.state is TransferState.UNDER_WAY
        assert near.channel.is_open
        assert far.channel.is_open
        (error, *_), _ = stage(near, far, "a", 0, 140)  # lent anew
        assert error == "''"
        assert far.commit_receipt("a", 140) == near.digest("a")


def test_another_stage_than_was_agreed_upon_is_refused() -> None:
    for channel in CHANNELS:
        with peers(channel) as (near, far):
            near.fill("a", 60)
            far.fill("x", 1)
            arriving = meanwhile(lambda: far.receive("b", 0, 60))
            sent = near.send("a", 0, 60)
            assert "in place of" in sent[0]
            assert "in place of" in arriving()[0]
            assert near.channel.is_open
            (error, *_), _ = stage(near, far, "a", 0, 60)
            assert error == "''"


def test_tokens_of_another_format_are_refused() -> None:
    ours, theirs = connected()
    near, far = Peer(ours, "copies", "even"), Peer(theirs, "copies", "ragged")
    near.fill("a", 60)
    sent, received = stage(near, far, "a", 0, 60)
    assert "bytes come in place of" in sent[0]
    assert "bytes come in place of" in received[0]
    near.shutdown(), far.shutdown()


def test_pages_go_all_at_once() -> None:
    with peers("pages") as (near, _):
        near.fill("a", 60)
        outgoing = near.transfers.send(TransferKey("a", 0), near.slots["a"], 60)
        with pytest.raises(InvalidOperation, match="at once"):
            near.channel.send(outgoing, 0, 40)
        outgoing.abort()


def test_pages_go_over_unix_sockets_alone() -> None:
    for sock in connected(tcp=True):
        with pytest.raises(InvalidConfig, match="Unix"):
            PageChannel(sock)
        with pytest.raises(InvalidConfig, match="millisecond"):
            CopyChannel(sock, timeout_s=0)
        sock.close()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        pytest.raises(InvalidConfig, match="no stream"),
    ):
        CopyChannel(sock)


# -- extending -----------------------------------------------------------------------------------


def test_extending_changes_all_or_nothing_and_may_come_twice() -> None:
    with make_cache(KIND["even"], rows=1.2) as near, make_cache(KIND["even"], rows=1.2) as far:
        request = Model(near).open()
        near.grow(request.slot, 60)
        outgoing = Transfers(near).send(TransferKey("a", 0), request.slot, 40)
        for _ in range(2):
            outgoing.extend(60)
        outgoing.extend(10)
        assert (outgoing.num_tokens, request.slot.num_pins, request.slot.pinned_tokens) == (
            60,
            1,
            60,
        )
        with pytest.raises(InvalidOperation, match="cannot pin"):
            outgoing.extend(61)
        assert outgoing.num_tokens == 60
        incoming = Transfers(far).receive(TransferKey("a", 0), list(range(40)))
        for _ in range(2):
            incoming.extend(list(range(60)), num_reserved=70)
        with pytest.raises(InvalidOperation, match="other tokens"):
            incoming.extend([9] * 70)
        occupant = far.open()
        far.grow(occupant, 40)
        held = far.stats().pages_held
        with pytest.raises(OutOfPages):
            incoming.extend(list(range(150)))
        assert (incoming.num_tokens, far.stats().pages_held) == (60, held)
        far.check_invariants()
        for side in (outgoing, incoming):
            side.abort()
        with pytest.raises(InvalidOperation, match="is aborted"):
            outgoing.extend(60)
        with pytest.raises(InvalidOperation, match="is aborted"):
            incoming.extend(list(range(60)))
        far.check_invariants()


def test_a_receiver_of_pages_may_be_extended_until_they_come() -> None:
    with peers("pages") as (near, far):
        near.fill("a", 90)
        incoming = far.transfers.receive(TransferKey("a", 0), list(range(20)), by_pages=True)
        with pytest.raises(InvalidOperation, match="have not come"):
            incoming.commit()
        incoming.extend(list(range(90)))
        assert far.cache.pool.num_held == 0
        assert stage(near, far, "a", 0, 90)[1][0] == "''"
        with pytest.raises(InvalidOperation, match="come already"):
            incoming.extend(list(range(99)))
        outgoing = near.transfers.send(TransferKey("a", 0), near.slots["a"], 90)
        near.fill("a", 100)
        with pytest.raises(InvalidOperation, match="lent already"):
            outgoing.extend(100)
        incoming.commit()
        outgoing.commit()


# -- bad peers -----------------------------------------------------------------------------------

_HEAD = struct.Struct("<4sI")


def _said(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return _HEAD.pack(b"vkv1", len(body)) + body


def _stage(**changes: Any) -> bytes:
    fields = {"name": "a", "epoch": 0, "start": 0, "stop": 20, "num_bytes": 20 * 172}
    return _said(Stage(**{**fields, "is_checked": False, **changes}))


GARBAGE = {
    "nothing": b"",
    "noise": random.Random(3).randbytes(5000),
    "half a head": b"vk",
    "half a message": _stage()[:-7],
    "a message without end": _HEAD.pack(b"vkv1", 1 << 31),
    "another message": _said(Answer(objection="no")),
    "no message": _HEAD.pack(b"vkv1", 4) + b"\xff\xff\xff\xff",
    "other fields": _HEAD.pack(b"vkv1", 3) + msgspec.msgpack.encode({"a": 1}),
    "too few bytes": _stage() + b"\0" * 99,
    "too many bytes": _stage() + b"\0" * 9000,
    "another sum": _stage() + b"\0" * 3440 + struct.pack("<4sQ", b"vkvE", 1),
}


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_an_error_and_changes_nothing(channel: str, content: bytes) -> None:
    before = descriptors()
    ours, theirs = connected()
    far = Peer(theirs, channel)
    assert far.cache.geometry.token_format.token_bytes == 172
    arriving = meanwhile(lambda: far.receive("a", 0, 20))
    ours.sendall(content)
    ours.shutdown(socket.SHUT_WR)
    error, *_ = arriving()
    assert "TransferError" in error or "Damaged" in error
    far.abort_receipt("a", 20)
    assert not left(far)
    far.shutdown()
    ours.close()
    assert descriptors() == before


def test_a_sender_is_told_garbage_too() -> None:
    for content in (b"", b"rubbish " * 9, _said(Answer()) + b"rubbish " * 9):
        ours, theirs = connected()
        near = Peer(ours, "copies")
        near.fill("a", 60)
        sending = meanwhile(lambda: near.send("a", 0, 60))  # noqa: B023
        theirs.sendall(content)
        theirs.shutdown(socket.SHUT_WR)
        assert "TransferError" in sending()[0]
        assert not near.channel.is_open
        assert "closed; open another" in near.send("a", 0, 60)[0]
        near.end_sending("a", is_done=False)
        near.close("a")
        assert not left(near)
        near.shutdown()
        theirs.close()


def test_damage_on_the_way_is_found_and_the_stage_may_be_repeated() -> None:
    """By a middleman who turns a bit over, once."""
    (a, b), (c, d) = connected(), connected()
    near, far = Peer(a, "copies", is_checked=True), Peer(d, "copies", is_checked=True)
    near.fill("a", 140)
    turned: list[int] = []

    def pass_on(source: socket.socket, target: socket.socket, turn: bool) -> None:
        while data := bytearray(source.recv(1 << 16)):
            if turn and len(data) > 3000 and not turned:
                turned.append(1)
                data[1500] ^= 4
            target.sendall(data)

    threads = [
        threading.Thread(target=pass_on, args=args, daemon=True)
        for args in ((b, c, True), (c, b, False))
    ]
    for thread in threads:
        thread.start()
    sent, received = stage(near, far, "a", 0, 140)
    assert "other bytes of KV came" in sent[0]
    assert "Damaged" in received[0]
    assert stage(near, far, "a", 0, 140)[0][0] == "''"
    assert far.commit_receipt("a", 140) == near.digest("a")
    near.shutdown(), far.shutdown()
    for thread in threads:
        thread.join(5)
    b.close(), c.close()


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_silent_peer_is_given_up(channel: str) -> None:
    with peers(channel, timeout_s=0.2) as (near, far):
        near.fill("a", 60)
        start_s = time.monotonic()
        assert "silent" in near.send("a", 0, 60)[0]
        assert time.monotonic() - start_s < 5
        assert "silent" in far.receive("b", 0, 60)[0] or not far.channel.is_open


def test_a_peer_that_stops_in_the_middle_is_given_up() -> None:
    ours, theirs = connected()
    near = Peer(ours, "copies", timeout_s=0.3)
    near.fill("a", 140)
    theirs.sendall(_said(Answer()))  # go on, it says, and reads nothing
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    assert "silent" in near.send("a", 0, 140)[0]
    near.end_sending("a", is_done=False)
    near.shutdown()
    theirs.close()


def test_a_stage_can_be_cancelled_before_it_runs_and_while_it_does() -> None:
    with peers("pages") as (near, far):
        near.fill("a", 60)
        outgoing = near.transfers.send(TransferKey("a", 0), near.slots["a"], 60)
        before = descriptors()
        job = near.channel.send(outgoing, 0, 60)
        assert descriptors() > before
        job.cancel()
        job.run()
        assert descriptors() == before
        assert "cancelled" in str(job.error)
        outgoing.abort()
        incoming = far.transfers.receive(TransferKey("a", 0), list(range(60)), by_pages=True)
        job = far.channel.receive(incoming, 0, 60)
        running = meanwhile(job.run)
        time.sleep(0.1)
        assert not job.is_done
        job.cancel()
        assert job.is_done
        job.cancel()
        running()
        assert isinstance(job.error, TransferError)
        incoming.abort()


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_stage_that_does_not_run_leaves_no_fence_behind(
    cuda_standin: StandIn, channel: str
) -> None:
    """Each is an event of CUDA's, which goes when it is waited for."""
    with peers(channel, device="standin") as (near, _):
        near.fill("a", 90)
        before = cuda_standin.held()["num_events"]
        outgoing = near.transfers.send(TransferKey("a", 0), near.slots["a"], 90)
        job = near.channel.send(outgoing, 0, 90)
        job.cancel()
        assert job.is_done
        outgoing.abort()
        assert cuda_standin.held()["num_events"] == before
        if channel == "pages":
            outgoing = near.transfers.send(TransferKey("a", 1), near.slots["a"], 90)
            cuda_standin.refuse_exportable()
            with pytest.raises(DriverError):
                near.channel.send(outgoing, 0, 90)
            outgoing.abort()
            assert cuda_standin.held()["num_events"] == before


# -- descriptors ---------------------------------------------------------------------------------


def test_more_descriptors_than_a_message_holds_take_more_messages() -> None:
    before = descriptors()
    ours, theirs = connected()
    wire.prepare(ours, 5), wire.prepare(theirs, 5)
    sent = [os.dup(0) for _ in range(600)]
    sending = meanwhile(lambda: wire.send_descriptors(ours, sent) or True)
    found = wire.receive_descriptors(theirs, 600)
    sending()
    assert len(found) == 600
    assert not any(os.get_inheritable(fd) for fd in found)
    wire.close_all([*sent, *found])
    ours.close(), theirs.close()
    assert descriptors() == before


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_descriptors_is_refused(count: int) -> None:
    before = descriptors()
    ours, theirs = connected()
    wire.prepare(theirs, 0.2)
    if count:
        wire.send_descriptors(ours, [0] * count)
    else:
        ours.sendall(b"d")
    with pytest.raises(TransferError):
        wire.receive_descriptors(theirs, 2)
    ours.close(), theirs.close()
    assert descriptors() == before


def test_where_no_more_files_may_be_opened_none_is_left_open() -> None:
    before = descriptors()
    ours, theirs = connected()
    wire.prepare(theirs, 1)
    wire.send_descriptors(ours, [0] * 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 8, hard))
    try:
        with pytest.raises(TransferError, match="ulimit"):
            wire.receive_descriptors(theirs, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    ours.close(), theirs.close()
    assert descriptors() == before


def test_many_open_files_are_no_end_of_a_connection() -> None:
    """A slot of a movable cache takes a descriptor: there may be more than `select` knows."""
    with ExitStack() as stack:
        near, far = socket.socketpair()
        stack.enter_context(near)
        low, high = resource.getrlimit(resource.RLIMIT_NOFILE)
        if high != resource.RLIM_INFINITY and high < 2048:
            pytest.skip(f"this process may open {high} files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(low, 2048), high))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (low, high))
        while (number := os.dup(far.fileno())) < 1024:
            stack.callback(os.close, number)
        far.close()
        sock = stack.enter_context(socket.socket(fileno=number))
        near.send(b"x")
        assert wire.wait_for_more(sock)
        assert sock.recv(1) == b"x"
        near.close()
        assert not wire.wait_for_more(sock)
