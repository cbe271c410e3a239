"""Segments in another process: attended there, over a socket, beside what that process does."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vkv.allocator import KVCache, KVLayout, LayerGeometry, PagePool, Slot
from vkv.allocator.transfer.channels import wire
from vkv.attention_backends import (
    AttentionBatch,
    LayerAttention,
    PartialAttention,
    PastBatch,
    partial_attention,
)
from vkv.attention_backends.native import NativeBackend
from vkv.attention_backends.reference import ReferenceBackend
from vkv.runtime.model.segments import (
    HolderLost,
    LocalHolder,
    Place,
    RemoteHolder,
    SegmentedAttention,
    SegmentServer,
)
from vkv.runtime.model.segments.messages import Ask, AskedBatch, Said, Told
from vkv.vmem import open_driver
from vkv.vmem.errors import DriverError, InvalidOperation

HEADS, KV_HEADS, DIM, PART = 8, 2, 32, 512
LAYERS = (LayerAttention(scale=DIM**-0.5), LayerAttention(scale=DIM**-0.5, window=900))

pytestmark = pytest.mark.skipif(
    NativeBackend.unavailable_reason() is not None, reason="no C compiler, no built kernels"
)


def make_cache(num_tokens: int = 4096) -> KVCache:
    """Two layers, for several slots of so many tokens together."""
    page_bytes = 16 << 10
    geometry = tuple(
        LayerGeometry(num_kv_heads=KV_HEADS, key_dim=DIM, value_dim=DIM, window=layer.window)
        for layer in LAYERS
    )
    layout = KVLayout(geometry, torch.float32, 8192, page_bytes, layers_per_range=1)
    pool = PagePool(open_driver("cpu", page_bytes), layout.num_pages(num_tokens) * page_bytes)
    return KVCache(layout, pool, num_slots=8)


def tokens_of(sequence: int, layer: int, start: int, stop: int) -> tuple[torch.Tensor, ...]:
    """Keys and values of a sequence's tokens, the same in every process."""
    generator = torch.Generator().manual_seed(100 * sequence + layer)
    both = torch.randn(2, 8192, KV_HEADS, DIM, generator=generator)
    return both[0, start:stop], both[1, start:stop]


def fill(cache: KVCache, sequence: int, start: int, stop: int) -> Slot:
    """A slot whose first rows are these tokens of a sequence."""
    slot = cache.open()
    cache.grow(slot, stop - start)
    for layer in range(len(LAYERS)):
        for tensor, rows in zip(
            cache.layer(layer), tokens_of(sequence, layer, start, stop), strict=True
        ):
            tensor[slot.index, : stop - start] = rows
    return slot


def native() -> PartialAttention:
    return partial_attention(NativeBackend())


def make_server(cache: KVCache, **options: Any) -> SegmentServer:
    return SegmentServer(cache, native(), LAYERS, torch.float32, **options)


def own_batch(cache: KVCache, chunks: list[tuple[int, int, int]]) -> AttentionBatch:
    """Of (queries, own tokens, slot)."""
    counts, lengths, slots = (list(column) for column in zip(*chunks, strict=True))
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    nowhere = torch.empty(0, dtype=torch.int64)
    return AttentionBatch(
        query_lens=tuple(counts),
        kv_lens=tuple(lengths),
        slots=tuple(slots),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
        seqused_k=torch.tensor(lengths, dtype=torch.int32),
        slot_ids=torch.tensor(slots, dtype=torch.int32),
        write_index=(nowhere, nowhere),
    )


def dense(query: torch.Tensor, layer: int, sequences: list[tuple[int, int, int]]) -> torch.Tensor:
    """Over all tokens of (sequence, queries, tokens) in one slot each, with the same kernel."""
    length = max(total for *_, total in sequences)
    caches = [
        torch.stack([tokens_of(s, layer, 0, length)[kind] for s, *_ in sequences])
        for kind in (0, 1)
    ]
    batch = own_batch(make_cache(), [(n, total, i) for i, (_, n, total) in enumerate(sequences)])
    return NativeBackend().forward(query, *caches, batch, LAYERS[layer])


@pytest.fixture
def pair() -> Iterator[tuple[SegmentServer, RemoteHolder]]:
    """A server on a thread, and an owner's end."""
    with make_cache() as cache:
        server = make_server(cache)
        theirs, ours = socket.socketpair()
        server.serve(theirs)
        holder = RemoteHolder("far", ours, timeout_s=5)
        yield server, holder
        holder.close()
        server.close()
        cache.check_invariants()
        assert not cache.stats().pages_held


def lend(server: SegmentServer, sequence: int, start: int, stop: int) -> int:
    cache = server.cache
    slot = fill(cache, sequence, start, stop)
    number = server.lend(slot, start, stop - start)
    cache.close(slot)  # a loan keeps it
    return number


# -- results ---------------------------------------------------------------------------------


def test_two_sequences_over_four_places_have_the_bits_of_one_slot(
    pair: tuple[SegmentServer, RemoteHolder],
) -> None:
    server, remote = pair
    with make_cache() as near, make_cache() as far:
        holders = {"far": remote, "tier": LocalHolder(far, native())}
        attention = SegmentedAttention(native(), holders)
        places = [
            [
                Place("far", lend(server, 1, 0, 1024), 0, 1024),
                Place("tier", fill(far, 1, 1024, 1536).index, 1024, 1536),
                Place("far", lend(server, 1, 1536, 2048), 1536, 2048),
            ],
            [Place("far", lend(server, 2, 0, 512), 0, 512)],
            [],
        ]
        slots = [fill(near, 1, 2048, 2100), fill(near, 2, 512, 700), fill(near, 3, 0, 40)]
        lengths = (52, 188, 40)
        counts, positions = (1, 60, 3), (2099, 640, 37)
        chunks = list(zip(counts, lengths, (slot.index for slot in slots), strict=True))
        step = attention.step(own_batch(near, chunks), positions, places)
        for layer, wanted in enumerate(LAYERS):
            query = torch.randn(sum(counts), HEADS, DIM)
            out = step.attend(layer, query, *near.layer(layer), wanted)
            whole = [(1, 1, 2100), (2, 60, 700), (3, 3, 40)]
            assert torch.equal(out, dense(query, layer, whole))
        assert remote.sent_bytes == 2 * (2 * 1 + 60) * HEADS * DIM * 4  # queries alone
        assert remote.received_bytes < 2 * 64 * HEADS * (DIM + 2) * 4 * 3


def test_any_backend_has_several_segments_of_one_sequence_at_one_holder() -> None:
    """By log-sum-exp, a message a layer for all of them."""
    partial = partial_attention(ReferenceBackend())
    with make_cache() as near, make_cache() as far:
        attention = SegmentedAttention(partial, {"tier": LocalHolder(far, partial)})
        stretches = [(0, 100), (100, 101), (101, 800)]
        places = [[Place("tier", fill(far, 1, a, b).index, a, b) for a, b in stretches]]
        own = own_batch(near, [(4, 20, fill(near, 1, 800, 820).index)])
        step = attention.step(own, (816,), places)
        query = torch.randn(4, HEADS, DIM)
        out = step.attend(0, query, *near.layer(0), LAYERS[0])
        torch.testing.assert_close(out, dense(query, 0, [(1, 4, 820)]))


def test_tokens_are_taken_in_and_attended(pair: tuple[SegmentServer, RemoteHolder]) -> None:
    server, holder = pair
    with make_cache() as near:
        slot = fill(near, 1, 0, 1024)
        loans = [holder.take(near.spans(slot, at, at + 512), at, 512) for at in (0, 512)]
        assert loans == [1, 2]
        expected = lend(server, 1, 512, 1024)
        assert torch.equal(ask(holder, 2, 512, 1024), ask(holder, expected, 512, 1024))
        held = server.cache.stats().physical_bytes
        holder.give_back(1)
        holder.give_back(9)  # nobody's
        wait_until(lambda: 1 not in server.loans)
        server.cache.trim()
        assert server.cache.stats().physical_bytes < held
        holder.close()
        wait_until(lambda: list(server.loans) == [expected])  # what an owner lent goes with it


def test_what_comes_back_is_what_was_taken(pair: tuple[SegmentServer, RemoteHolder]) -> None:
    server, holder = pair
    with make_cache() as near:
        slot, back = fill(near, 1, 0, 1024), near.open()
        near.grow(back, 300)
        loan = holder.take(near.spans(slot, 0, 1024), 0, 1024)
        assert loan is not None
        holder.fetch(near.spans(back, 0, 300), loan, 512, 300)
        for layer in range(len(LAYERS)):
            for tensor in near.layer(layer):
                assert torch.equal(tensor[back.index, :300], tensor[slot.index, 512:812])
        server.call_back(loan)
        with pytest.raises(HolderLost, match="called back") as lost:
            holder.fetch(near.spans(back, 0, 300), loan, 0, 300)
        assert lost.value.loans == (loan,)
        assert holder.take(near.spans(slot, 0, 512), 0, 512) is not None  # both are in step
        with pytest.raises(HolderLost):
            holder.fetch(near.spans(back, 0, 300), loan + 1, 400, 300)  # beyond its end


def test_an_owner_has_time_to_take_away_what_is_called_back() -> None:
    with make_cache(600) as cache, make_cache() as near:
        server = make_server(cache, notice_s=60.0, pause_s=60.0)
        theirs, ours = socket.socketpair()
        server.serve(theirs)
        holder = RemoteHolder("far", ours)
        loan = holder.take(near.spans(fill(near, 1, 0, 512), 0, 512), 0, 512)
        assert loan is not None
        ask(holder, loan)
        assert not holder.wanted
        assert not server.give_way()
        assert server.is_leaving
        ask(holder, loan)  # it is there still
        assert holder.wanted == (loan,)
        assert holder.answer_s is None  # of two asks in two layers
        for _ in range(8):
            ask(holder, loan)
        assert holder.answer_s is not None
        holder.give_back(loan)
        wait_until(lambda: not server.is_leaving)
        assert server.give_way()  # what was called has left: there may be enough
        assert not server.give_way()
        holder.close()
        server.close()


def test_who_has_no_room_says_so_and_keeps_nothing() -> None:
    with make_cache(600) as cache, make_cache() as near:
        server = make_server(cache, limit_tokens=512, pause_s=0.2)
        theirs, ours = socket.socketpair()
        server.serve(theirs)
        holder = RemoteHolder("far", ours)
        slot = fill(near, 1, 0, 2048)
        assert holder.take(near.spans(slot, 0, 1024), 0, 1024) is None  # more than the limit
        assert holder.take(near.spans(slot, 0, 512), 0, 512) == 1
        assert holder.take(near.spans(slot, 512, 1024), 512, 512) is None
        assert server.give_way()
        assert not server.give_way()
        assert holder.take(near.spans(slot, 0, 512), 0, 512) is None  # one was called back just now
        wait_until(lambda: holder.take(near.spans(slot, 0, 512), 0, 512) == 2)
        server.forget()
        fill(cache, 2, 0, 300)
        assert holder.take(near.spans(slot, 0, 512), 0, 512) is None  # no memory
        assert len(server.loans) == 0
        holder.close()
        server.close()
        assert cache.stats().slots_open == 1
        cache.check_invariants()


def test_a_creditor_keeps_room_for_its_own() -> None:
    with make_cache(600) as cache, make_cache() as near:
        server = make_server(cache, spare_tokens=200)
        theirs, ours = socket.socketpair()
        server.serve(theirs)
        holder = RemoteHolder("far", ours)
        slot = fill(near, 1, 0, 512)
        assert holder.take(near.spans(slot, 0, 512), 0, 512) is None
        assert holder.take(near.spans(slot, 0, 256), 0, 256) == 1
        holder.close()
        server.close()


def wait_until(is_true: Callable[[], bool]) -> None:
    for _ in range(500):
        if is_true():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


# -- what goes wrong -----------------------------------------------------------------------------


def ask(holder: RemoteHolder, loan: int, start: int = 0, stop: int = 512) -> torch.Tensor:
    """One query over one loan, in both layers."""
    batch = PastBatch(
        query_lens=(1,), positions=(600,), key_starts=(start,), key_stops=(stop,), slots=(loan,)
    )
    query, partial = torch.ones(1, HEADS, DIM), native()
    results = partial.empty(query, partial.num_past_rows(batch), DIM)
    for layer, wanted in enumerate(LAYERS):
        holder.attend(layer, query, batch, wanted, results).wait()
    return results


def _refuse_to_close(monkeypatch: pytest.MonkeyPatch, cache: KVCache, times: int) -> None:
    """Have the system refuse to take slots of a cache back, so many times."""
    close, refusals = cache.close, iter(range(times))

    def flaky(slot: Slot) -> None:
        if next(refusals, None) is not None:
            raise DriverError("injected")
        close(slot)

    monkeypatch.setattr(cache, "close", flaky)


def test_what_the_system_does_not_take_back_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_cache(1100) as cache, make_cache() as near:
        server = make_server(cache)
        theirs, ours = socket.socketpair()
        server.serve(theirs)
        holder = RemoteHolder("far", ours)
        slot = fill(near, 1, 0, 1024)
        _refuse_to_close(monkeypatch, cache, 2)
        loan = holder.take(near.spans(slot, 0, 512), 0, 512)
        assert loan is not None
        holder.give_back(loan)
        wait_until(lambda: not server.loans)
        assert cache.stats().slots_open == 1  # which is nobody's
        assert not server.give_way()  # nor is it to be had at once
        assert server.give_way()
        assert cache.stats().slots_open == 0

        _refuse_to_close(monkeypatch, cache, 1)
        loan = holder.take(near.spans(slot, 0, 512), 0, 512)
        assert loan is not None
        holder.give_back(loan)
        assert holder.take(near.spans(slot, 0, 1024), 0, 1024) is not None  # which needs its memory
        holder.close()
        server.close()
        assert cache.stats().slots_open == 0
        cache.check_invariants()


def test_a_loan_that_was_called_back_is_lost(pair: tuple[SegmentServer, RemoteHolder]) -> None:
    server, holder = pair
    loan = lend(server, 1, 0, 512)
    ask(holder, loan)
    held = server.cache.stats().physical_bytes
    server.call_back(loan)
    server.call_back(loan)
    server.cache.trim()
    assert server.cache.stats().physical_bytes < held
    other = lend(server, 2, 0, 512)
    with pytest.raises(HolderLost, match=r"'far' are lost: loans \(1,\) were called back") as lost:
        ask(holder, loan)
    assert (lost.value.holder, lost.value.loans) == ("far", (loan,))
    ask(holder, other)  # which is as it was


def test_nobody_reads_beyond_a_loan(pair: tuple[SegmentServer, RemoteHolder]) -> None:
    server, holder = pair
    loan = lend(server, 1, 0, 512)
    with pytest.raises(HolderLost, match="tokens 0 to 1024 are not those of loan") as lost:
        ask(holder, loan, stop=1024)
    assert lost.value.loans is None
    with pytest.raises(HolderLost, match="closed before"):
        ask(holder, loan)


def test_a_server_outlives_garbage(pair: tuple[SegmentServer, RemoteHolder]) -> None:
    server, holder = pair
    loan = lend(server, 1, 0, 512)
    nothing = AskedBatch((1, 1), (600,), (0,), (512,), (loan,))
    for message in (
        Said(Ask(layer=0, num_heads=HEADS)),
        Said(Ask(layer=9, num_heads=HEADS, batch=AskedBatch((1,), (600,), (0,), (512,), (loan,)))),
        Said(Ask(layer=0, num_heads=HEADS, batch=nothing)),
        Told(objection="no ask at all"),
    ):
        theirs, ours = socket.socketpair()
        server.serve(theirs)
        with ours:
            wire.prepare(ours, 5)
            wire.send_message(ours, message)
            assert ours.recv(1) == b""  # it hangs up
    assert ask(holder, loan).isfinite().all()


def test_owners_are_served_at_once(pair: tuple[SegmentServer, RemoteHolder]) -> None:
    server, _ = pair
    loan = lend(server, 1, 0, 512)
    found: list[torch.Tensor] = []

    def own() -> None:
        theirs, ours = socket.socketpair()
        server.serve(theirs)
        holder = RemoteHolder("far", ours)
        found.extend(ask(holder, loan) for _ in range(10))
        holder.close()

    threads = [threading.Thread(target=own) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert all(torch.equal(one, found[0]) for one in found)


_PEER = """
import socket, sys, time
sys.path.insert(0, {support!r}); sys.path.insert(0, {here!r})
import test_segments as t
cache = t.make_cache()
server = t.make_server(cache)
sock = socket.socket(fileno=int(sys.argv[1]))
assert t.lend(server, 1, 0, 512) == 1
server.serve(sock)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_holder_that_dies_or_falls_silent_is_noticed(how: signal.Signals) -> None:
    here = os.path.dirname(__file__)
    code = _PEER.format(support=os.path.join(here, "../../support"), here=here)
    theirs, ours = socket.socketpair()
    with theirs:
        peer = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
        )
    try:
        assert peer.stdout is not None
        assert peer.stdout.readline() == b"ready\n"
        holder = RemoteHolder("peer", ours, timeout_s=1)
        with make_cache() as cache:
            server = make_server(cache)
            local, end = socket.socketpair()
            server.serve(local)
            near = RemoteHolder("far", end)
            expected = ask(near, lend(server, 1, 0, 512))
            near.close()
            server.close()
        assert torch.equal(ask(holder, 1), expected)  # another process, the same bits
        os.kill(peer.pid, how)
        start_s = time.monotonic()
        with pytest.raises(HolderLost):
            _keep_asking(holder)
        assert time.monotonic() - start_s < 60  # not for ever
    finally:
        peer.kill()
        peer.wait()
        assert peer.stdout is not None
        peer.stdout.close()


def _keep_asking(holder: RemoteHolder) -> None:
    for _ in range(100):
        ask(holder, 1)


def test_what_is_not_there_is_not_lent() -> None:
    with make_cache() as cache:
        server = make_server(cache)
        slot = fill(cache, 1, 0, 512)
        with pytest.raises(InvalidOperation, match="cannot pin 600 tokens"):
            server.lend(slot, 0, 600)
        server.close()
