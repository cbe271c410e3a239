"""A forked child: refused everything, at once, whatever its parent's threads were doing."""

import contextlib
import gc
import signal
import subprocess
import sys
import threading

import pytest
import standin.process
import torch
from allocator_model import KIND, Model, make_cache, make_paged, one_thread
from vkv.allocator import KVCache, MemoryLimit, PagePool, SlotCache
from vkv.vmem import HostDriver
from vkv.vmem.errors import ForkedProcess

__all__ = ["one_thread"]  # a fixture

PATIENCE_S = 20


@contextlib.contextmanager
def held_elsewhere(*locks):
    """Meanwhile another thread holds all of them, as one that is in the middle of a step."""
    held, go_on = threading.Event(), threading.Event()

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            go_on.wait(PATIENCE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENCE_S)
    yield
    go_on.set()
    thread.join()


def num_not_refused(entries):
    """Of a forked child: how many `entries` did anything but raise ForkedProcess at once."""

    def child():
        signal.alarm(PATIENCE_S)  # one that waits for a lock is killed by it
        wrong = 0
        for name, entry in entries.items():
            try:
                entry()
            except ForkedProcess as error:
                if "belongs to process" in str(error):
                    continue
            sys.stderr.write(f"{name} was not refused\n")
            wrong += 1
        gc.collect()
        return wrong

    return standin.process.run_in_fork(child)


def entries_of(cache: SlotCache, slot):
    """All that may be called of a cache, by name."""
    keys = list(range(20))
    return {
        "open": cache.open,
        "adopt": lambda: cache.adopt(keys),
        "reserve": lambda: cache.reserve(slot, 30),
        "grow": lambda: cache.grow(slot, 90),
        "grow within what is ready": lambda: cache.grow(slot, slot.num_tokens + 1),
        "look_ahead": lambda: cache.look_ahead(slot, 60),
        "look_ahead within what is ready": lambda: cache.look_ahead(slot, 1),
        "truncate": lambda: cache.truncate(slot, 1),
        "fork": lambda: cache.fork(slot, 5),
        "park": lambda: cache.park(slot, keys),
        "close": lambda: cache.close(slot),
        "num_obtainable": cache.num_obtainable,
        "prefix_length": lambda: cache.prefix_length(keys),
        "trim": cache.trim,
        "page_map": cache.page_map,
        "stats": cache.stats,
        "check_invariants": cache.check_invariants,
        "layer": lambda: cache.layer(0),
        "locate": lambda: cache.locate([slot], [0], [1]),
        "block_tables": lambda: cache.block_tables([slot]),
        "shutdown": cache.shutdown,
    }


def entries_of_pool(pool: PagePool, claim):
    return {
        "num_created": lambda: pool.num_created,
        "num_available": lambda: pool.num_available,
        "num_spare": lambda: pool.num_spare,
        "pool.reserve": lambda: pool.reserve(1),
        "pool.commit": lambda: pool.commit(claim, 1),
        "pool.restore": lambda: pool.restore(claim, []),
        "pool.cancel": lambda: pool.cancel(claim),
        "pool.retain": lambda: pool.retain([]),
        "pool.release": lambda: pool.release([]),
        "pool.refill": pool.refill,
        "pool.check_invariants": pool.check_invariants,
    }


@pytest.mark.parametrize("kind", ["even", "paged"])
def test_every_entry_refuses_a_child_while_a_thread_of_its_parent_works(kind):
    cache = make_paged(block_tokens=16, rows=5) if kind == "paged" else make_cache(KIND[kind])
    with cache:
        model = Model(cache)
        request = model.open()
        assert model.grow(request, [1] * 20)
        claim = cache.pool.reserve(2)
        entries = entries_of(cache, request.slot) | entries_of_pool(cache.pool, claim)
        if kind != "paged":
            entries["pool.trim"] = cache.pool.trim
        with held_elsewhere(cache._lock, cache.pool._lock, cache._look_ahead._lock):
            assert num_not_refused(entries) == 0
        cache.pool.cancel(claim)
        model.check()
        assert model.grow(request, [2] * 40)
        model.check()


def test_what_a_child_writes_is_no_token_of_its_parent():
    """A child that asks before it writes, as every owner of a cache does, changes nothing."""
    with make_cache(KIND["even"]) as cache:
        model = Model(cache)
        request = model.open()
        assert model.grow(request, [1] * 20)
        keys, _ = cache.layer(0)
        before = keys[request.slot.index, :32].clone()

        def child():
            cache.grow(request.slot, 32)  # which is mapped already
            keys[request.slot.index, :32] = 7
            return 0

        assert standin.process.run_in_fork(lambda: refused(child)) == 0
        assert torch.equal(keys[request.slot.index, :32], before)
        model.check()


def refused(call):
    try:
        return call() or 1
    except ForkedProcess:
        return 0


def test_a_shared_limit_and_its_other_caches_refuse_a_child():
    limit = MemoryLimit("1MiB")
    with HostDriver(4096) as driver:
        pool = PagePool(driver, limit)
        with KVCache(KIND["even"].layout(4096), pool, num_slots=2) as cache:
            entries = {
                "take": lambda: limit.take(1),
                "join": lambda: limit.join(cache._supply),
                "reclaimable_bytes": lambda: limit.reclaimable_bytes(cache._supply),
                "make_room": lambda: limit.make_room(cache._supply, 1),
                "open": cache.open,
                "grow": lambda: cache.grow(slot, 1),
            }
            slot = cache.open()
            with held_elsewhere(limit.lock, limit._accounts, pool._lock):
                assert num_not_refused(entries) == 0
            cache.check_invariants()


ENDING = """
import os, signal, sys, threading
import torch
from vkv.allocator import KVCache, KVLayout, LayerGeometry, MemoryLimit, PagePool
from vkv.vmem import HostDriver

layer = LayerGeometry(num_kv_heads=1, key_dim=64, value_dim=64)
layout = KVLayout((layer,), torch.float32, 256, 4096)
limit = MemoryLimit(1 << 20)
driver = HostDriver(4096)
cache, dropped = (KVCache(layout, PagePool(driver, limit), num_slots=2) for _ in range(2))
for each in (cache, dropped):
    each.look_ahead(each.open(), 20)
    each._look_ahead.drain()
held, go_on = threading.Event(), threading.Event()

def work():
    with limit.lock, cache.pool._lock, cache._look_ahead._lock, driver._lock, driver._paging_lock:
        held.set()
        go_on.wait(60)

thread = threading.Thread(target=work)
thread.start()
held.wait()
pid = os.fork()
if not pid:
    signal.alarm(30)
    del dropped  # is collected in the child; `cache` is there when it exits
    sys.exit(7)
_, status = os.waitpid(pid, 0)
go_on.set()
thread.join()
assert os.waitstatus_to_exitcode(status) == 7, status
for each in (cache, dropped):
    each.check_invariants()
    each.grow(each.open(), 200)
    each.shutdown()
driver.close()
"""


def test_a_child_ends_though_its_parent_was_in_the_middle_of_things():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDING], capture_output=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, b"")
