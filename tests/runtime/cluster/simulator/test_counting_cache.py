"""The cache that counts, against itself recounted and against a cache of real pages."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepping import make_request
from vkv import LayerGeometry, PagedKVCache
from vkv.allocator import PagedLayout
from vkv.runtime.cluster.simulator.counting_cache import (
    CountedSlot,
    CountingCache,
)
from vkv.runtime.scheduling.plan import Order
from vkv.runtime.scheduling.policies import POLICIES, Fair, Fcfs, Priority
from vkv.runtime.scheduling.scheduler import Scheduler
from vkv.runtime.scheduling.tiers import common_prefix
from vkv.vmem.errors import InvalidConfig, OutOfPages, RequestTooLong

PAGE = 4


@given(st.randoms(use_true_random=False), st.sampled_from([0, 2, 6]), st.sampled_from([10, 50]))
def test_counts_are_right_after_any_calls(
    rng: random.Random, max_parked: int, num_pages: int
) -> None:
    cache = CountingCache(num_pages * PAGE, page_tokens=PAGE, max_parked=max_parked)
    live: list[tuple[CountedSlot, list[int]]] = []
    for _ in range(60):
        kind = rng.random()
        try:
            if kind < 0.35:
                tokens = [rng.randrange(3)] * rng.randrange(1, 12) + [rng.randrange(3)]
                found = cache.prefix_length(tokens)
                slot, held = cache.adopt(tokens)
                assert held <= found
                live.append((slot, tokens))
                cache.reserve(slot, len(tokens))
                cache.grow(slot, len(tokens))
            elif kind < 0.6 and live:
                slot, tokens = rng.choice(live)
                cache.grow(slot, len(tokens) + 1)
                tokens.append(rng.randrange(3))
            elif kind < 0.7 and live:
                slot, tokens = rng.choice(live)
                if slot.num_tokens:
                    count = rng.randint(1, slot.num_tokens)
                    live.append((cache.fork(slot, count), tokens[:count]))
            elif kind < 0.9 and live:
                slot, tokens = live.pop(rng.randrange(len(live)))
                cache.park(slot, tokens[: slot.num_tokens])
            elif live:
                cache.close(live.pop(rng.randrange(len(live)))[0])
        except OutOfPages:
            pass
        cache.check_invariants()
    for slot, _ in live:
        cache.close(slot)
    cache.check_invariants()
    assert cache.live_tokens == 0
    assert cache.num_obtainable() == num_pages


def test_shared_pages_count_once_and_stay_with_who_is_left() -> None:
    cache = CountingCache(40, page_tokens=PAGE)
    parent = cache.open()
    cache.grow(parent, 16)
    child = cache.fork(parent, 10)  # two whole pages are shared, and a third is copied
    assert cache.live_tokens == 20
    cache.close(parent)
    assert cache.live_tokens == 12
    cache.close(child)
    assert cache.live_tokens == 0


def test_pinned_slots_are_not_reclaimed() -> None:
    cache = CountingCache(16, page_tokens=PAGE)
    slot = cache.open()
    cache.grow(slot, 12)
    cache.pin(slot)
    cache.park(slot, [1] * 12)
    assert cache.num_obtainable() == 1
    with pytest.raises(OutOfPages, match="2 pages"):
        cache.reserve(cache.open(), 8)
    cache.unpin(slot)
    cache.reserve(cache.open(), 8)
    cache.check_invariants()
    assert cache.prefix_length([1] * 12) == 0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="page_tokens 8"):
        CountingCache(4, page_tokens=8)
    cache = CountingCache(40, page_tokens=PAGE, max_len=8)
    with pytest.raises(RequestTooLong, match="raise max_len"):
        cache.grow(cache.open(), 9)


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_common_prefixes(a: list[int], b: list[int]) -> None:
    slow = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    assert common_prefix(a, b) == (min(len(a), len(b)) if slow is None else slow)


# -- as the scheduler sees it --------------------------------------------------------------------


def _real(num_pages: int, num_slots: int, max_parked: int) -> PagedKVCache:
    geometry = LayerGeometry(num_kv_heads=1, key_dim=1, value_dim=1)
    layout = PagedLayout((geometry,), torch.float32, max_len=400, block_tokens=PAGE)
    size = num_pages * layout.page_bytes
    return PagedKVCache(layout, size, num_slots=num_slots, max_parked=max_parked)


def _batches(cache: object, policy: str, order: Order, seed: int) -> list[object]:
    """All steps of random requests: who computes how many tokens, and what may then be had."""
    rng = random.Random(seed)
    scheduler = Scheduler(
        cache,  # type: ignore[arg-type]
        POLICIES[policy](order),
        max_seqs=5,
        max_batch_tokens=24,
        clock=lambda: 0.0,
    )
    found: list[object] = []
    to_come = [
        (
            rng.randrange(40),
            [n + 1000] * rng.randrange(1, 60),
            rng.randrange(1, 30),
            rng.randrange(3),
        )
        for n in range(25)
    ]
    step = 0
    names: dict[object, int] = {}
    while to_come or scheduler.has_work:
        for number, (at, prompt, max_tokens, kind) in enumerate(list(to_come)):
            if at <= step:
                request = make_request(prompt, max_tokens, priority=kind, tenant=str(kind))
                request.queued_time_s = 0.0
                names[request] = prompt[0]
                scheduler.add(request)
                to_come[number] = (10**9, prompt, max_tokens, kind)
        to_come = [item for item in to_come if item[0] < 10**9]
        items = scheduler.schedule().items
        found.append(([(names[i.request], i.num_tokens) for i in items], scheduler.num_preemptions))
        for item in items:
            request, samples = item.request, item.samples
            request.num_computed += item.num_tokens
            if samples:
                request.token_ids.append(request.token_ids[-1])
                scheduler.accounts.generated(request)
                if request.num_output_tokens == request.max_tokens:
                    scheduler.finish(request)
        step += 1
        assert step < 5000
    return found


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("order", [Fcfs(), Priority(), Fair()], ids=lambda order: order.name)
def test_the_scheduler_decides_the_same_over_it_as_over_real_pages(
    policy: str, order: Order
) -> None:
    """Where memory is short, and so requests give way and come back."""
    num_preemptions = 0
    for seed in range(4):
        with _real(24, num_slots=5, max_parked=0) as real:
            expected = _batches(real, policy, order, seed)
        counting = CountingCache(24 * PAGE, page_tokens=PAGE, max_len=400, max_parked=0)
        assert _batches(counting, policy, order, seed) == expected
        assert counting.num_obtainable() == 24
        counting.check_invariants()
        num_preemptions += expected[-1][1]  # type: ignore[index]
    assert num_preemptions > 0


def test_prefixes_are_found_in_it_as_in_real_pages() -> None:
    rng = random.Random(5)
    counting = CountingCache(400, page_tokens=PAGE, max_len=400, max_parked=20)
    with _real(100, num_slots=40, max_parked=20) as real:
        for _ in range(30):
            tokens = [7] * rng.randrange(1, 20) + [rng.randrange(3)] * rng.randrange(1, 9)
            slots = []
            for cache in (real, counting):
                slot, found = cache.adopt(tokens)
                cache.grow(slot, len(tokens))  # type: ignore[arg-type]
                cache.park(slot, tokens)  # type: ignore[arg-type]
                slots.append(found)
            assert slots[0] == slots[1]
            assert real.num_obtainable() == counting.num_obtainable()
            real.check_invariants()
            counting.check_invariants()
