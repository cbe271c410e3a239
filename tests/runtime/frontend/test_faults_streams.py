"""Streams that are dropped anywhere, or read in turns: nothing is torn, and nothing is lost."""

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import zoo
from transformers import PreTrainedModel
from vkv import LLM, MemoryLimit
from vkv.runtime.frontend.text_stream import StreamDelta
from vkv.vmem import janitor


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama")


@pytest.fixture
def first(model: PreTrainedModel) -> Iterator[LLM]:
    with LLM(model, device="cpu", **zoo.with_defaults({})) as llm:
        yield llm
        _assert_whole(llm)


def _assert_whole(*llms: LLM) -> None:
    assert janitor.drain(20)
    for llm in llms:
        zoo.assert_idle(llm)
        llm.engine.cache.check_invariants()
        llm.trim()
        assert llm.stats().pages_held == 0
        assert llm.stats().kv.slots_open == 0


def _leave_in_a_cycle(llm: LLM) -> None:
    """A stream left by an exception that is kept: only the collector ends it."""
    kept: list[Any] = []
    try:
        for _ in llm.stream([1, 2, 3] * 9, zoo.greedy(100)):
            raise RuntimeError("the caller's own")
    except RuntimeError as error:
        kept += [error, kept]


def _tokens(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    outs = llm.generate([list(prompt) for prompt in prompts], zoo.greedy(30))
    return [out.outputs[0].token_ids for out in outs]


def _collect_in(
    patched: pytest.MonkeyPatch, where: Any, name: str, times: list[str]
) -> Callable[..., Any]:
    """Run the collector within each call of a method, as it may start anywhere."""
    method = getattr(where, name)

    def collecting(*args: Any, **options: Any) -> Any:
        gc.collect()
        times.append(threading.current_thread().name)
        result = method(*args, **options)
        gc.collect()
        return result

    patched.setattr(where, name, collecting)
    return method


@pytest.mark.parametrize(
    "where",
    [
        lambda llm: (llm.engine.runner, "launch"),
        lambda llm: (llm.engine.scheduler, "schedule"),
        lambda llm: (llm.engine.cache, "grow"),
        lambda llm: (llm.engine.cache.pool, "commit"),
        lambda llm: (llm.engine.cache.pool.driver, "map"),
    ],
)
def test_a_stream_collected_within_another_step(
    first: LLM, where: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = zoo.random_prompts([20, 40, 10])
    expected = _tokens(first, prompts)
    first.trim()
    times: list[str] = []
    for _ in range(3):
        _leave_in_a_cycle(first)
        with monkeypatch.context() as patched:
            _collect_in(patched, *where(first), times)
            assert _tokens(first, prompts) == expected
        first.trim()
    assert times


def test_a_stream_collected_on_the_look_ahead_thread(
    first: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That thread holds the cache's lock, and whoever steps holds the engine's and waits."""
    prompts = zoo.random_prompts([20, 40, 10])
    expected = _tokens(first, prompts)
    first.trim()
    backing, times = first.engine.cache._backing, []
    map_ahead = backing.map_ahead

    def collecting(*args: Any) -> None:
        gc.collect()
        times.append(threading.current_thread().name)
        map_ahead(*args)

    gc.disable()
    try:
        _leave_in_a_cycle(first)
        monkeypatch.setattr(backing, "map_ahead", collecting)
        assert _tokens(first, prompts) == expected
    finally:
        gc.enable()
    assert set(times) == {"vkv-look-ahead"}


@pytest.mark.parametrize("drop", ["stream", "llm"])
def test_what_is_collected_within_the_critical_section_of_a_neighbour(
    model: PreTrainedModel, drop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines under one limit share a lock, and wait for each other's memory."""
    options = zoo.with_defaults({"kv_memory": MemoryLimit("1MiB"), "max_len": 128})
    prompts = zoo.random_prompts([20, 40, 10])
    with LLM(model, device="cpu", **options) as one:
        expected = _tokens(one, prompts)
        two = LLM(model, device="cpu", **options)
        _leave_in_a_cycle(two)
        cycle: list[Any] = [two] if drop == "llm" else []
        cycle.append(cycle)
        done = threading.Event()
        other = two if drop == "stream" else one
        del two, cycle
        times: list[str] = []
        with monkeypatch.context() as patched:
            _collect_in(patched, one.engine.cache._backing, "shrink", times)
            _collect_in(patched, one.engine.cache._backing, "grow", times)
            threading.Thread(target=lambda: (other.stats(), done.set())).start()
            assert _tokens(one, prompts) == expected
            one.trim()
        assert done.wait(20)
        assert times
        _assert_whole(one, other)
        limit = options["kv_memory"]
        if drop == "llm":
            one.close()
            assert limit.taken_bytes == 0
        else:
            other.close()


def test_a_dropped_stream_gives_its_pages_back_though_nobody_steps(first: LLM) -> None:
    _leave_in_a_cycle(first)
    gc.collect()
    assert janitor.drain(20)
    assert first.engine.cache.stats().slots_open == 0
    assert not first.engine.has_work


# -- whoever does the stepping -----------------------------------------------------------------


def _collect(deltas: Sequence[StreamDelta]) -> tuple[list[int], list[str]]:
    tokens = [token for delta in deltas for token in delta.token_ids]
    return tokens, [delta.finish_reason for delta in deltas if delta.finish_reason]


def test_streams_read_in_turns_each_get_all(first: LLM) -> None:
    prompts = zoo.random_prompts([20, 5, 33])
    counts = [20, 31, 7]
    params = [zoo.greedy(count) for count in counts]
    expected = [list(o.outputs[0].token_ids) for o in first.generate(prompts, params)]
    streams = [first.stream(*pair) for pair in zip(prompts, params, strict=True)]
    deltas: list[list[StreamDelta]] = [[] for _ in streams]
    live = set(range(3))
    while live:
        for index in sorted(live):
            delta = next(streams[index], None)
            if delta is None:
                live.remove(index)
            else:
                deltas[index].append(delta)
    for index, tokens in enumerate(expected):
        assert _collect(deltas[index]) == (tokens, ["length"])


@pytest.mark.parametrize("count", [1, 2, 50])
def test_generate_between_two_deltas_costs_no_token(first: LLM, count: int) -> None:
    prompt, other = zoo.random_prompts([12, 30])
    (out,) = first.generate(prompt, zoo.greedy(20))
    deltas = []
    for delta in first.stream(prompt, zoo.greedy(20)):
        deltas.append(delta)
        first.generate(other, zoo.greedy(count))
        first.stats()
    assert _collect(deltas) == (list(out.outputs[0].token_ids), ["length"])


def test_a_stream_that_others_finished_is_still_all_there(first: LLM) -> None:
    stream = first.stream([1, 2, 3], zoo.greedy(10))
    deltas = [next(stream)]
    first.generate([4, 5, 6], zoo.greedy(60))
    assert not first.engine.has_work
    deltas += list(stream)
    assert len(deltas) <= 3
    tokens, reasons = _collect(deltas)
    (out,) = first.generate([1, 2, 3], zoo.greedy(10))
    assert (tokens, reasons) == (list(out.outputs[0].token_ids), ["length"])


def test_streams_on_threads_each_get_all(first: LLM) -> None:
    prompts = zoo.random_prompts([20, 5, 33, 9])
    expected = _tokens(first, prompts)
    got: dict[int, tuple[list[int], list[str]]] = {}

    def read(index: int) -> None:
        deltas = []
        for delta in first.stream(prompts[index], zoo.greedy(30)):
            deltas.append(delta)
            time.sleep(0.001 * index)
        got[index] = _collect(deltas)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: (list(tokens), ["length"]) for i, tokens in enumerate(expected)}
