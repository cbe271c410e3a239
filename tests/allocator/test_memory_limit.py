"""Caches under one limit: together never above it, and memory goes to where requests are."""

import gc
import random
import threading
import weakref
from typing import Any

import pytest
import torch
import zoo
from vkv import LLM, KVCache, KVLayout, LayerGeometry, MemoryLimit, PagePool
from vkv.vmem import HostDriver, janitor
from vkv.vmem.errors import InvalidConfig, OutOfPages, Shortage

_PAGE = 4096
_LAYER = LayerGeometry(num_kv_heads=2, key_dim=16, value_dim=16)  # 16 tokens a page


class _Pair:
    """Two caches under one limit; the second has pages twice as large."""

    def __init__(self, limit: MemoryLimit, num_slots: int = 6, **pool_options: int) -> None:
        self.limit = limit
        self.drivers = [HostDriver(_PAGE), HostDriver(2 * _PAGE)]
        self.caches = []
        for driver in self.drivers:
            layout = KVLayout((_LAYER,), torch.float32, 512, driver.page_bytes)
            pool = PagePool(driver, limit, **pool_options)
            self.caches.append(KVCache(layout, pool, num_slots=num_slots, max_parked=num_slots))

    @property
    def physical_bytes(self) -> int:
        return sum(cache.stats().physical_bytes for cache in self.caches)

    def check(self) -> None:
        assert self.physical_bytes <= self.limit.taken_bytes <= self.limit.num_bytes
        for cache in self.caches:
            cache.check_invariants()
        counted = sum(c.pool._num_taken * c.pool.driver.page_bytes for c in self.caches)
        assert counted == self.limit.taken_bytes

    def close(self) -> None:
        for cache, driver in zip(self.caches, self.drivers, strict=True):
            cache.shutdown()
            driver.close()
        assert self.limit.taken_bytes == 0


def test_what_one_parks_the_other_gets() -> None:
    pair = _Pair(MemoryLimit(16 * _PAGE))
    first, second = pair.caches
    slot = first.open()
    first.grow(slot, 12 * 16)
    first.park(slot, range(12 * 16))
    live = second.open()
    second.grow(live, 4 * 16)  # 2 pages of 2
    pair.check()
    assert pair.physical_bytes == 16 * _PAGE
    second.grow(live, 10 * 16)  # 3 more, so 6 of the parked ones go
    pair.check()
    assert first.stats().pages_parked == 6
    assert first.prefix_length(range(12 * 16)) == 6 * 16
    second.grow(live, 16 * 16)
    pair.check()
    assert first.stats().physical_bytes == 0
    pair.close()


def test_a_limit_that_is_made_less_takes_what_is_parked_and_lets_live_slots_stay() -> None:
    limit = MemoryLimit(16 * _PAGE)
    pair = _Pair(limit)
    first, second = pair.caches
    live, parked, other = first.open(), first.open(), second.open()
    first.grow(live, 4 * 16)
    first.grow(parked, 4 * 16)
    second.grow(other, 8 * 16)  # 4 pages of 2
    first.park(parked, range(64))
    limit.resize(14 * _PAGE)
    assert pair.physical_bytes == 14 * _PAGE
    limit.resize(6 * _PAGE)  # less than live slots hold
    assert first.stats().pages_parked == 0
    assert pair.physical_bytes == limit.taken_bytes == 12 * _PAGE
    with pytest.raises(OutOfPages):
        first.grow(live, 5 * 16)
    second.close(other)
    assert pair.physical_bytes == 12 * _PAGE  # in the pool still
    limit.enforce()
    assert pair.physical_bytes == limit.taken_bytes <= 6 * _PAGE
    first.grow(live, 6 * 16)
    pair.check()
    with pytest.raises(OutOfPages):
        first.grow(live, 7 * 16)
    limit.resize()
    first.grow(live, 16 * 16)
    pair.check()
    with pytest.raises(InvalidConfig, match="more than the 65536"):
        limit.resize(17 * _PAGE)
    pair.close()


def test_what_live_requests_hold_stays_and_a_vain_demand_takes_nothing() -> None:
    pair = _Pair(MemoryLimit(16 * _PAGE))
    first, second = pair.caches
    live, parked = first.open(), first.open()
    first.grow(live, 8 * 16)
    first.grow(parked, 4 * 16)
    first.park(parked, range(64))
    slot = second.open()
    with pytest.raises(OutOfPages):
        second.grow(slot, 10 * 16)
    pair.check()
    assert first.stats().pages_parked == 4
    assert second.num_obtainable() == 4  # of its own size
    second.grow(slot, 8 * 16)
    pair.check()
    assert first.stats().pages_parked == 0
    assert first.stats().pages_held == 8
    pair.close()


def test_promises_count_before_memory_exists() -> None:
    pair = _Pair(MemoryLimit(16 * _PAGE))
    first, second = pair.caches
    slot, other = first.open(), second.open()
    first.reserve(slot, 15 * 16)
    with pytest.raises(OutOfPages):
        second.grow(other, 1)
    first.truncate(slot, 0)
    second.grow(other, 1)
    pair.check()
    pair.close()


def test_random_operations_on_two_threads() -> None:
    pair = _Pair(MemoryLimit(40 * _PAGE), low_watermark=2)
    failures: list[BaseException] = []

    def work(index: int) -> None:
        draw, cache, slots = random.Random(index), pair.caches[index], []
        try:
            for _ in range(1500):
                kind = draw.choice(["open", "grow", "grow", "ahead", "park", "close"])
                try:
                    if kind == "open":
                        slots.append(cache.adopt([draw.randrange(3)] * draw.randrange(40))[0])
                    elif slots:
                        slot = draw.choice(slots)
                        if kind == "grow":
                            goal = min(512, slot.num_tokens + draw.randrange(80))
                            cache.grow(slot, goal)
                            cache.layer(0)[0][slot.index, :goal].sum()
                        elif kind == "ahead":
                            cache.look_ahead(slot, slot.num_tokens + 40)
                        else:
                            slots.remove(slot)
                            tokens = [draw.randrange(3)] * slot.num_tokens
                            cache.park(slot, tokens) if kind == "park" else cache.close(slot)
                except Shortage:
                    if slots:
                        cache.close(slots.pop())
                assert pair.limit.taken_bytes <= pair.limit.num_bytes
        except BaseException as error:  # noqa: BLE001 - shown by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    for cache in pair.caches:
        cache.trim()
    pair.check()
    pair.close()


def test_two_engines_share_a_limit() -> None:
    limit = MemoryLimit("128KiB")
    options = zoo.with_defaults({"kv_memory": limit, "max_seqs": 4})
    reference = zoo.tiny_model("llama", attention="sdpa")
    prompts = zoo.random_prompts([90, 120, 60])
    expected = [zoo.generate_alone(reference, prompt, 30) for prompt in prompts]
    with (
        LLM(zoo.tiny_model("llama"), device="cpu", **options) as one,
        LLM(zoo.tiny_model("llama"), device="cpu", **options) as two,
    ):
        for llm in (one, two, one, two):
            outs = llm.generate(prompts, zoo.greedy(30))
            assert [list(out.outputs[0].token_ids) for out in outs] == expected
            held = one.stats().physical_bytes + two.stats().physical_bytes
            assert held <= limit.taken_bytes <= 128 << 10
            for each in (one, two):
                each.engine.cache.check_invariants()
        assert one.stats().pages_parked + two.stats().pages_parked > 0
    assert limit.taken_bytes == 0


def test_a_dropped_cache_gives_its_share_back() -> None:
    limit = MemoryLimit(16 * _PAGE)
    pair = _Pair(limit)
    slot = pair.caches[0].open()
    pair.caches[0].grow(slot, 100)
    assert limit.taken_bytes
    pair.caches.clear()
    assert janitor.drain(20)
    assert limit.taken_bytes == 0


@pytest.mark.parametrize("shares", ["a limit", "a pool"])
def test_a_cache_dropped_in_the_midst_of_another_is_given_back_after_it(
    shares: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may run in any call; what the other has counted must stay true till its end."""
    pair = _Pair(MemoryLimit(16 * _PAGE))
    working, dropped = pair.caches
    if shares == "a pool":
        dropped = KVCache(working.layout, working.pool, num_slots=6)
        pair.caches.append(dropped)
    pool, driver = dropped.pool, pair.drivers[0]
    dropped.grow(dropped.open(), 60)
    parked = dropped.open()
    dropped.grow(parked, 20)
    dropped.park(parked, range(20))
    held, threads = pool.num_held, []
    original, unmap = driver._map, pool.driver._unmap

    def collect_and_map(*arguments: Any) -> None:
        gc.collect()
        assert gone() is None
        assert pool.num_held >= held, "given back in the middle of a call"
        original(*arguments)

    def note_thread(*arguments: Any) -> None:
        threads.append(threading.current_thread().name)
        unmap(*arguments)

    monkeypatch.setattr(driver, "_map", collect_and_map)
    monkeypatch.setattr(pool.driver, "_unmap", note_thread)
    gone, cycle = weakref.ref(dropped), [dropped]
    cycle.append(cycle)
    pair.caches.remove(dropped)
    del dropped, cycle
    slot = working.open()
    working.grow(slot, 60)
    assert janitor.drain(20)
    assert set(threads) == {"vkv-janitor"}
    assert pool.num_held == (4 if shares == "a pool" else 0)
    pool.check_invariants()
    working.check_invariants()
    assert pair.limit.taken_bytes == 4 * _PAGE
    monkeypatch.undo()
    working.grow(slot, 16 * 16)  # all that there is
    working.check_invariants()
    working.shutdown()
    assert pair.limit.taken_bytes == 0


def test_what_a_dropped_cache_had_is_to_be_had_at_once() -> None:
    """Also before the janitor comes to it: nobody meets a shortage that is over."""
    pair = _Pair(MemoryLimit(16 * _PAGE))
    working = pair.caches[0]
    at_work, go_on = threading.Event(), threading.Event()
    janitor.later(at_work.set)
    janitor.later(lambda: go_on.wait(20))
    assert at_work.wait(20)
    slot = pair.caches[1].open()
    pair.caches[1].grow(slot, 100)
    pair.caches[1].reserve(slot, 16 * 16)
    del pair.caches[1], slot
    assert working.num_obtainable() == 16
    working.grow(working.open(), 16 * 16)
    working.check_invariants()
    go_on.set()
    assert janitor.drain(20)
    working.check_invariants()
    assert pair.limit.taken_bytes == 16 * _PAGE
    assert pair.drivers[1].reserved_bytes == 0


@pytest.mark.parametrize("size", [0, -1, "many", True])
def test_a_limit_is_an_amount_of_memory(size: int | str) -> None:
    with pytest.raises(InvalidConfig, match="not an amount"):
        MemoryLimit(size)


def test_the_paged_baseline_shares_nothing() -> None:
    with pytest.raises(InvalidConfig, match="in advance"):
        LLM(zoo.tiny_model("llama"), device="cpu", kv="paged", kv_memory=MemoryLimit("1MiB"))
