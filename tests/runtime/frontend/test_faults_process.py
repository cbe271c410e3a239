"""Forked children, which are refused at once, and the interpreter's end under running engines."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import standin.process
import torch
import zoo
from transformers import PreTrainedModel
from vkv import LLM, AsyncLLM, VirtualCache
from vkv.vmem.errors import ForkedProcess

_PATIENCE_S = 20


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama")


@contextlib.contextmanager
def held_elsewhere(*locks: Any) -> Iterator[None]:
    """Meanwhile another thread holds all of them, as one that is in the middle of a step."""
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            go_on.wait(_PATIENCE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(_PATIENCE_S)
    yield
    go_on.set()
    thread.join()


def num_not_refused(entries: dict[str, Callable[[], Any]]) -> int:
    """Of a forked child: how many `entries` did anything but raise ForkedProcess at once."""

    def child() -> int:
        signal.alarm(_PATIENCE_S)  # one that waits for a lock is killed by it
        wrong = 0
        for name, entry in entries.items():
            with contextlib.suppress(ForkedProcess):
                entry()
                sys.stderr.write(f"{name} was not refused\n")
                wrong += 1
        return wrong

    return standin.process.run_in_fork(child)


def _locks_of(llm: Any, driver: Any) -> list[Any]:
    cache = llm.engine.cache
    return [driver._lock, cache.pool._created, cache.pool.driver._lock, cache._look_ahead._lock]


def test_every_entry_of_an_llm_refuses_a_child(model: PreTrainedModel) -> None:
    options = zoo.with_defaults({"idle_trim_s": 60.0})
    with LLM(model, device="cpu", **options) as llm:
        expected = llm.generate([1, 2, 3] * 9, zoo.greedy(20))[0].outputs[0].token_ids
        stream = llm.stream([1, 2], zoo.greedy(9))
        next(stream)
        entries = {
            "generate": lambda: llm.generate([1, 2, 3] * 9, zoo.greedy(20)),
            "chat": lambda: llm.chat([{"role": "user", "content": "x"}]),
            "stream": lambda: llm.stream([1]),
            "a stream begun before": lambda: next(stream),
            "stats": llm.stats,
            "trim": llm.trim,
            "sleep": llm.sleep,
            "wake": llm.wake,
        }
        with held_elsewhere(*_locks_of(llm, llm._driver), llm._driver._idle._changed):  # type: ignore[union-attr]
            assert num_not_refused(entries) == 0
            assert standin.process.run_in_fork(lambda: llm.close() or 7) == 7
        assert sum(len(delta.token_ids) for delta in stream) == 8
        again = llm.generate([1, 2, 3] * 9, zoo.greedy(20))[0]
        assert again.outputs[0].token_ids == expected
        llm.engine.cache.check_invariants()


def test_every_entry_of_an_async_llm_refuses_a_child(model: PreTrainedModel) -> None:
    async_llm = AsyncLLM(model, device="cpu", **zoo.with_defaults({}))
    entries = {
        "generate": lambda: async_llm.generate([1, 2]),
        "abort": lambda: async_llm.abort("x"),
        "stats": async_llm.stats,
        "sleep": lambda: asyncio.run(async_llm.sleep()),
        "wake": lambda: asyncio.run(async_llm.wake()),
    }
    locks = [async_llm._requests._naming, async_llm._requests._places._lock]
    driver = async_llm._thread.driver
    try:
        with held_elsewhere(*_locks_of(async_llm, driver), *locks):
            assert num_not_refused(entries) == 0
            closed = standin.process.run_in_fork(lambda: asyncio.run(async_llm.close()) or 7)
            assert closed == 7
    finally:
        asyncio.run(async_llm.close())


def test_a_virtual_cache_refuses_a_child(model: PreTrainedModel) -> None:
    cache = VirtualCache(model.config, max_len=64)
    states = torch.ones(1, 2, 3, 8)
    cache.update(states, states, 0)
    entries = {
        "update": lambda: cache.update(states, states, 0),
        "update of a new layer": lambda: cache.update(states, states, 1),
        "crop": lambda: cache.crop(-1),
        "reorder_cache": lambda: cache.reorder_cache(torch.tensor([0])),
        "batch_select_indices": lambda: cache.batch_select_indices(torch.tensor([0])),
        "batch_repeat_interleave": lambda: cache.batch_repeat_interleave(2),
        "stats": cache.stats,
    }
    with held_elsewhere(cache._arena._lock):
        assert num_not_refused(entries) == 0
    assert cache.get_seq_length() == 3
    keys, _ = cache.update(states, states, 0)
    assert keys.shape[-2] == 6


# -- the end of the interpreter ----------------------------------------------------------------

_OPEN = """
import asyncio, atexit, os, sys, threading, time
import zoo
from vkv import LLM, AsyncLLM
model = zoo.tiny_model("llama")
options = zoo.with_defaults({"idle_trim_s": 0.01})
endless = zoo.greedy(200)
"""

_ASYNC = """
async def consume(i):
    async for _ in llm.generate([1, i], endless):
        started.set()
"""

_ENDINGS = {
    "an event loop on a daemon thread": """
llm = AsyncLLM(model, device="cpu", **options)
started = threading.Event()
async def main():
    while True:
        await asyncio.gather(*(consume(i) for i in range(4)))
threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
started.wait()
""",
    "an event loop that ends first": """
async def main():
    global llm, started
    llm, started = AsyncLLM(model, device="cpu", **options), asyncio.Event()
    global task
    task = asyncio.create_task(consume(1))
    await started.wait()
asyncio.run(main())
""",
    "generating on daemon threads": """
llms = [LLM(model, device="cpu", **options) for _ in range(2)]
started = threading.Barrier(5)
def work(llm):
    llm.generate([1], zoo.greedy(3))
    started.wait()
    while True:
        llm.generate([[1, 2, 3] * 9, [4] * 30], endless)
def read(llm):
    started.wait()
    while True:
        for _ in llm.stream([1, 2, 3], endless): pass
for llm in llms:
    threading.Thread(target=work, args=(llm,), daemon=True).start()
    threading.Thread(target=read, args=(llm,), daemon=True).start()
started.wait()
time.sleep(0.05)
""",
    "a handler at exit of the caller's": """
llm = LLM(model, device="cpu", **options)
atexit.register(lambda: (llm.generate([1, 2], zoo.greedy(5)), llm.close()))
def work():
    while True:
        llm.generate([1, 2, 3], endless)
llm.generate([1], zoo.greedy(3))
from vkv.vmem import at_exit
atexit.unregister(at_exit._ending.stop_all)
atexit.register(at_exit._ending.stop_all)  # before the caller's
threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
""",
    "an exception": """
llm = LLM(model, device="cpu", **options)
for _ in llm.stream([1, 2, 3], endless):
    raise SystemExit(0)
""",
}


@pytest.mark.parametrize("ending", _ENDINGS)
def test_the_interpreter_ends_quietly(ending: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _OPEN + _ASYNC + _ENDINGS[ending]],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2] / "support",
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
