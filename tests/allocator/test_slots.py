"""The rules of slots one by one: adoption, parking, reclaim, sharing, isolation, accounts."""

import signal
import subprocess
import sys

import pytest
import torch
from allocator_model import (
    KIND,
    KINDS,
    MAX_LEN,
    FlakyHostDriver,
    Model,
    make_cache,
    make_paged,
    one_thread,
)
from hypothesis import given
from hypothesis import strategies as st
from vkv.allocator import KVCache, Slot, SlotState
from vkv.allocator.kv_cache import flat_positions
from vkv.allocator.parking import ParkingLot
from vkv.vmem.errors import InvalidConfig, InvalidOperation, OutOfPages, RequestTooLong

__all__ = ["one_thread"]  # a fixture


@pytest.fixture(params=["contiguous", "paged"])
def model(request):
    """A model of either cache, with room to spare; sixteen tokens a page."""
    contiguous = request.param == "contiguous"
    cache = make_cache(KIND["even"], rows=5) if contiguous else make_paged(block_tokens=16, rows=5)
    with cache:
        yield Model(cache)


def with_request(model, tokens):
    request = model.open()
    assert model.grow(request, tokens)
    return request


# -- memory follows the tokens ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_more_pages_than_the_tokens_fill(kind):
    """Pages held are the ceiling of tokens over pages, in each range, at every moment."""
    with make_cache(kind, rows=3, max_parked=0) as cache:
        model = Model(cache)
        layout = cache.layout
        for steps in ([1] * MAX_LEN, [7] * 21, [MAX_LEN]):
            request = model.open()
            for count in steps:
                assert model.grow(request, [1] * count)
                length = request.slot.num_tokens
                tiles = -(-length // layout.over_read_tokens) * layout.over_read_tokens
                for pages, geometry in zip(request.slot.pages, layout.ranges, strict=True):
                    assert len(pages) == -(-tiles * geometry.token_bytes // layout.page_bytes)
            for length in range(len(request.tokens), -1, -13):
                model.truncate(request, length)
                assert tuple(map(len, request.slot.pages)) == layout.pages_per_range(length)
                model.check()
            model.close(request)
            assert cache.pool.num_held == 0


def test_nothing_is_created_before_it_is_needed_and_the_limit_is_kept():
    with FlakyHostDriver() as driver, make_cache(KIND["even"], driver, rows=1) as cache:
        assert driver.num_pages == 0
        slot = cache.open()
        cache.reserve(slot, MAX_LEN)
        assert driver.num_pages == 0
        cache.grow(slot, 17)
        assert driver.num_pages == 2
        other = cache.open()
        with pytest.raises(OutOfPages, match="0 of 10 available"):
            cache.grow(other, 1)
        cache.grow(slot, MAX_LEN)
        assert driver.num_pages == 10
        cache.close(slot)
        assert (driver.num_pages, cache.stats().pages_free) == (10, 10)
        assert cache.trim() == 10 * driver.page_bytes
        assert driver.num_pages == 0


def test_slots_refuse_what_makes_no_sense(model):
    cache = model.cache
    request = with_request(model, [1] * 20)
    for operate, message in [
        (lambda: cache.truncate(request.slot, 21), "use 0 to 20"),
        (lambda: cache.truncate(request.slot, -1), "use 0 to 20"),
        (lambda: cache.fork(request.slot, 21), "cannot fork 21 tokens"),
        (lambda: cache.fork(request.slot, -1), "cannot fork -1 tokens"),
        (lambda: cache.park(request.slot, [1] * 21), "cannot hold the KV of 21"),
        (lambda: cache.close(Slot(0, 1)), "is not open"),
    ]:
        with pytest.raises(InvalidOperation, match=message):
            operate()
    for operate in (cache.grow, cache.reserve):
        with pytest.raises(RequestTooLong, match="do not fit into a slot of 150"):
            operate(request.slot, 151)
    with pytest.raises(InvalidConfig, match="cannot keep -1"):
        make_cache(KIND["even"]).pool.trim(-1)
    model.check()
    cache.grow(request.slot, 7)  # a total that is there already
    assert request.slot.num_tokens == 20


def test_a_slot_of_another_cache_is_not_ours(model):
    with make_cache(KIND["even"], rows=5) as other:
        theirs = Model(other)
        stranger = with_request(theirs, [1] * 20)
        theirs.park(stranger, 20)
        with_request(model, [1] * 20)
        for operate in (
            lambda: model.cache.fork(stranger.slot, 5),
            lambda: model.cache.grow(stranger.slot, 30),
            lambda: model.cache.close(stranger.slot),
        ):
            with pytest.raises(InvalidOperation, match="is not open in this cache"):
                operate()


def test_a_handle_is_spent_once_its_slot_is_let_go(model):
    request = with_request(model, [1] * 40)
    model.park(request, 40)
    adopted = model.adopt([1] * 40)
    assert adopted.slot is not request.slot
    assert adopted.slot.index == request.slot.index
    assert request.slot.state is SlotState.CLOSED
    for operate in (
        lambda: model.cache.grow(request.slot, 50),
        lambda: model.cache.close(request.slot),
        lambda: model.cache.fork(request.slot, 5),
        lambda: model.cache.park(request.slot, [1]),
    ):
        with pytest.raises(InvalidOperation, match="is not open"):
            operate()
    model.check()


# -- adoption --------------------------------------------------------------------------------


def test_the_longest_prefix_is_taken_over_whole(model):
    for tail in (2, 3):
        model.park(with_request(model, [1] * 30 + [tail] * 30), 60)
    assert model.cache.prefix_length([1] * 30 + [3] * 5 + [4]) == 35
    request = model.adopt([1] * 30 + [3] * 5 + [4])
    assert len(request.tokens) == 35
    assert model.cache.stats().tokens_parked == 60
    assert model.cache.prefix_length([1] * 30 + [3] * 5) == 30
    model.check()
    assert model.grow(request, [4] * 40)
    model.check()


def test_a_short_prefix_is_aliased_so_that_the_rest_stays(model):
    model.park(with_request(model, [1] * 140), 140)
    requests = [model.adopt([1] * 69) for _ in range(2)]
    stats = model.cache.stats()
    assert stats.tokens_parked == 140
    assert [len(r.tokens) for r in requests] == [69, 69]
    assert stats.pages_held == 4 + 2  # four full pages are shared, the fifth is copied twice
    model.check()
    whole = model.adopt([1] * 70)  # half of it: taken over
    assert len(whole.tokens) == 70
    assert model.cache.stats().slots_parked == 0
    for request in (*requests, whole):
        assert model.grow(request, [5] * 30)
    model.check()


def test_taking_over_leaves_shared_pages_to_the_others(model):
    parent = with_request(model, [1] * 140)
    child = model.fork(parent, 130)
    model.park(parent, 140)
    request = model.adopt([1] * 100)
    # Page six holds tokens 96 to 111: the child reads what this request would write over.
    assert len(request.tokens) == 96
    assert model.grow(request, [7] * 54)
    model.check()
    assert child.slot.num_tokens == 130


@pytest.mark.parametrize("tile", [1, 64])
def test_growing_after_a_truncation_spares_every_page_that_a_fork_shares(tile):
    """A tile keeps several pages behind the tokens, and the fork may read all of them."""
    kind = KIND["tiles"] if tile > 1 else KIND["ragged"]
    with make_cache(kind, rows=5) as cache:
        model = Model(cache)
        parent = with_request(model, [1] * 128)
        child = model.fork(parent, 128)
        model.truncate(parent, 65)
        assert model.grow(parent, [2] * 63)
        model.check()
        model.truncate(child, 3)
        assert model.grow(child, [3] * 125)
        model.check()


def test_equal_tokens_of_another_variant_are_never_found(model):
    """Neither taken over nor aliased: their KV differs, or belongs to somebody else."""
    model.park(with_request(model, [1] * 100), 100)
    adapted = model.open("adapter")
    assert model.grow(adapted, [1] * 60)
    model.park(adapted, 60)
    cache = model.cache
    lengths = [cache.prefix_length([1] * 100, variant) for variant in ("", "adapter", "salt")]
    assert lengths == [100, 60, 0]
    aliased = model.adopt([1] * 20, "adapter")  # of 60: shared, and not the 100 of the other
    assert len(aliased.tokens) == 20
    assert cache.stats().tokens_parked == 160
    assert len(model.adopt([1] * 100, "salt").tokens) == 0
    assert len(model.adopt([1] * 100, "adapter").tokens) == 60  # taken over
    assert cache.stats().tokens_parked == 100
    model.check()
    assert len(model.adopt([1] * 100).tokens) == 100
    assert cache.stats().tokens_parked == 0
    model.check()


def test_a_fork_and_a_shortened_slot_keep_their_variant():
    with make_cache(KIND["even"], rows=1.5) as cache:  # fifteen pages
        model = Model(cache)
        parent = model.open("adapter")
        assert model.grow(parent, [1] * 96)
        child = model.fork(parent, 96)
        model.close(parent)
        model.park(child, 96)
        assert model.grow(model.open(), [2] * MAX_LEN)  # ten pages: one of the parked slot's goes
        assert cache.prefix_length([1] * 96, "adapter") == 80
        assert cache.prefix_length([1] * 96) == 0
        model.check()


def test_memory_of_any_variant_serves_a_stranger(model):
    for variant in ("a", "b", "c"):
        request = model.open(variant)
        assert model.grow(request, [1] * 40)
        model.park(request, 40)
    request = model.adopt([1] * 40)  # the lot is full
    assert (len(request.tokens), request.slot.num_pages) == (0, 3)
    assert model.cache.stats().slots_parked == 2
    assert model.grow(request, [1] * 40)
    model.check()


def test_without_a_prefix_the_largest_is_taken_over_once_the_lot_is_full(model):
    calls = model.cache.pool.driver.counters
    for length in (20, 90, 50):
        model.park(with_request(model, [length] * length), length)
    before = dict(calls)
    request = model.adopt([1] * 80)
    assert len(request.tokens) == 0
    assert model.grow(request, [1] * 80)
    assert dict(calls) == before  # nothing is mapped, nothing unmapped
    assert sorted(map(model.cache._table.parked.num_tokens, model.cache._table.parked)) == [20, 50]
    model.check()


def test_while_there_is_room_a_stranger_gets_a_fresh_slot(model):
    model.park(with_request(model, [1] * 90), 90)
    request = model.adopt([2] * 80)
    assert request.slot.num_pages == 0
    assert model.cache.stats().tokens_parked == 90


def test_a_lot_of_no_size_parks_nothing():
    with make_cache(KIND["even"], max_parked=0) as cache:
        model = Model(cache)
        request = with_request(model, [1] * 40)
        model.park(request, 40)
        assert request.slot.state is SlotState.CLOSED
        assert cache.pool.num_held == 0


def test_a_slot_without_tokens_is_not_worth_parking(model):
    request = with_request(model, [1] * 40)
    model.park(request, 0)
    assert request.slot.state is SlotState.CLOSED


def test_only_so_many_are_parked_and_the_oldest_goes(model):
    for first in range(5):
        model.park(with_request(model, [first] * 20), 20)
    assert model.cache.stats().slots_parked == 3
    assert [model.cache.prefix_length([first] * 20) for first in range(5)] == [0, 0, 20, 20, 20]


def test_opening_takes_the_place_of_the_oldest_parked():
    with make_cache(KIND["even"], rows=5, num_slots=3, max_parked=3) as cache:
        model = Model(cache)
        for first in range(3):
            model.park(with_request(model, [first] * 20), 20)
        model.open()
        assert [cache.prefix_length([first]) for first in range(3)] == [0, 1, 1]
        model.check()


# -- reclaim ---------------------------------------------------------------------------------


def test_parked_slots_are_shortened_from_their_ends_oldest_first():
    with make_cache(KIND["even"], rows=1.5) as cache:  # fifteen pages
        model = Model(cache)
        for first in (1, 2):
            model.park(with_request(model, [first] * 80), 80)
        request = with_request(model, [3] * 96)  # six pages: five are free, one is taken
        assert cache.prefix_length([1] * 80) == 64
        assert cache.prefix_length([2] * 80) == 80
        assert model.grow(request, [3] * 54)  # four more, all that is left of the oldest
        assert cache.prefix_length([1] * 80) == 0
        assert cache.prefix_length([2] * 80) == 80
        assert cache.stats().slots_parked == 1
        model.check()


def test_ranges_of_unequal_size_lose_no_more_tokens_than_pages_are_needed():
    """A row less of a wide range must not cost a narrow one its only page, and all the tokens."""
    with make_cache(KIND["split"], rows=1) as cache:
        model = Model(cache)
        model.park(with_request(model, [1] * MAX_LEN), MAX_LEN)
        widest = max(map(len, next(iter(cache._table.parked)).pages))
        assert widest > 3
        request = model.open()
        assert model.grow(request, [2])  # a page of each range
        assert cache.prefix_length([1] * MAX_LEN) >= MAX_LEN // 3
        model.check()


def test_a_request_may_use_what_is_mapped_ahead_for_itself():
    """Taken over, a slot may have pages to spare in one range and lack some in another."""
    with make_cache(KIND["split"], rows=19 / 15, num_slots=2, max_parked=2) as cache:
        model = Model(cache)
        parent = with_request(model, [1] * MAX_LEN)
        model.fork(parent, 100)
        model.park(parent, MAX_LEN)
        request = model.adopt([1] * 10)
        # Shared pages of the wide ranges went; the narrow ones shared none, and kept all.
        assert [len(pages) for pages in request.slot.pages] == [0, 2, 0, 1]
        assert cache.layout.pages_per_range(85) == (4, 1, 2, 1)
        cache.pool.reserve(cache.pool.num_available - 5)
        assert model.grow(request, [2] * (85 - len(request.tokens)))
        assert [len(pages) for pages in request.slot.pages] == [4, 1, 2, 1]
        cache.check_invariants()
        model.check_content(model.live)


def test_what_is_obtainable_can_be_had_and_no_more():
    with make_cache(KIND["even"], rows=2) as cache:  # twenty pages
        model = Model(cache)
        parent = with_request(model, [1] * 80)
        model.fork(parent, 64)  # keeps four of the five pages from being reclaimed
        model.park(parent, 80)
        ahead = with_request(model, [2] * 16)
        model.look_ahead(ahead, 48)
        obtainable = cache.num_obtainable()
        assert obtainable == 20 - 4 - 1
        request = model.open()
        with pytest.raises(OutOfPages):
            cache.pool.reserve(obtainable + 1)
        assert model.reserve(request, 10 * 15)
        other = model.open()
        assert not model.reserve(other, 16 * 6)
        assert model.reserve(other, 16 * 5)
        model.check()


def test_a_promise_that_costs_less_than_it_did_frees_the_difference():
    with make_cache(KIND["even"], rows=5) as cache:
        model = Model(cache)
        parent = with_request(model, [1] * 32)
        child = model.fork(parent, 32)
        model.truncate(parent, 24)
        model.reserve(parent, 48)
        assert cache.pool.num_reserved == 2  # a copy of the shared page, and a new one
        model.close(child)
        assert model.grow(parent, [2] * 4)
        assert cache.pool.num_reserved == 1
        model.check()


# -- forks -----------------------------------------------------------------------------------


def test_a_fork_shares_whole_pages_and_copies_the_rest(model):
    parent = with_request(model, [1] * 100)
    child = model.fork(parent, 90)
    assert model.cache.num_whole_pages(90) == 5
    assert child.slot.pages[0][:5] == parent.slot.pages[0][:5]
    assert child.slot.pages[0][5:] != parent.slot.pages[0][5:6]
    assert model.cache.stats().pages_held == 7 + 1
    grandchild = model.fork(child, 90)
    for request, token in ((parent, 2), (child, 3), (grandchild, 4)):
        assert model.grow(request, [token] * 30)
    model.check()
    model.close(parent)
    model.check()
    model.close(child)
    model.check()
    assert model.cache.pool.num_held == 8


def test_a_fork_of_nothing_is_an_open_slot(model):
    parent = with_request(model, [1] * 100)
    child = model.fork(parent, 0)
    assert child.slot.num_pages == 0
    assert model.grow(child, [2] * 20)
    model.check()


@pytest.mark.parametrize("sanitize", ["never", "tenants", "zero"])
@pytest.mark.parametrize("kind", ["even", "tiles", "paged"])
def test_writing_into_a_shared_page_copies_what_is_in_use_of_it(kind, sanitize):
    cache = (
        make_paged(block_tokens=16, rows=5, sanitize=sanitize)
        if kind == "paged"
        else make_cache(KIND[kind], rows=5, sanitize=sanitize)
    )
    with cache:
        model = Model(cache)
        model.close(with_request(model, [9] * MAX_LEN))  # pages with a stranger's content
        parent = with_request(model, [1] * 128)  # whole pages, and all of them shared
        child = model.fork(parent, 128, "another")
        for request in (parent, child):
            model.truncate(request, 120)
            assert model.grow(request, [2])
            model.check()
            if sanitize != "never":
                model.check_isolation()


# -- isolation -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KIND, "paged"])
def test_a_new_owner_finds_zeros_behind_its_tokens(kind):
    """Whichever way the memory came to it: recycled, taken over, aliased, trimmed, ahead."""
    cache = (
        make_paged(sanitize="zero")
        if kind == "paged"
        else make_cache(KIND[kind], sanitize="zero", rows=2.5, low_watermark=2)
    )
    with cache:
        model = Model(cache)
        for first in range(3):
            request = with_request(model, [first] * MAX_LEN)
            model.check_isolation()
            model.park(request, MAX_LEN)
            taken = model.adopt([first] * 100)
            model.check_isolation()
            model.park(taken, 100)
            aliased = model.adopt([first] * 33)
            model.check_isolation()
            model.grow(aliased, [9] * 40)
            model.look_ahead(aliased, 120)
            model.check_isolation()
            model.close(aliased)
            model.trim()
        model.check()


@pytest.mark.parametrize("kind", ["tiles", "paged"])
def test_memory_is_cleared_for_another_owner_alone(kind, monkeypatch):
    cache = (
        make_paged(sanitize="tenants", rows=2)
        if kind == "paged"
        else make_cache(KIND[kind], sanitize="tenants", rows=2)
    )
    cleared = []
    for name in ("_clear_pages", "_clear_behind"):
        clear = getattr(cache._backing, name)
        monkeypatch.setattr(
            cache._backing, name, lambda *a, clear=clear: (cleared.append(a), clear(*a))
        )
    with cache:
        model = Model(cache)
        for number in range(6):  # parked, taken over, closed, recycled: all of one owner
            request = model.adopt([number] * MAX_LEN)
            assert model.grow(request, [number] * MAX_LEN)
            assert model.park(request, MAX_LEN) if number % 2 else model.close(request)
        assert not cleared
        for number, owner in enumerate(["ann", "bob", "ann", "bob"]):
            request = model.adopt([9, number] * 20, "", owner)
            assert model.grow(request, [number] * 90)
            model.check_isolation()
            assert model.park(request, 70) if number % 2 else model.close(request)
        assert cleared
        model.check()


def test_without_the_policy_old_content_shows():
    """The test above can fail: this is what it looks for."""
    with make_cache(KIND["even"]) as cache:
        model = Model(cache)
        model.close(with_request(model, [1] * MAX_LEN))
        with_request(model, [2])
        with pytest.raises(AssertionError):
            model.check_isolation()


TOUCH = """
import torch
from vkv.allocator import KVCache, KVLayout, LayerGeometry, PagePool
from vkv.vmem import HostDriver

layer = LayerGeometry(num_kv_heads=1, key_dim=64, value_dim=64)
layout = KVLayout((layer,) * 2, torch.float32, 256, 4096)  # four tokens a page
cache = KVCache(layout, PagePool(HostDriver(4096), 1 << 20), num_slots=3)
keys, values = cache.layer(1)
slot, other = cache.open(), cache.open()
cache.grow(slot, 100)
cache.grow(other, 256)
keys[slot.index, :100] = 1
{operation}
print("before", flush=True)
print(float(keys[{row}, {token}].sum()))
"""


def touch(operation, row, token):
    code = TOUCH.format(operation=operation, row=row, token=token)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)


@pytest.mark.parametrize(
    ("operation", "row", "token"),
    [
        ("", "slot.index", 100),
        ("", 2, 0),  # a slot that nobody has opened
        ("cache.truncate(slot, 50)", "slot.index", 52),
        ("cache.close(slot)", "slot.index", 0),
        ("cache.park(slot, [1] * 100); cache.trim()", "slot.index", 0),
    ],
)
def test_what_is_not_backed_faults(operation, row, token):
    done = touch(operation, row, token)
    assert done.stdout == b"before\n"
    assert done.returncode == -signal.SIGSEGV


def test_what_is_backed_does_not_fault():
    done = touch("", "slot.index", 99)
    assert (done.returncode, done.stdout) == (0, b"before\n64.0\n")


# -- where tokens are ------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=6))
def test_flat_positions(spans):
    starts, counts = [s for s, _ in spans], [c for _, c in spans]
    expected = [p for start, count in spans for p in range(start, start + count)]
    found = flat_positions(starts, counts)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_locating_nothing(model):
    rows, positions = model.cache.locate([], [], [])
    assert rows.dtype == positions.dtype == torch.int64
    assert rows.shape == positions.shape == (0,)


def test_block_tables_lead_to_the_same_places():
    with make_paged(block_tokens=7) as cache:
        model = Model(cache)
        requests = [with_request(model, [first] * (20 + 30 * first)) for first in range(3)]
        slots = [request.slot for request in requests]
        tables = cache.block_tables(slots)
        assert tables.dtype == torch.int32
        assert tables.shape == (3, 12)
        keys, _ = cache.layer(0)
        for row, request in enumerate(requests):
            length = len(request.tokens)
            gathered = keys[tables[row].long()].flatten(0, 1)[:length]
            where = cache.locate([request.slot], [0], [length])
            assert torch.equal(gathered, keys[where])
        used = tables[2].tolist()
        assert used != sorted(used)  # scattered
        assert cache.block_tables([]).shape == (0, 0)
    assert KVCache.block_tables(cache, []) is None


def test_a_paged_pool_is_there_from_the_start_and_stays():
    with make_paged(rows=1) as cache:
        size = cache.pool.limit_pages * cache.layout.page_bytes
        assert cache.stats().physical_bytes == cache.virtual_bytes == size
        assert cache.trim() == 0
        assert cache.stats().physical_bytes == size


# -- policy ----------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=6),
    st.lists(st.integers(0, 2), max_size=8),
)
def test_the_best_prefix_is_the_longest_and_the_latest_of_equals(parked, wanted):
    lot = ParkingLot()
    lot.add(Slot(len(parked), 1), wanted, "of another variant")
    assert lot.best_prefix(wanted) is None
    lot.remove(lot.oldest())
    slots = [Slot(index, 1) for index in range(len(parked))]
    for slot, tokens in zip(slots, parked, strict=True):
        lot.add(slot, tokens)

    def common(tokens):
        return next(
            (i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b),
            min(len(tokens), len(wanted)),
        )

    match = lot.best_prefix(wanted)
    longest = max(map(common, parked), default=0)
    if not longest:
        assert match is None
        return
    latest = max(i for i, tokens in enumerate(parked) if common(tokens) == longest)
    assert match.slot is slots[latest]
    assert match.num_tokens == longest
    assert match.num_parked_tokens == len(parked[latest])
    lot.shorten(match.slot, 1)
    assert lot.num_tokens(match.slot) == 1
    assert lot.oldest() is slots[0]
    lot.remove(match.slot)
    assert match.slot not in lot
    assert list(lot) == [slot for slot in slots if slot is not match.slot]


# -- accounts --------------------------------------------------------------------------------


def test_stats_tell_held_ahead_parked_and_free_apart():
    with make_cache(KIND["even"], rows=5) as cache:
        model = Model(cache)
        model.park(with_request(model, [1] * 48), 40)
        live = with_request(model, [2] * 40)
        model.fork(live, 32)
        model.look_ahead(live, 80)
        model.reserve(live, 112)
        stats = cache.stats()
        assert (stats.pages_held, stats.pages_ahead, stats.pages_parked) == (3, 2, 3)
        assert (stats.pages_reserved, stats.pages_free, stats.pages_limit) == (2, 0, 50)
        assert (stats.tokens_held, stats.tokens_parked) == (72, 40)
        assert (stats.slots_open, stats.slots_parked) == (2, 1)
        assert stats.physical_bytes == 8 * stats.page_bytes
        assert stats.growth_tokens == 16
        assert stats.driver_calls["map"] > 0
        assert stats.mapping_time_s > 0
        assert stats.num_mappings == cache.pool.driver.num_mappings


class Unread(list):
    """A list that may be measured, and tells nothing else."""

    def __iter__(self):
        raise AssertionError("the pages are listed")

    def __getitem__(self, key):
        raise AssertionError("a page is looked up")


def test_no_count_lists_pages(model):
    cache = model.cache
    model.park(with_request(model, [1] * 48), 40)
    live = with_request(model, [2] * 40)
    model.look_ahead(live, 80)
    assert model.grow(live, [2] * 40)  # within what is mapped: the pages ahead are needed now
    model.grow(model.fork(live, 32), [3])
    expected = (cache.num_obtainable(), cache._supply.reclaimable_bytes(), cache.stats())
    for slot in (*cache._table.live.values(), *cache._table.parked):
        slot.pages = [Unread(pages) for pages in slot.pages]
    found = (cache.num_obtainable(), cache._supply.reclaimable_bytes(), cache.stats())
    assert found[:2] == expected[:2]
    assert (found[2].pages_held, found[2].pages_ahead, found[2].pages_parked) == (6, 0, 3)
    for slot in (*cache._table.live.values(), *cache._table.parked):
        slot.pages = [list.copy(pages) for pages in slot.pages]


@pytest.mark.parametrize(
    "tamper",
    [
        lambda cache, slot: slot.pages[0].pop(),
        lambda cache, slot: slot.pages[0].append(slot.pages[0][0]),
        lambda cache, slot: cache._table.free.pop(),
        lambda cache, slot: cache.pool._references.pop(slot.pages[0][0]),
        lambda cache, slot: setattr(slot, "promised_tokens", MAX_LEN),
        lambda cache, slot: setattr(slot, "ready_tokens", MAX_LEN),
        lambda cache, slot: setattr(slot, "num_tokens", MAX_LEN),
        lambda cache, slot: setattr(slot, "num_tokens", 8),  # its third page is not needed then
        lambda cache, slot: cache._backing.ledger._counts.reverse(),
        lambda cache, slot: cache._backing.ledger._uses.popitem(),
        lambda cache, slot: setattr(slot, "state", SlotState.PARKED),
        lambda cache, slot: setattr(cache.pool, "_num_reserved", -1),
        lambda cache, slot: cache.pool._free.append(slot.pages[0][0]),
        lambda cache, slot: cache.pool.driver.unmap(cache._backing._range_address(slot, 0), 4096),
    ],
)
def test_the_recount_sees_what_is_wrong(tamper):
    driver = FlakyHostDriver()
    cache = make_cache(KIND["even"], driver, rows=5)
    slot = cache.open()
    cache.grow(slot, 40)
    cache.check_invariants()
    tamper(cache, slot)
    with pytest.raises(AssertionError):
        cache.check_invariants()
    cache._finalizer.detach()  # what was tampered with cannot be given back
    driver.close()
