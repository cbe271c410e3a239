"""The map of memory: it says what the slots, the pool and the requests say."""

import asyncio
import json
import threading
from collections.abc import Iterator

import msgspec
import pytest
import zoo
from page_maps import check_page_map
from transformers import PreTrainedModel
from vkv import LLM, AsyncLLM, SamplingParams
from vkv.allocator import PagedKVCache, SlotCache
from vkv.runtime.engine.loop import EngineLoop
from vkv.runtime.engine.memory.memory_map import MemoryMap
from vkv.runtime.engine.messages import Add
from vkv.runtime.request.spec import RequestSpec
from vkv.vmem.errors import InvalidOperation

PROMPTS = zoo.random_prompts([70, 33, 5])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama")


@pytest.fixture(params=["virtual", "paged"])
def llm(model: PreTrainedModel, request: pytest.FixtureRequest) -> Iterator[LLM]:
    options = zoo.with_defaults({"kv": request.param, "max_seqs": 4, "max_parked": 3})
    with LLM(model, device="cpu", **options) as llm:
        yield llm


def _loop(llm: LLM) -> EngineLoop:
    return llm._driver._loop


def _add(name: str, prompt: list[int], *, count: int = 40, n: int = 1) -> Add:
    params = SamplingParams(temperature=1, seed=1, max_tokens=count, ignore_eos=True, n=n)
    return Add(RequestSpec(request_id=name, prompt_token_ids=prompt, params=params))


def _check(loop: EngineLoop) -> MemoryMap:
    """The map of now, compared with what the engine's parts say one by one."""
    engine, found = loop.engine, loop.memory_map()
    cache, pool = engine.cache, engine.cache.pool
    slots = [r.slot for r in engine.scheduler.running if r.slot is not None]
    check_page_map(cache, [*slots, *cache._table.parked])
    cache.check_invariants()
    assert found.kind == ("paged" if isinstance(cache, PagedKVCache) else "virtual")
    assert (found.num_running, found.num_waiting) == (len(slots), len(engine.scheduler.waiting))
    assert len(found.strips) == cache.num_slots - len(cache._table.free)
    totals = found.totals
    assert totals.held + totals.ahead + totals.parked == pool.num_held * found.page_bytes
    assert totals.physical == pool.num_created * found.page_bytes <= totals.limit
    assert totals.promised == pool.num_reserved * found.page_bytes
    assert sum(strip.num_promised for strip in found.strips) == pool.num_reserved
    for request in engine.scheduler.running:
        (strip,) = (s for s in found.strips if request.slot and s.slot == request.slot.index)
        assert (strip.state, strip.num_prompt_tokens) == ("live", request.num_prompt_tokens)
        assert request.key[0].endswith(strip.request.split("/")[0])
    assert all(not strip.request for strip in found.strips if strip.state == "parked")
    return found


def test_a_map_follows_requests_through_their_lives(llm: LLM) -> None:
    loop = _loop(llm)
    assert not _check(loop).strips
    loop.turn([_add(f"a-long-name-{i}", prompt) for i, prompt in enumerate(PROMPTS)])
    before = _check(loop)
    for _ in range(20):
        loop.turn()
        now = _check(loop)
        assert now.counters.steps == before.counters.steps + 1
        assert now.counters.output_tokens - before.counters.output_tokens <= len(PROMPTS)
        before = now
    assert [strip.request for strip in now.strips] == [f"a-long-name-{i}"[-12:] for i in range(3)]
    assert all(any(run.held for run in strip.runs) for strip in now.strips)
    while loop.engine.has_work:
        loop.turn()
        _check(loop)
    ended = _check(loop)
    assert {strip.state for strip in ended.strips} == {"parked"}
    assert ended.totals.held == 0 < ended.totals.parked
    assert ended.counters.prompt_tokens == sum(map(len, PROMPTS))
    assert ended.counters.output_tokens == 40 * len(PROMPTS)


def test_outputs_of_one_prompt_show_the_pages_that_they_share(llm: LLM) -> None:
    loop = _loop(llm)
    loop.turn([_add("several", PROMPTS[0], n=3)])
    while len(loop.engine.scheduler.running) < 3:
        loop.turn()
    found = _check(loop)
    assert [strip.request for strip in found.strips] == ["several", "several/1", "several/2"]
    assert all(any(run.shared for run in strip.runs) for strip in found.strips)
    pages = sum(
        sum(run) * lane.num_ranges
        for strip in found.strips
        for run, lane in zip(strip.runs, found.lanes, strict=True)
    )
    assert pages * found.page_bytes > found.totals.held + found.totals.ahead


def test_ranges_of_unequal_width_are_lanes_of_their_own() -> None:
    options = zoo.with_defaults({"split_kv": True, "layers_per_range": 1, "page_bytes": 4096})
    with LLM(zoo.tiny_model("deepseek_v3"), device="cpu", **options) as llm:
        loop = _loop(llm)
        loop.turn([_add("a", PROMPTS[0])])
        found = _check(loop)
        ranges = llm.engine.cache.layout.num_ranges  # type: ignore[attr-defined]
        assert 1 < len(found.lanes) < sum(lane.num_ranges for lane in found.lanes) == ranges
        assert len(found.strips[0].runs) == len(found.lanes)


def test_a_map_is_plain_data_and_equal_maps_are_equal(llm: LLM) -> None:
    loop = _loop(llm)
    loop.turn([_add("a", PROMPTS[1])])
    found = loop.memory_map()
    packed = msgspec.msgpack.encode(found)
    assert msgspec.msgpack.decode(packed, type=MemoryMap) == found == loop.memory_map()
    (strip,) = json.loads(msgspec.json.encode(found))["strips"]
    assert strip["runs"] == [list(run) for run in found.strips[0].runs]
    loop.turn()
    assert loop.memory_map() != found


def test_drawing_asks_of_slots_and_never_of_pages(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the slots: a page is looked up where sharing begins, or might, and no more."""
    loop = _loop(llm)
    loop.turn([_add(f"a{i}", prompt * 5) for i, prompt in enumerate(PROMPTS)])
    llm.engine.cache._look_ahead.drain()  # it asks, too
    pool, asked = llm.engine.cache.pool, []
    references = pool.references
    monkeypatch.setattr(pool, "references", lambda page: asked.append(page) or references(page))
    found = loop.memory_map()
    assert 0 < len(asked) <= len(found.strips) * len(found.lanes)


def test_a_map_is_had_while_others_turn_the_loop(model: PreTrainedModel) -> None:
    """Two callers at once, from threads and an event loop, while the engine has work throughout."""

    async def run() -> None:
        async with AsyncLLM(model, device="cpu", **zoo.with_defaults({})) as llm:
            params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
            stream = llm.generate([1, 2, 3], params)
            async for _ in stream:
                maps = await asyncio.gather(llm.memory_map(), llm.memory_map())
                if maps[0].counters.output_tokens >= 20:
                    break
            assert [strip.state for strip in maps[0].strips] == ["live"]
            assert maps[0].num_running == 1
            await stream.aclose()
            assert not (await llm.memory_map()).num_running
        with pytest.raises(InvalidOperation, match="closed"):
            await llm.memory_map()

    asyncio.run(run())


def test_who_waits_for_a_map_is_told_that_the_llm_was_closed(llm: LLM) -> None:
    told: list[BaseException] = []

    def ask() -> None:
        try:
            llm._driver.memory_map()
        except InvalidOperation as error:
            told.append(error)

    thread = threading.Thread(target=ask)
    with llm._driver._exclusive():  # as in the middle of a step
        thread.start()
        llm._driver._loop.close()
    thread.join(20)
    assert not thread.is_alive()
    assert len(told) == 1


def test_a_cache_that_no_engine_has_is_drawn_alike(llm: LLM) -> None:
    cache: SlotCache = llm.engine.cache
    slot = cache.open()
    cache.reserve(slot, 40)
    (drawn,) = cache.page_map().slots
    assert drawn.num_promised == cache.num_pages(40)
    assert not any(map(sum, drawn.runs))
    cache.close(slot)
