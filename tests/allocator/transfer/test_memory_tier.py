"""What a tier has, what it copies for it, and that nothing is lost on the way."""

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from allocator_model import (
    KIND,
    NUM_SLOTS,
    FlakyHostDriver,
    Model,
    Request,
    make_cache,
    one_thread,
    visible_words,
)
from vkv.allocator import Exits
from vkv.allocator.transfer import Copier, CopyJob, MemoryTier, copier
from vkv.allocator.transfer.memory_tier import Move
from vkv.allocator.transfer.transfers import Incoming, Outgoing
from vkv.vmem.errors import DriverError, InvalidOperation, OutOfPages, Shortage

__all__ = ["one_thread"]  # a fixture


class Pair:
    """Two caches, a tier between them, and the oracle of the near one."""

    def __init__(self, *, far_rows: float = 4.0, synchronous: bool = False) -> None:
        self.near = make_cache(KIND["even"])
        far = make_cache(KIND["even"], rows=far_rows, max_parked=NUM_SLOTS)
        copier = Copier(self.near.layer(0)[0].device, synchronous=synchronous)
        self.tier = MemoryTier(self.near, far, copier)
        self.model = Model(self.near)

    def request(self, tokens: list[int], variant: str = "") -> Request:
        request = self.model.open(variant)
        assert request is not None
        assert self.model.grow(request, tokens)
        return request

    def leave(self, name: str, request: Request, *, keep: bool = True) -> None:
        """The request lets its slot go, and its tokens move to the tier."""
        store = self.tier.store(name, request.slot, request.tokens, request.variant, keep=keep)
        self.model.close(request)
        if store is not None:
            store.wait()
            self.tier.settle()
        self.check()

    def come_back(self, name: str, tokens: list[int], variant: str = "") -> Request:
        fetch = self.tier.fetch(name, tokens, variant)
        assert fetch is not None
        fetch.wait()
        slot = self.tier.arrive(fetch)
        assert slot is not None
        request = self.model._admit(slot, tokens[: fetch.num_tokens], variant)
        self.check()
        return request

    def check(self) -> None:
        self.model.check()
        self.tier.far.check_invariants()

    def close(self) -> None:
        self.tier.close()
        self.near.shutdown()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def test_tokens_leave_and_come_back(pair: Pair) -> None:
    tokens = list(range(70))
    pair.leave("a", pair.request(tokens))
    assert pair.near.stats().slots_open == pair.near.stats().slots_parked == 0
    assert pair.tier.longest_prefix([*tokens, 1]) == 70
    request = pair.come_back("a", [*tokens, 1])
    assert request.tokens == tokens
    num_ranges = pair.near.geometry.num_ranges
    for moved in (pair.tier.stored, pair.tier.fetched):
        assert (moved.num_moves, moved.num_copies, moved.num_tokens) == (1, num_ranges, 70)


def test_what_has_moved_leaves_nothing_behind(pair: Pair) -> None:
    """Of moves that have ended, none of which anybody asks for again, few are remembered."""

    def num_sides() -> int:
        gc.collect()
        return sum(isinstance(one, Outgoing | Incoming) for one in gc.get_objects())

    before = num_sides()
    for turn in range(100):
        request = pair.request([turn] * 20)
        pair.leave("a", request, keep=False)
        pair.model.close(pair.come_back("a", [turn] * 20))
    assert num_sides() - before < 300  # of 400


def test_the_next_turn_copies_its_increment_alone(pair: Pair) -> None:
    tokens = list(range(70))
    pair.leave("a", pair.request(tokens))
    request = pair.come_back("a", tokens)
    pair.tier.release("a")
    assert pair.model.grow(request, [3] * 20)
    before = pair.tier.stored.num_bytes
    pair.leave("a", request)
    token_bytes = pair.near.geometry.token_format.token_bytes
    assert pair.tier.stored.num_bytes - before == 20 * token_bytes
    assert pair.tier.longest_prefix([*tokens, *[3] * 20]) == 90


def test_what_is_here_is_not_fetched(pair: Pair) -> None:
    tokens = list(range(70))
    request = pair.request(tokens)
    store = pair.tier.store("a", request.slot, tokens, keep=False)
    assert store is not None
    store.wait()
    pair.tier.settle()
    pair.model.park(request, 40)
    before = pair.tier.fetched.num_tokens
    assert pair.come_back("a", tokens).tokens == tokens
    assert pair.tier.fetched.num_tokens - before == 30


def test_variants_stay_apart(pair: Pair) -> None:
    tokens = list(range(70))
    pair.leave("a", pair.request(tokens, "adapter"))
    assert pair.tier.longest_prefix(tokens) == 0
    assert pair.tier.fetch("b", tokens) is None
    assert pair.come_back("a", tokens, "adapter").tokens == tokens


def test_what_one_tenant_left_in_the_tier_no_other_could_see() -> None:
    near = make_cache(KIND["ragged"])
    far = make_cache(KIND["ragged"], max_parked=NUM_SLOTS, sanitize="tenants")
    tier = MemoryTier(near, far, Copier(near.layer(0)[0].device))
    for owner, value, num_tokens in (("ann", 1, 100), ("bob", 2, 3)):
        slot = near.open(owner)
        near.grow(slot, num_tokens)
        for layer in range(len(near.layout.layers)):
            for tensor in near.layer(layer):
                tensor[slot.index, :num_tokens] = value
        store = tier.store(owner, slot, [value] * num_tokens, keep=False)
        assert store is not None
        tier.wait()
        match = far.find([value] * num_tokens)
        assert match is not None
        shown = {v for words in visible_words(far, match.slot) for v in words.unique().tolist()}
        assert shown - {0} == {value}
        tier.drop([value] * num_tokens)
        near.close(slot)
    tier.close()
    near.shutdown()


def test_what_is_kept_for_its_owner_outlives_pressure() -> None:
    pair = Pair(far_rows=2.0)
    pair.leave("kept", pair.request([1] * 140))
    for number in range(4):
        pair.leave(f"other {number}", pair.request([2 + number] * 140), keep=False)
    assert pair.tier.longest_prefix([1] * 140) == 140
    assert pair.tier.longest_prefix([2] * 140) == 0  # the oldest of those that may go
    pair.tier.release("kept")
    for number in range(2):
        pair.leave(f"more {number}", pair.request([9 + number] * 140), keep=False)
    assert pair.tier.longest_prefix([1] * 140) == 0
    pair.close()


def test_a_full_tier_refuses_and_loses_nothing() -> None:
    pair = Pair(far_rows=1.0)
    pair.leave("a", pair.request([1] * 140))
    request = pair.request([2] * 140)
    assert pair.tier.store("b", request.slot, request.tokens, keep=True) is None
    assert pair.tier.stored.num_failed == 1
    assert pair.tier.longest_prefix([1] * 140) == 140
    pair.check()
    pair.close()


def test_without_memory_here_a_fetch_changes_nothing(pair: Pair) -> None:
    pair.leave("a", pair.request([1] * 140))
    others = [pair.request([2 + number] * 140) for number in range(2)]
    with pytest.raises(OutOfPages):
        pair.tier.fetch("a", [1] * 140)
    pair.check()
    pair.model.close(others[0])
    assert len(pair.come_back("a", [1] * 140).tokens) == 140


def test_a_failed_copy_is_undone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise InvalidOperation("no such memory")

    tokens = list(range(70))
    with monkeypatch.context() as patch:
        patch.setattr("vkv.allocator.transfer.copier._copy", fail)
        pair.leave("a", pair.request(tokens))
    assert pair.tier.longest_prefix(tokens) == 0
    assert pair.tier.stored.num_failed == 1
    pair.leave("a", pair.request(tokens))
    with monkeypatch.context() as patch:
        patch.setattr("vkv.allocator.transfer.copier._copy", fail)
        fetch = pair.tier.fetch("a", tokens)
        assert fetch is not None
        fetch.wait()
        assert pair.tier.arrive(fetch) is None
    pair.check()
    assert pair.near.stats().slots_open == 0
    assert pair.come_back("a", tokens).tokens == tokens


def test_a_copy_that_ends_between_two_looks_is_not_lost(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [pair.request([number] * 40) for number in (1, 2)]
    for request in requests:
        store = pair.tier.store("a", request.slot, request.tokens, keep=False)
        assert store is not None
        store.wait()
    with monkeypatch.context() as patch:
        looks = iter([True, False])
        patch.setattr(Move, "is_done", property(lambda _: next(looks, True)))
        pair.tier.settle()
    pair.tier.settle()
    assert not pair.tier.is_storing
    assert [request.slot.num_pins for request in requests] == [0, 0]
    assert pair.tier.far.stats().slots_open == 0
    assert pair.tier.stored.num_moves == 2


def test_without_a_thread_to_spare_copies_are_made_at_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    tokens = list(range(70))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        pair.leave("a", pair.request(tokens))
        assert pair.come_back("a", tokens).tokens == tokens
    assert "copied at once: can't start new thread" in caplog.text
    pair.leave("b", pair.request([3] * 70))  # by the thread that there is now
    assert pair.tier.longest_prefix([3] * 70) == 70


def test_a_cancelled_move_is_undone(pair: Pair) -> None:
    tokens = list(range(70))
    pair.leave("a", pair.request(tokens))
    fetch = pair.tier.fetch("a", tokens)
    assert fetch is not None
    fetch.cancel()
    pair.check()
    assert pair.near.stats().slots_open == 0
    assert pair.come_back("a", tokens).tokens == tokens


def test_to_forget_is_to_hold_nothing(pair: Pair) -> None:
    pair.leave("a", pair.request(list(range(70))))
    assert pair.tier.forget() > 0
    assert pair.tier.far.stats().physical_bytes == 0
    assert pair.tier.longest_prefix(list(range(70))) == 0


def test_other_tokens_are_refused() -> None:
    near, far = make_cache(KIND["even"]), make_cache(KIND["ragged"])
    with near, far, pytest.raises(InvalidOperation, match="cannot be kept as"):
        MemoryTier(near, far, Copier(near.layer(0)[0].device))


# -- when the system refuses ---------------------------------------------------------------------


@pytest.mark.parametrize("which", ["near", "far"])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("fails", ["nothing", "the copy", "cancelled"])
def test_any_call_may_be_refused_while_tokens_leave_and_come_back(
    which: str, short: bool, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in turn, at the ends of moves too: nobody is told twice, and nothing is lost."""
    for call in range(1000):
        drivers = {"near": FlakyHostDriver(), "far": FlakyHostDriver()}
        near = make_cache(KIND["even"], drivers["near"])
        far = make_cache(KIND["even"], drivers["far"], max_parked=NUM_SLOTS)
        tier = MemoryTier(near, far, Copier(near.layer(0)[0].device, synchronous=True))
        model = Model(near)
        request, neighbour = model.open(""), model.open("")
        assert request is not None
        assert neighbour is not None
        assert model.grow(request, [1, *[2] * 99])
        assert model.grow(neighbour, [5] * 40)
        driver = drivers[which]
        driver.fail_after, driver.fail_short = call, short
        _leave_and_come_back(tier, model, request, fails, monkeypatch)
        was_reached = driver.fail_after is None
        driver.fail_after = None
        tier.settle()
        model.check()
        far.check_invariants()
        assert near.stats().slots_open == len(model.live)
        assert far.stats().slots_open == 0
        tier.close()
        near.shutdown()
        for each in drivers.values():
            assert (each.num_pages, each.reserved_bytes) == (0, 0)
            each.close()
        if not was_reached:
            break
    assert call


def _leave_and_come_back(
    tier: MemoryTier, model: Model, request: Request, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine does it, whatever is refused on the way."""
    exits = Exits(tier.near)
    tokens = list(request.tokens)
    tier.store("a", request.slot, tokens, keep=True)
    tier.settle()
    model.live.remove(request)
    exits.let_go(request.slot)
    with monkeypatch.context() as patch:
        if fails == "the copy":
            patch.setattr("vkv.allocator.transfer.copier._copy", _refuse)
        try:
            fetch = tier.fetch("a", [*tokens, 7], num_reserved=120)
        except (Shortage, DriverError):
            fetch = None
    if fetch is not None and fails == "cancelled":
        fetch.cancel()
    elif fetch is not None:
        slot = tier.arrive(fetch)
        assert (slot is None) == (fails == "the copy")
        if slot is not None:
            model._admit(slot, tokens[: fetch.num_tokens])
    tier.release("a")
    exits.retry()


def _refuse(*args: object) -> None:
    raise InvalidOperation("a copy that fails")


def test_a_copy_that_is_given_up_is_over_when_it_says_so(monkeypatch):
    """On a GPU what was launched before is still under way: it is waited for in any case."""
    calls = []
    stream = SimpleNamespace(synchronize=lambda: calls.append("over"))

    def copy(source, target, on):
        calls.append("launched")
        if len(calls) == 2:
            raise RuntimeError("no more")

    monkeypatch.setattr(copier, "_copy", copy)
    piece = torch.zeros(8, dtype=torch.uint8)
    job = CopyJob([[piece], [piece]], [[piece], [piece]], after=SimpleNamespace(wait=lambda: None))
    job.run(stream)
    assert (str(job.error), calls) == ("no more", ["launched", "launched", "over"])
    assert job.is_done


_AT_EXIT = """
from types import SimpleNamespace

from vkv.vmem import stop_at_exit  # before whatever finalises, so that it stops things after that

import torch
from vkv.allocator.transfer import Copier, CopyJob

copier = Copier(torch.device("cpu"))


class Engine:
    def stop(self):
        job = CopyJob([], [], after=SimpleNamespace(wait=lambda: None))
        print(copier.submit(job).wait(5))


engine = Engine()
engine.stop()
stop_at_exit(engine)
"""


def test_who_ends_at_exit_gets_its_last_copies() -> None:
    done = subprocess.run([sys.executable, "-c", _AT_EXIT], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"True\nTrue\n", b"")
