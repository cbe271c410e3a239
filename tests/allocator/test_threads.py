"""The background thread, several callers at once, work in flight, and how a cache ends."""

import gc
import logging
import random
import subprocess
import sys
import threading
import time
import weakref

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
    make_paged,
    one_thread,
)
from vkv.allocator import PagePool, SlotState
from vkv.allocator.look_ahead import LookAhead
from vkv.vmem import janitor
from vkv.vmem.errors import DriverError, InvalidOperation, Shortage

__all__ = ["one_thread"]  # a fixture

PATIENCE_S = 20  # only a test that fails waits as long


def look_ahead_threads():
    return [t for t in threading.enumerate() if t.name == "vkv-look-ahead"]


def collect():
    """What nobody has any more goes, and what that left to the janitor is done."""
    gc.collect()
    assert janitor.drain(PATIENCE_S)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    for thread in look_ahead_threads():
        thread.join(PATIENCE_S)
    assert not look_ahead_threads()


class SlowDriver(FlakyHostDriver):
    """Creates pages only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go_on = threading.Event(), threading.Event()

    def _create(self, num_pages):
        if threading.current_thread().name == "vkv-look-ahead":
            self.reached.set()
            self.go_on.wait(PATIENCE_S)
        return super()._create(num_pages)


# -- look-ahead ------------------------------------------------------------------------------


def test_memory_is_mapped_ahead_and_growth_finds_it():
    with FlakyHostDriver() as driver, make_cache(KIND["split"], driver, rows=5) as cache:
        slot = cache.open()
        cache.grow(slot, 10)
        cache.look_ahead(slot, 100)
        cache._look_ahead.drain()
        assert slot.ready_tokens >= 100
        assert slot.num_tokens == slot.promised_tokens == 10
        assert not slot.reservation.num_pages
        assert cache.stats().pages_ahead > 0
        assert cache.stats().background_time_s > 0
        calls = driver.counters.total()
        cache.grow(slot, 100)
        assert driver.counters.total() == calls
        cache.check_invariants()


def test_mapping_ahead_takes_only_what_is_to_spare():
    with make_cache(KIND["even"], rows=1) as cache:  # ten pages
        model = Model(cache)
        parked, live, other = model.open(), model.open(), model.open()
        model.grow(parked, [1] * 16 * 5)
        model.park(parked, 16 * 5)
        model.grow(live, [2] * 16)
        model.reserve(other, 16 * 3)
        model.look_ahead(live, 16 * 3)  # one page is left, two are needed: all or nothing
        assert live.slot.num_pages == 1
        assert cache.stats().tokens_parked == 16 * 5
        model.look_ahead(live, 16 * 2)
        assert live.slot.num_pages == 2
        model.check()
        assert model.grow(other, [3] * 16 * 4)  # what was mapped ahead is taken back first
        assert live.slot.num_pages == 1
        assert cache.stats().tokens_parked == 16 * 5
        model.check()


def test_mapping_ahead_in_vain_reserves_nothing():
    with FlakyHostDriver() as driver, make_cache(KIND["split"], driver, rows=5) as cache:
        slot = cache.open()
        cache.grow(slot, 10)
        driver._max_mappings = driver.num_mappings
        cache.look_ahead(slot, 100)
        cache._look_ahead.drain()
        assert slot.ready_tokens < 100
        assert cache.pool.num_reserved == 0
        cache.check_invariants()


def test_growing_within_what_is_mapped_waits_for_no_page_to_be_made():
    with SlowDriver() as driver, make_cache(KIND["even"], driver, rows=5) as cache:
        slot = cache.open()
        cache.grow(slot, 1)
        cache.look_ahead(slot, 100)
        assert driver.reached.wait(PATIENCE_S)
        cache.grow(slot, 16)  # on the same page
        cache.open()
        assert not driver.go_on.is_set()
        assert slot.ready_tokens == 16
        driver.go_on.set()
        cache._look_ahead.drain()
        assert slot.ready_tokens >= 100


def test_fresh_pages_are_kept_ready():
    with make_cache(KIND["even"], rows=5, low_watermark=3) as cache:
        slot = cache.open()
        cache.grow(slot, 16)
        cache.look_ahead(slot, 17)
        cache._look_ahead.drain()
        assert cache.pool.num_free == 3


def test_without_a_thread_to_spare_growth_maps_what_is_needed(monkeypatch, caplog):
    def no_more(thread):
        raise RuntimeError("can't start new thread")

    with make_cache(KIND["even"], rows=5) as cache:
        slot = cache.open()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more)
            for _ in range(2):
                cache.look_ahead(slot, 100)
            cache.grow(slot, 60)
            cache.trim()
        assert cache.stats().background_failures == 2
        assert caplog.text.count("Traceback") == 1
        cache.look_ahead(slot, 100)
        cache._look_ahead.drain()
        assert slot.ready_tokens >= 100


def test_what_is_ready_needs_no_background_job():
    with make_cache(KIND["even"]) as cache:
        slot = cache.open()
        cache.grow(slot, 1)
        cache.look_ahead(slot, 16)
        assert not look_ahead_threads()
        cache.look_ahead(slot, 10 * MAX_LEN)  # as far as a slot goes
        cache._look_ahead.drain()
        assert slot.ready_tokens == MAX_LEN


def test_a_slot_that_is_gone_when_its_turn_comes_is_left_alone():
    with SlowDriver() as driver, make_cache(KIND["even"], driver, rows=5) as cache:
        first, second = cache.open(), cache.open()
        cache.look_ahead(first, 100)
        assert driver.reached.wait(PATIENCE_S)
        cache.look_ahead(second, 100)
        cache.close(first)
        cache.close(second)
        driver.go_on.set()
        cache._look_ahead.drain()
        assert cache.stats().pages_ahead == 0
        cache.check_invariants()
        with pytest.raises(InvalidOperation, match="is not open"):
            cache.look_ahead(first, 10)


def test_jobs_run_in_order_and_none_after_the_end():
    class Owner:
        def __init__(self):
            self.seen = []

        def prepare(self, slot, num_tokens):
            self.seen.append(num_tokens)

    owner = Owner()
    look_ahead = LookAhead(owner.prepare)
    look_ahead.drain()  # nothing to wait for yet
    for number in range(100):
        look_ahead.submit(None, number)
    look_ahead.drain()
    assert owner.seen == list(range(100))
    look_ahead.stop()
    look_ahead.stop()
    look_ahead.submit(None, 100)
    look_ahead.drain()
    assert owner.seen == list(range(100))


@pytest.mark.parametrize("error", [DriverError, OSError])
def test_a_failing_job_is_logged_once_and_the_foreground_maps(error, caplog, monkeypatch):
    """As where no file descriptor is left for a moment: no step ends by it."""
    with make_cache(KIND["even"], rows=5) as cache:
        slot, driver = cache.open(), cache.pool.driver
        original, failing = driver._map, True

        def fail_and_map(*arguments):
            if failing and threading.current_thread().name == "vkv-look-ahead":
                raise error("injected")
            original(*arguments)

        monkeypatch.setattr(driver, "_map", fail_and_map)
        with caplog.at_level(logging.WARNING, "vkv"):
            for _ in range(3):
                cache.look_ahead(slot, 10)
                cache._look_ahead.drain()
        assert cache.stats().background_failures == 3
        (record,) = caplog.records
        assert "injected" in record.message
        cache.grow(slot, 10)
        cache.check_invariants()
        failing = False
        cache.look_ahead(slot, 40)
        cache._look_ahead.drain()
        assert slot.ready_tokens == 48
        assert cache.stats().background_failures == 3


def test_where_the_foreground_fails_too_it_is_told():
    with make_cache(KIND["even"], rows=5) as cache:
        slot = cache.open()
        for _ in range(2):
            cache.pool.driver.fail_after = 0
            cache.look_ahead(slot, 10)
            cache._look_ahead.drain()
        cache.pool.driver.fail_after = 0
        with pytest.raises(DriverError, match="injected"):
            cache.grow(slot, 10)
        assert cache.stats().background_failures == 2


def test_the_pool_is_open_while_pages_are_made_and_the_limit_holds():
    """A commit that needs more than is free waits for what is being made, and makes no more."""
    with SlowDriver() as driver:
        pool = PagePool(driver, 5 * PAGE, low_watermark=4)
        claim = pool.reserve(5)
        first = pool.commit(claim, 1)
        refill = threading.Thread(target=pool.refill, name="vkv-look-ahead")
        refill.start()
        assert driver.reached.wait(PATIENCE_S)
        pool.restore(claim, first)
        assert pool.commit(claim, 1) == first  # what is free needs no waiting
        assert pool.refill(extra=30) == 0  # of five, four are being made and one is held
        assert not driver.go_on.is_set()
        committed = []
        commit = threading.Thread(target=lambda: committed.extend(pool.commit(claim, 4)))
        commit.start()
        commit.join(0.05)
        assert not committed
        driver.go_on.set()
        commit.join(PATIENCE_S)
        refill.join(PATIENCE_S)
        assert len(committed) == 4
        assert driver.num_pages == pool.num_created == 5
        pool.check_invariants()


# -- several threads -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: make_cache(KIND["ragged"]), make_paged])
def test_callers_on_several_threads(make):
    """Each keeps its own requests; all share the pool, the parked slots and the background."""
    cache = make()
    failures = []

    def serve(seed):
        rng = random.Random(seed)
        keys, _ = cache.layer(0)
        for _ in range(60):
            try:
                slot, num_cached = cache.adopt([seed] * rng.randint(0, 40))
            except Shortage:
                continue
            length = num_cached
            try:
                for _ in range(rng.randint(1, 6)):
                    cache.grow(slot, min(MAX_LEN, length + rng.randint(0, 20)))
                    keys[cache.locate([slot], [length], [slot.num_tokens - length])] = seed
                    length = slot.num_tokens
                    cache.look_ahead(slot, length + 30)
                    if rng.random() < 0.3:
                        length = rng.randint(0, length)
                        cache.truncate(slot, length)
                    shown = keys[cache.locate([slot], [0], [length])]
                    if not (shown == seed).all():
                        failures.append((seed, "reads what it did not write"))
            except Shortage:
                pass  # as it is: nothing was changed
            if rng.random() < 0.7:
                cache.park(slot, [seed] * slot.num_tokens)
            else:
                cache.close(slot)
            if rng.random() < 0.05:
                cache.trim()

    def guarded(seed):
        try:
            serve(seed)
        except Exception as error:  # noqa: BLE001 - told by the test's own thread
            failures.append((seed, error))

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            cache.check_invariants()
            thread.join(0.01)
    assert not failures
    assert not cache.stats().slots_open
    cache.trim()
    cache.check_invariants()
    assert cache.pool.num_held == cache.pool.num_reserved == 0
    cache.shutdown()


@pytest.mark.parametrize("kind", ["even", "tiles"])
def test_random_operations_race_with_the_background(kind):
    rng = random.Random(5)
    with FlakyHostDriver() as driver:
        model = Model(make_cache(KIND[kind], driver, low_watermark=2))
        for number in range(600):
            if not model.live or rng.random() < 0.3:
                model.adopt([rng.randrange(2)] * rng.randint(0, 50))
            if model.live:
                request = rng.choice(model.live)
                length = len(request.tokens)
                model.cache.look_ahead(request.slot, length + rng.randint(0, 60))
                operation = rng.randrange(6)
                if operation < 3:
                    model.grow(request, [rng.randrange(2)] * min(rng.randint(0, 20), 150 - length))
                elif operation == 3:
                    model.truncate(request, rng.randint(0, length))
                elif operation == 4:
                    model.park(request, length)
                else:
                    model.close(request)
            if number % 50 == 0:
                model.trim()
            if number % 5 == 0:
                model.cache.check_invariants()
                model.check_content(model.live)
        model.cache.shutdown()
        assert (driver.num_pages, driver.reserved_bytes) == (0, 0)


def test_shutdown_races_with_a_job_under_way():
    with SlowDriver() as driver:
        cache = make_cache(KIND["even"], driver, rows=5, low_watermark=4)
        slot = cache.open()
        cache.look_ahead(slot, 100)
        assert driver.reached.wait(PATIENCE_S)
        threading.Timer(0.05, driver.go_on.set).start()
        cache.shutdown()
        assert (driver.num_pages, driver.reserved_bytes) == (0, 0)
        assert slot.state is SlotState.CLOSED


# -- the end ---------------------------------------------------------------------------------


def busy_cache(driver):
    """A cache with slots open, reserved, shared and parked, and a background thread."""
    model = Model(make_cache(KIND["split"], driver, rows=6, low_watermark=3))
    parked, live, idle = model.open(), model.open(), model.open()
    model.grow(parked, [1] * 90)
    model.park(parked, 90)
    model.grow(live, [2] * 50)
    model.fork(live, 45)
    model.reserve(idle, 60)
    model.look_ahead(live, 70)
    model.check()
    return model.cache


def test_shutdown_gives_everything_back():
    with FlakyHostDriver() as driver:
        cache = busy_cache(driver)
        slots = [*cache._table.live.values(), *cache._table.parked]
        cache.shutdown()
        cache.shutdown()
        assert (driver.num_pages, driver.reserved_bytes, driver.num_mappings) == (0, 0, 0)
        assert cache.pool.num_reserved == cache.pool.num_held == 0
        assert {slot.state for slot in slots} == {SlotState.CLOSED}
        assert not look_ahead_threads()
        with pytest.raises(InvalidOperation, match="has been shut down"):
            cache.open()
        with pytest.raises(InvalidOperation, match="is not open"):
            cache.grow(slots[0], 1)


def test_a_cache_that_is_dropped_gives_everything_back():
    with FlakyHostDriver() as driver:
        cache = busy_cache(driver)
        pool = cache.pool
        gone = weakref.ref(cache)
        del cache
        collect()
        assert gone() is None
        assert (driver.num_pages, driver.reserved_bytes) == (0, 0)
        assert pool.num_reserved == pool.num_held == pool.num_created == 0
        pool.check_invariants()


def test_a_dropped_cache_leaves_others_of_the_pool_alone():
    with FlakyHostDriver() as driver:
        kept = Model(make_cache(KIND["even"], driver, rows=5))
        request = kept.open()
        kept.grow(request, [1] * 70)
        dropped = type(kept.cache)(kept.cache.layout, kept.cache.pool, num_slots=3)
        dropped.grow(dropped.open(), 100)
        held = kept.cache.pool.num_held
        del dropped
        collect()
        assert kept.cache.pool.num_held < held
        kept.check()
        kept.cache.shutdown()


def test_a_cache_whose_driver_was_closed_first_is_dropped_in_silence():
    driver = FlakyHostDriver()
    cache = busy_cache(driver)
    driver.close()
    del cache
    collect()


def test_a_failed_job_does_not_keep_a_dropped_cache_alive():
    with FlakyHostDriver() as driver:
        cache = make_cache(KIND["even"], driver, rows=5)
        driver.fail_after = 0
        cache.look_ahead(cache.open(), 10)
        deadline = time.monotonic() + PATIENCE_S
        while not cache._look_ahead.num_failures and time.monotonic() < deadline:
            time.sleep(0.001)
        gone = weakref.ref(cache)
        del cache
        collect()
        assert gone() is None
        assert driver.reserved_bytes == 0


def test_a_cache_dropped_in_the_middle_of_a_job_ends_after_it(monkeypatch):
    """Its last reference goes on the look-ahead thread, which may not give it back itself."""
    with SlowDriver() as driver:
        names, free = [], driver._free
        monkeypatch.setattr(
            driver, "_free", lambda *a: (names.append(threading.current_thread().name), free(*a))
        )
        cache = make_cache(KIND["even"], driver, rows=5)
        cache.look_ahead(cache.open(), 100)
        assert driver.reached.wait(PATIENCE_S)
        del cache
        collect()
        driver.go_on.set()
        for thread in look_ahead_threads():
            thread.join(PATIENCE_S)
        collect()
        assert (driver.num_pages, driver.reserved_bytes) == (0, 0)
        assert names == ["vkv-janitor"]


EXIT = """
import torch
from vkv.allocator import KVCache, KVLayout, LayerGeometry, PagePool
from vkv.vmem import HostDriver

class SlowDriver(HostDriver):
    def _map(self, *args):
        time.sleep(0.2)
        super()._map(*args)
        print("mapped", flush=True)

import time
layer = LayerGeometry(num_kv_heads=1, key_dim=64, value_dim=64)
layout = KVLayout((layer,), torch.float32, 256, 4096)
cache = KVCache(layout, PagePool(SlowDriver(4096), 1 << 20), num_slots=2)
cache.look_ahead(cache.open(), 20)
"""


def test_at_exit_the_background_job_under_way_is_waited_for():
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"mapped\n", b"")


def with_tokens(model, count):
    request = model.open()
    assert model.grow(request, [1] * count)
    return request


# -- work in flight, on the stand-in: unmapping under it is an error of the driver -------------


@pytest.fixture
def at_work(cuda_standin):
    """A model, and a function that starts work on all that a slot has mapped."""
    driver = FlakyStandInDriver()
    model = Model(make_cache(KIND["split"], driver, rows=6, num_slots=6))

    def begin(slot):
        backing = model.cache._backing
        for index, pages in enumerate(slot.pages):
            if pages:
                address = backing._range_address(slot, index)
                cuda_standin.begin_work(address, len(pages) * driver.page_bytes)

    yield model, begin
    cuda_standin.end_work()
    model.cache.shutdown()
    driver.close()


def test_pages_are_unmapped_only_after_the_work_launched_on_them(at_work):
    model, begin = at_work
    request = model.open()
    model.grow(request, [1] * 140)
    begin(request.slot)
    model.truncate(request, 100)
    begin(request.slot)
    child = model.fork(request, 90)
    model.truncate(request, 50)
    begin(request.slot)
    begin(child.slot)
    model.grow(request, [2] * 60)
    begin(request.slot)
    model.park(request, 100)
    begin(child.slot)
    model.close(child)
    model.trim()
    model.check()


def test_a_parked_slot_waits_for_the_copy_that_a_fork_reads_from_it(at_work, monkeypatch):
    model, begin = at_work
    backing = model.cache._backing
    copy = backing.copy

    def copy_slowly(source, target, skip):
        copy(source, target, skip)
        begin(source)
        begin(target)

    monkeypatch.setattr(backing, "copy", copy_slowly)
    request = model.open()
    model.grow(request, [1] * 140)
    model.park(request, 140)
    child = model.adopt([1] * 50)
    assert model.cache.stats().tokens_parked == 140
    model.trim()
    model.close(child)


def test_undoing_waits_for_the_clearing_of_the_pages(at_work, monkeypatch):
    model, begin = at_work
    model.cache.pool.sanitize = "zero"
    backing = model.cache._backing
    request = model.open()
    model.grow(request, [1] * 140)
    model.close(request)

    def clear_and_fail(slot, range_index, first):
        begin(slot)
        if range_index == 2:
            raise DriverError("injected into clearing")

    monkeypatch.setattr(backing, "_clear_pages", clear_and_fail)
    request = model.open()
    with pytest.raises(DriverError, match="injected into clearing"):
        model.cache.grow(request.slot, 100)
    assert request.slot.num_pages == 0
    model.cache.check_invariants()


def test_mapping_ahead_ends_when_its_clearing_has_ended(at_work, monkeypatch):
    """The request may write on another stream than the one that cleared."""
    model, begin = at_work
    model.cache.pool.sanitize = "zero"
    backing, driver = model.cache._backing, model.cache.pool.driver
    model.close(with_tokens(model, 140))
    request = with_tokens(model, 10)
    monkeypatch.setattr(backing, "_clear_pages", lambda slot, index, first: begin(slot))
    model.look_ahead(request, 100)
    address = backing._range_address(request.slot, 0)
    page = driver.page_at(address)
    driver.unmap(address, driver.page_bytes)  # refused while work is in flight
    driver.map(address, [page])


def test_fences_do_not_pile_up(cuda_standin, at_work):
    model, _ = at_work
    for _ in range(20):
        request = model.adopt([1] * 40)
        model.grow(request, [1] * (60 - len(request.tokens)))
        model.park(request, 60)
        other = model.adopt([1] * 20)  # aliased
        model.close(other)
    assert model.cache.stats().slots_parked == 1
    assert cuda_standin.held()["num_events"] <= 1


@pytest.mark.gpu
def test_the_cache_on_a_gpu():
    from vkv.vmem import CudaDriver

    with CudaDriver() as driver, make_cache(KIND["even"], driver, rows=2, num_slots=2) as cache:
        slot = cache.open()
        cache.grow(slot, 100)
        keys, values = cache.layer(1)
        keys[slot.index, :100] = 7
        values[slot.index, :100] = 8
        child = cache.fork(slot, 90)
        cache.close(slot)
        torch.cuda.synchronize()
        assert keys[child.index, :90].unique().tolist() == [7]
        assert values[child.index, :90].unique().tolist() == [8]
