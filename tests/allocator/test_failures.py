"""What is left when a call fails in the middle of things: tried at every call, one by one."""

import pytest
import torch
from allocator_model import (
    KIND,
    MAX_LEN,
    PAGE,
    FlakyHostDriver,
    FlakyStandInDriver,
    Model,
    make_cache,
    one_thread,
)
from vkv.allocator import PagePool, SlotState
from vkv.vmem.errors import DriverError, OutOfPages, OutOfSlots, Shortage

__all__ = ["one_thread"]  # a fixture

ROOMY = {"rows": 12, "num_slots": 8}


@pytest.fixture(params=["host", "standin"])
def make_driver(request):
    """Drivers whose calls can be made to fail, closed after the test."""
    if request.param == "standin":
        request.getfixturevalue("cuda_standin")
    drivers = []

    def make(**options):
        kind = FlakyHostDriver if request.param == "host" else FlakyStandInDriver
        drivers.append(kind(**options))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.fail_after = None
        driver.close()


def everything(cache):
    """All that an operation could change, but for pages created and not yet used."""
    slots = [*cache._table.live.values(), *cache._table.parked]
    driver = cache.pool.driver
    return {
        "slots": {
            slot: (
                slot.index,
                slot.state,
                slot.num_tokens,
                slot.promised_tokens,
                slot.reservation.num_pages,
                [list(pages) for pages in slot.pages],
            )
            for slot in slots
        },
        "tags": {slot: cache._table.parked.num_tokens(slot) for slot in cache._table.parked},
        "free": sorted(cache._table.free),
        "references": dict(cache.pool._references),
        "reserved": cache.pool.num_reserved,
        "page table": dict(driver._page_table),
        "address space": driver.reserved_bytes,
    }


def tokens(count, first=0):
    return [first] * min(1, count) + [1] * (count - 1)


def fail_everywhere(make_driver, kind, prepare, operate, *, exact=True, **options):
    """Let each call that `operate` makes fail in turn; returns how many there were.

    `prepare(model)` sets the stage and returns what `operate(model, staged)` needs. After a
    failure everything is as before (if `exact`) and the same operation succeeds.
    """
    for short in (False, True):
        for call in range(1000):
            driver = make_driver()
            model = Model(make_cache(KIND[kind], driver, **{**ROOMY, **options}))
            staged = prepare(model)
            model.check()
            before = everything(model.cache)
            driver.fail_after, driver.fail_short = call, short
            try:
                operate(model, staged)
            except (DriverError, Shortage):
                if exact:
                    assert everything(model.cache) == before
                model.cache.check_invariants()
                operate(model, staged)
            finished = driver.fail_after is not None
            driver.fail_after = None
            model.cache.check_invariants()
            model.cache.shutdown()
            assert (driver.num_pages, driver.reserved_bytes) == (0, 0)
            assert model.cache.pool.num_reserved == 0
            driver.close()
            if finished:
                break
        assert call, "the operation made no call"


def with_request(model, count):
    request = model.open()
    assert model.grow(request, tokens(count))
    return request


@pytest.mark.parametrize("kind", ["split", "windows", "tiles"])
def test_growing_over_several_ranges(make_driver, kind):
    def operate(model, request):
        model.cache.grow(request.slot, 120)
        model.check_content([])

    fail_everywhere(make_driver, kind, lambda model: with_request(model, 40), operate)


@pytest.mark.parametrize("kind", ["split", "tiles"])
def test_growing_onto_shared_pages_with_recycled_ones(make_driver, kind):
    """The dearest path: shared pages are copied, new ones mapped, and all of them cleared."""

    def prepare(model):
        model.close(with_request(model, MAX_LEN))  # so that there are pages to clear
        parent = with_request(model, MAX_LEN)
        child = model.fork(parent, MAX_LEN)
        model.truncate(parent, 70)
        return parent, child

    def operate(model, staged):
        parent, child = staged
        model.cache.grow(parent.slot, 140)
        model._append(parent, [7] * 70)
        model.check_content([parent, child])
        model.check_isolation()

    fail_everywhere(make_driver, kind, prepare, operate, sanitize="zero")


@pytest.mark.parametrize("kind", ["split", "windows"])
def test_forking(make_driver, kind):
    def operate(model, parent):
        slot = model.cache.fork(parent.slot, 77)
        model.check_content([parent, model._admit(slot, parent.tokens[:77])])

    fail_everywhere(make_driver, kind, lambda model: with_request(model, 100), operate)


def test_a_fork_that_can_neither_be_made_nor_undone_leaves_no_slot_behind(make_driver, monkeypatch):
    """Its pages go with the next reclaim: nobody has a handle to close it with."""
    cache = make_cache(KIND["split"], make_driver(), **ROOMY)
    model = Model(cache)
    parent = with_request(model, 100)

    def copy_and_fail(*_):
        cache.pool.driver.fail_after = 0  # and so does the first unmap
        raise DriverError("injected into copy")

    with monkeypatch.context() as patch:
        patch.setattr(cache._backing, "copy", copy_and_fail)
        with pytest.raises(DriverError):
            cache.fork(parent.slot, 77)
    assert cache.stats().slots_open == 1
    model.check()
    model.trim()
    assert set(cache.pool._references) == {page for pages in parent.slot.pages for page in pages}
    model.check()
    cache.shutdown()


def test_forking_what_is_parked(make_driver):
    def prepare(model):
        model.park(with_request(model, 140), 140)
        return tokens(140)

    def operate(model, parked):
        slot, num_cached = model.cache.adopt(parked[:50])
        assert num_cached == 50
        assert model.cache.stats().slots_parked == 1 or model.cache.pool.driver.fail_short
        model.check_content([model._admit(slot, parked[:50])])

    # A shortage is no failure here: the parked slot is taken over instead.
    fail_everywhere(make_driver, "split", prepare, operate)


def test_taking_over_what_others_share(make_driver):
    """Nothing of a live request may change; of the parked slot, some may be lost."""

    def prepare(model):
        first = with_request(model, 140)
        sharer = model.fork(first, 120)
        model.park(first, 140)
        return sharer

    def operate(model, sharer):
        slot, num_cached = model.cache.adopt([*tokens(90), 5])
        model.check_content([sharer, model._admit(slot, tokens(num_cached))])
        assert not any(model.cache.pool.references(p) > 1 for p in slot.pages[0][num_cached:])

    fail_everywhere(make_driver, "tiles", prepare, operate, exact=False)


def test_parking_when_the_lot_is_full(make_driver):
    def prepare(model):
        for first in range(3):
            request = model.open()
            model.grow(request, tokens(100, first))
            model.park(request, 100)
        return with_request(model, 60)

    def operate(model, request):
        model.cache.park(request.slot, request.tokens)
        assert request.slot.state is SlotState.PARKED
        assert model.cache.stats().slots_parked == 3

    fail_everywhere(make_driver, "split", prepare, operate, exact=False)


@pytest.mark.parametrize("operation", ["close", "truncate"])
def test_closing_and_truncating_can_be_repeated(make_driver, operation):
    def prepare(model):
        parent = with_request(model, 140)
        return parent, model.fork(parent, 120)

    def operate(model, staged):
        parent, child = staged
        if operation == "close":
            model.cache.close(parent.slot)
        elif parent.slot.num_tokens > 30 or parent.slot.num_pages > 4:
            model.cache.truncate(parent.slot, 30)
        model.check_content([child])

    fail_everywhere(make_driver, "split", prepare, operate, exact=False)


@pytest.mark.parametrize("operation", ["trim", "shutdown"])
def test_giving_everything_back_can_be_repeated(make_driver, operation):
    def prepare(model):
        model.park(with_request(model, 140), 130)
        live = with_request(model, 40)
        model.look_ahead(live, 100)
        return live

    def operate(model, live):
        if operation == "trim":
            model.cache.trim()
            model.check_content([live])
        else:
            model.cache.shutdown()

    fail_everywhere(make_driver, "split", prepare, operate, exact=False)


def test_a_failure_of_the_background_job_changes_nothing_and_is_counted(make_driver):
    driver = make_driver()
    cache = make_cache(KIND["split"], driver, **ROOMY)
    model = Model(cache)
    request = with_request(model, 40)
    before = everything(cache)
    driver.fail_after = 2
    cache.look_ahead(request.slot, 120)
    cache._look_ahead.drain()
    assert cache.stats().background_failures == 1
    assert everything(cache) == before
    model.look_ahead(request, 120)
    assert request.slot.ready_tokens >= 120
    cache.shutdown()


# -- shortages -------------------------------------------------------------------------------


def test_a_promise_is_kept_whoever_comes_later():
    model = Model(make_cache(KIND["even"], rows=2))
    first = model.open()
    assert model.reserve(first, MAX_LEN)
    second = with_request(model, MAX_LEN)
    third = model.open()
    assert not model.grow(third, [0])
    assert model.grow(first, tokens(MAX_LEN))
    model.check()
    model.close(second)
    assert model.grow(third, [0])


def test_a_refused_promise_leaves_an_earlier_one_as_it_was():
    model = Model(make_cache(KIND["even"], rows=1.7))
    first, second = model.open(), model.open()
    assert model.reserve(first, 100)
    assert model.reserve(second, 140)
    reserved = first.slot.reservation.num_pages
    with pytest.raises(OutOfPages):
        model.cache.grow(first.slot, MAX_LEN)
    assert (first.slot.reservation.num_pages, first.slot.promised_tokens) == (reserved, 100)
    assert model.grow(first, tokens(100))


class SmallDevice(FlakyHostDriver):
    """A device that runs out of memory before the pool reaches its limit."""

    capacity = 12

    def _create(self, num_pages):
        if self.num_pages + num_pages > self.capacity:
            raise OutOfPages("the device is full")
        return super()._create(num_pages)


def test_where_the_device_is_full_before_the_limit_parked_slots_give_way():
    with SmallDevice() as driver:
        model = Model(make_cache(KIND["even"], driver, rows=9))  # ten pages a row
        parked = with_request(model, 100)
        model.park(parked, 100)
        request = model.open()
        assert model.grow(request, tokens(MAX_LEN, first=2))
        model.check()
        assert not model.cache.stats().slots_parked
        assert not model.grow(model.open(), tokens(100))  # nothing more is to be had
        model.check()


def test_a_fork_without_mappings_to_spare_copies():
    """The parent's pages are scattered, so sharing them would take a mapping for each."""
    with FlakyHostDriver() as driver:
        model = Model(make_cache(KIND["even"], driver, rows=6, max_len=400))
        parent, other = model.open(), model.open()
        for _ in range(5):
            for request in (parent, other):
                assert model.grow(request, [1] * 16)
        driver._max_mappings = driver.num_mappings + 3
        child = model.fork(parent, 80)
        assert child is not None
        model.check()
        assert not set(child.slot.pages[0]) & set(parent.slot.pages[0])
        model.cache.shutdown()


def test_growing_without_mappings_to_spare_unmaps_what_is_parked():
    with FlakyHostDriver() as driver:
        model = Model(make_cache(KIND["even"], driver, rows=8, max_len=400))
        requests = [model.open(), model.open()]
        for _ in range(8):
            for request in requests:
                assert model.grow(request, [1] * 16)
        model.park(requests[0], 128)
        driver._max_mappings = driver.num_mappings
        survivor = model.open()
        assert model.grow(survivor, [2] * 100)
        assert not model.cache.stats().slots_parked
        model.check()
        while model.grow(survivor, [2] * 16) and model.grow(requests[1], [2] * 16):
            model.check()
        assert model.cache.pool.num_available
        model.cache.shutdown()


def test_a_parked_slot_is_not_reclaimed_for_its_own_fork():
    model = Model(make_cache(KIND["even"], rows=1, max_parked=3))
    model.park(with_request(model, 144), 144)
    request = model.adopt(tokens(40))  # aliased, the partial page is copied
    assert request is not None
    assert request.tokens == tokens(40)
    assert model.cache.stats().tokens_parked == 144
    model.check()
    # No page is left for the copy of another partial page: the parked slot itself is taken over.
    second = model.adopt([*tokens(50), 3])
    assert second is not None
    model.check()
    assert model.cache.stats().slots_parked == 0


def test_with_no_slot_left_nothing_parked_is_forked():
    model = Model(make_cache(KIND["even"], num_slots=2, max_parked=2))
    with_request(model, 16)
    parked = with_request(model, 60).slot
    model.park(model.live[-1], 60)
    with pytest.raises(OutOfSlots):
        model.cache.fork(parked, 20)
    request = model.adopt(tokens(20))
    assert request is not None
    with pytest.raises(OutOfSlots, match="all 2 slots"):
        model.cache.open()
    with pytest.raises(OutOfSlots):
        model.cache.fork(request.slot, 1)


# -- the pool by itself ----------------------------------------------------------------------


def test_undoing_a_commit_makes_no_call_that_could_fail():
    """Where a map has failed, the way back must not fail as well."""
    with FlakyHostDriver() as driver:
        pool = PagePool(driver, 8 * PAGE)
        claim = pool.reserve(3)
        pages = pool.commit(claim, 3)
        calls = driver.counters.total()
        pool.restore(claim, pages)
        assert driver.counters.total() == calls
        assert (claim.num_pages, pool.num_reserved, pool.num_held) == (3, 3, 0)


def test_pages_that_the_system_will_not_take_back_are_not_the_pools_any_more():
    with FlakyHostDriver() as driver:
        pool = PagePool(driver, 8 * PAGE)
        claim = pool.reserve(3)
        pool.release(pool.commit(claim, 3))
        driver.fail_after = 0
        with pytest.raises(DriverError):
            pool.trim()
        assert pool.num_created == driver.num_pages == 0
        assert len(pool.commit(pool.reserve(8), 8)) == 8


def test_refill_keeps_to_the_limit_and_to_what_is_asked():
    with FlakyHostDriver() as driver:
        pool = PagePool(driver, 8 * PAGE, low_watermark=2)
        assert pool.refill() == 2
        assert pool.refill() == 0
        assert pool.refill(extra=3) == 3
        assert pool.refill(extra=30) == 3
        assert pool.num_created == 8


def test_the_content_of_recycled_pages_is_finite():
    """Whoever reads beyond the length multiplies by zero: a NaN would not go away."""
    model = Model(make_cache(KIND["even"], rows=1))
    model.close(with_request(model, MAX_LEN))
    slot = model.open().slot
    model.cache.grow(slot, 1)
    keys, _ = model.cache.layer(0)
    assert torch.isfinite(keys[slot.index, :16].float()).all()
