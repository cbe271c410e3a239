"""Slots whose first pages are a file's: what they read, and what they cost."""

import os

import pytest
from allocator_model import (
    KIND,
    KINDS,
    MAX_LEN,
    FlakyHostDriver,
    FlakyStandInDriver,
    Model,
    SavedTokens,
    make_cache,
    make_paged,
    one_thread,
)
from vkv.allocator import MemoryLimit, PagePool
from vkv.vmem import is_of_file
from vkv.vmem.errors import DriverError, InvalidOperation, OutOfPages, RequestTooLong, Shortage

__all__ = ["one_thread"]  # a fixture

ROOMY = {"rows": 12, "num_slots": 8, "max_parked": 4}


@pytest.fixture
def driver():
    with FlakyHostDriver() as driver:
        yield driver


def saved_request(model, count=140):
    """A file of so many tokens; the request that had them is gone, and so is its memory."""
    request = model.open()
    assert model.grow(request, tokens(count))
    saved = SavedTokens(model.cache, request)
    assert model.close(request)
    model.cache.trim()
    return saved


def tokens(count):
    return [index % 3 for index in range(count)]


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
def test_every_number_of_tokens_reads_back(driver, kind):
    model = Model(make_cache(KIND[kind], driver, **ROOMY))
    saved = saved_request(model)
    for count in range(0, 141, 7):
        request = model.attach(saved, count)
        model.check()
        assert model.grow(request, [5] * 3)
        model.check()
        model.close(request)
    assert saved.content == os.pread(saved.fd, len(saved.content), 0)
    model.cache.shutdown()
    assert driver.num_pages == 0


def test_whole_pages_take_no_memory_and_none_of_the_limit(driver):
    model = Model(make_cache(KIND["even"], driver, rows=1.0))
    saved = saved_request(model, 144)  # nine pages of 16 tokens, and not one more
    requests = [model.attach(saved, 144) for _ in range(4)]
    stats = model.cache.stats()
    assert stats.physical_bytes == 0
    assert stats.pages_held == 0
    assert stats.pages_of_files == 36
    assert model.cache.num_obtainable() == model.cache.pool.limit_pages
    for request in requests:
        model.grow(request, [1])
    assert model.cache.stats().pages_held == 4
    model.check()


def test_the_next_token_goes_to_a_copy(driver):
    """Of a page in the middle of the file, too: what lay behind was cut off."""
    model = Model(make_cache(KIND["even"], driver, **ROOMY))
    saved = saved_request(model, 128)
    request = model.attach(saved, 128)
    model.truncate(request, 40)
    assert [is_of_file(page) for page in request.slot.pages[0]] == [True] * 3
    assert request.slot.ready_tokens == 40
    model.grow(request, [7])
    assert [is_of_file(page) for page in request.slot.pages[0]] == [True, True, False]
    model.check()
    assert saved.content == os.pread(saved.fd, len(saved.content), 0)


def test_a_fork_shares_the_file_and_a_parked_slot_gives_it_on(driver):
    model = Model(make_cache(KIND["ragged"], driver, **ROOMY))
    request = model.attach(saved_request(model), 140)
    child = model.fork(request, 100)
    model.check()
    model.park(request, 140)
    model.close(child)
    assert model.cache.stats().pages_of_files
    heir = model.adopt([*tokens(140), 9])
    assert len(heir.tokens) == 140
    model.check()


def test_memory_that_runs_short_is_not_sought_in_files(driver):
    """Parked slots of files alone stay, and one with memory behind keeps what is the file's."""
    model = Model(make_cache(KIND["even"], driver, rows=1.0, max_parked=4))
    saved = saved_request(model, 64)
    plain, longer = model.attach(saved, 64), model.attach(saved, 64)
    model.grow(longer, [1] * 60)
    model.park(plain, 64)
    model.park(longer, 124)
    request = model.open()
    assert model.grow(request, [2] * MAX_LEN)  # all that there is
    assert [slot.num_tokens for slot in model.cache._table.parked] == [64, 64]
    assert model.cache.stats().pages_parked == 0
    assert model.cache.num_obtainable() == 0
    model.check()
    model.trim()
    assert model.cache.stats().pages_of_files == 0


def test_a_request_without_a_prefix_takes_over_memory_and_no_file(driver):
    model = Model(make_cache(KIND["even"], driver, rows=3, max_parked=2))
    saved = saved_request(model, 128)
    model.park(model.attach(saved, 128), 128)
    small = model.open()
    model.grow(small, [4] * 20)
    model.park(small, 20)
    heir = model.adopt([9] * 30)
    assert heir.slot.num_pages == 2
    assert model.cache.prefix_length(tokens(128)) == 128
    model.check()


def test_other_caches_under_a_limit_ask_for_no_file(driver):
    limit = MemoryLimit(driver.page_bytes * 30)
    with FlakyHostDriver() as second:
        caches = []
        for each in (driver, second):
            cache = make_cache(KIND["even"], each, num_slots=4)
            cache.shutdown()
            layout = cache.layout
            pool = PagePool(each, limit)
            caches.append(type(cache)(layout, pool, num_slots=4, max_parked=3))
        model, other = Model(caches[0]), Model(caches[1])
        saved = saved_request(model, 144)
        model.park(model.attach(saved, 144), 144)
        assert caches[0]._supply.reclaimable_bytes() == 0
        request = other.open()
        assert other.grow(request, [1] * MAX_LEN)
        assert model.cache.prefix_length(tokens(144)) == 144
        for cache in caches:
            cache.shutdown()


def test_recycled_pages_are_cleared_and_files_are_not(driver):
    model = Model(make_cache(KIND["tiles"], driver, sanitize="zero", **ROOMY))
    saved = saved_request(model)
    for count in (140, 77, 64):
        request = model.attach(saved, count)
        model.check_isolation()
        model.park(request, count - 3)
        heir = model.adopt(tokens(count - 3))
        model.check_isolation()
        model.check()
        model.close(heir)


def test_what_cannot_be_is_refused(driver):
    model = Model(make_cache(KIND["even"], driver, **ROOMY))
    saved = saved_request(model)
    used = model.open()
    model.grow(used, [1])
    with pytest.raises(InvalidOperation, match="is not new"):
        model.cache.attach(used.slot, saved.fd, saved.offsets, 10)
    new = model.open()
    with pytest.raises(RequestTooLong, match="151 tokens"):
        model.cache.attach(new.slot, saved.fd, saved.offsets, MAX_LEN + 1)
    model.check()


def test_blocks_and_devices_refuse(cuda_standin):
    cache = make_paged()
    with pytest.raises(InvalidOperation, match="read the file into them"):
        cache.attach(cache.open(), 0, [0], 100)
    cache.check_invariants()
    with FlakyStandInDriver() as driver:
        cache = make_cache(KIND["even"], driver)
        slot = cache.open()
        with pytest.raises(InvalidOperation, match="read it into pages"):
            cache.attach(slot, 0, [0] * len(slot.pages), 140)
        assert (slot.num_tokens, slot.promised_tokens) == (0, 0)
        cache.check_invariants()
        cache.shutdown()


def test_a_pool_that_cannot_back_the_rest_attaches_nothing(driver):
    model = Model(make_cache(KIND["even"], driver, rows=1.0))
    saved = saved_request(model, 140)
    hog = model.open()
    model.grow(hog, [1] * MAX_LEN)
    slot = model.cache.open()
    with pytest.raises(OutOfPages):
        model.cache.attach(slot, saved.fd, saved.offsets, 140)
    assert (slot.num_tokens, slot.num_pages, model.cache.stats().pages_of_files) == (0, 0, 0)
    assert model.cache.attach(slot, saved.fd, saved.offsets, 128) == (128 * 256,)


@pytest.mark.parametrize("kind", ["split", "windows", "tiles"])
@pytest.mark.parametrize("short", [False, True])
def test_every_call_failed_in_turn(kind, short):
    for call in range(1000):
        descriptors = len(os.listdir("/proc/self/fd"))
        with FlakyHostDriver() as driver:
            model = Model(make_cache(KIND[kind], driver, **ROOMY))
            saved = saved_request(model)
            slot = model.cache.open()
            before = dict(driver._page_table), model.cache.pool.num_reserved
            driver.fail_after, driver.fail_short = call, short
            try:
                starts = model.cache.attach(slot, saved.fd, saved.offsets, 130)
            except (DriverError, Shortage):
                assert (slot.num_tokens, slot.promised_tokens, slot.num_pages) == (0, 0, 0)
                assert (driver._page_table, model.cache.pool.num_reserved) == before
                assert not model.cache.pool.num_of_files
                model.cache.check_invariants()
                starts = model.cache.attach(slot, saved.fd, saved.offsets, 130)
            finished = driver.fail_after is not None
            driver.fail_after = None
            saved.write_rest(model.cache, slot, starts)
            model.check_content([model._admit(slot, saved.tokens[:130])])
            model.check()
            model.cache.shutdown()
            assert (driver.num_pages, driver.reserved_bytes) == (0, 0)
        del saved, model
        assert len(os.listdir("/proc/self/fd")) == descriptors
        if finished:
            break
    assert call > 3
