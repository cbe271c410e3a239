"""`AsyncLLM`: the tokens of `LLM`, cancellation, back-pressure, errors, and the end."""

import asyncio
import gc
import itertools
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zoo
from transformers import PreTrainedModel
from vkv import LLM, AsyncLLM, RequestOutput, SamplingParams
from vkv.vmem import janitor
from vkv.vmem.errors import InvalidConfig, InvalidOperation, RequestTooLong


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama")


@asynccontextmanager
async def opened(model: PreTrainedModel, **options: Any) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(model, device="cpu", **zoo.with_defaults(options)) as llm:
        yield llm
        await idle(llm)
        llm.engine.cache.check_invariants()
        stats = llm.stats()
        assert stats.pages_held == stats.pages_parked


async def idle(llm: AsyncLLM) -> None:
    """Wait until the engine has nothing to do."""
    async with asyncio.timeout(20):
        while llm._thread.driver.has_work:
            await asyncio.sleep(0.005)


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    async for output in outputs:
        final = output
    return final


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), timeout=60))


def test_many_tasks_get_the_tokens_of_generate(model: PreTrainedModel) -> None:
    prompts = zoo.random_prompts([5, 30, 12, 44, 3, 21])
    with LLM(model, device="cpu", **zoo.with_defaults({})) as llm:
        expected = [out.outputs[0].token_ids for out in llm.generate(prompts, zoo.greedy(20))]

    async def main() -> None:
        async with opened(model, max_unfinished=2) as llm:
            outputs = await asyncio.gather(
                *(last(llm.generate(prompt, zoo.greedy(20))) for prompt in prompts)
            )
            assert [out.outputs[0].token_ids for out in outputs] == expected
            assert all(out.finished for out in outputs)

    run(main)


def test_64_ragged_tasks_in_a_third_of_the_memory(model: PreTrainedModel) -> None:
    draw = random.Random(0)
    lengths = [(int(4 * 40 ** draw.random()), int(4 * 16 ** draw.random())) for _ in range(64)]
    prompts = zoo.random_prompts([prompt for prompt, _ in lengths])
    params = [zoo.greedy(output) for _, output in lengths]
    with LLM(model, device="cpu", **zoo.with_defaults({"max_seqs": 8})) as llm:
        expected = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]

    async def main() -> None:
        async with opened(model, max_seqs=64, kv_memory=60 * 4096, max_batch_tokens=48) as llm:
            outputs = await asyncio.gather(
                *(last(llm.generate(*pair)) for pair in zip(prompts, params, strict=True))
            )
            assert [out.outputs[0].token_ids for out in outputs] == expected
            assert llm.stats().num_preemptions > 0

    run(main)


def test_a_priority_can_change_by_name_in_the_engine_and_before_it(
    model: PreTrainedModel,
) -> None:
    async def main() -> None:
        async with opened(model, max_seqs=1, max_unfinished=3, scheduling_policy="priority") as llm:
            ended: list[str] = []

            async def ask(name: str, priority: int, count: int = 8) -> None:
                final = await last(
                    llm.generate([1, 2, 3], zoo.greedy(count), name, priority=priority, tenant=name)
                )
                assert len(final.outputs[0].token_ids) == count
                ended.append(name)

            begun = asyncio.create_task(ask("long", 0, 150))
            while not llm.stats().num_running:
                await asyncio.sleep(0.001)
            tasks = [asyncio.create_task(ask(name, 5)) for name in "abcd"]
            await asyncio.sleep(0.01)
            llm.set_priority("d", -1)  # which waits for its place
            llm.set_priority("b", 1)
            llm.set_priority("nobody", 1)
            await asyncio.gather(begun, *tasks)
            assert ended.index("b") < ended.index("a")
            assert ended.index("d") < ended.index("c")
            told = {tenant.tenant: tenant.output_tokens for tenant in llm.stats().tenants}
            assert told == {"long": 150, **dict.fromkeys("abcd", 8)}
        async with opened(model) as plain:
            with pytest.raises(InvalidConfig, match="priority is 2"):
                plain.set_priority("a", 2)
            with pytest.raises(InvalidConfig, match="priority is 2"):
                plain.generate([1], priority=2)

    run(main)


def test_outputs_grow(model: PreTrainedModel) -> None:
    async def main() -> None:
        async with opened(model) as llm:
            seen: list[tuple[int, ...]] = []
            async for output in llm.generate([1, 2, 3], zoo.greedy(15), request_id="mine"):
                assert output.request_id == "mine"
                seen.append(output.outputs[0].token_ids)
            assert len(seen[-1]) == 15
            for before, after in itertools.pairwise(seen):
                assert after[: len(before)] == before

    run(main)


def test_a_cancelled_task_gives_its_pages_back(model: PreTrainedModel) -> None:
    async def main() -> None:
        async with opened(model, prefix_reuse=False, max_parked=0) as llm:
            endless = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
            started = asyncio.Event()

            async def consume() -> None:
                async for _ in llm.generate([1] * 30, endless):
                    started.set()

            task = asyncio.create_task(consume())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await idle(llm)
            assert llm.stats().pages_held == 0
            async for _ in llm.generate([1] * 30, endless):
                break  # leaving the loop is as good
            gc.collect()
            await idle(llm)
            assert llm.stats().pages_held == 0

    run(main)


def test_abort_ends_with_an_output(model: PreTrainedModel) -> None:
    async def main() -> None:
        async with opened(model) as llm:
            endless = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
            async for output in llm.generate([1, 2], endless, request_id="x"):
                final = output
                llm.abort("x")
                llm.abort("nobody")
            assert final.finished
            assert final.outputs[0].finish_reason == "abort"

    run(main)


def test_a_slow_consumer_gets_the_newest_state(model: PreTrainedModel) -> None:
    async def main() -> None:
        async with opened(model) as llm:
            seen: list[RequestOutput] = []
            async for output in llm.generate([1, 2, 3], zoo.greedy(100)):
                seen.append(output)
                await idle(llm)
            assert len(seen[-1].outputs[0].token_ids) == 100
            assert len(seen) <= 3

    run(main)


def test_admission_is_bounded(model: PreTrainedModel) -> None:
    async def main() -> None:
        async with opened(model, max_unfinished=3) as llm:
            most = 0

            async def watch() -> None:
                nonlocal most
                async for _ in llm.generate([1, 2, 3], zoo.greedy(30)):
                    stats = llm.stats()
                    most = max(most, stats.num_running + stats.num_waiting)

            await asyncio.gather(*(watch() for _ in range(12)))
            assert 1 <= most <= 3

    run(main)
    with pytest.raises(InvalidConfig, match="max_unfinished is 0"):
        AsyncLLM(model, max_unfinished=0)


def test_a_refusal_is_its_callers_alone(model: PreTrainedModel) -> None:
    async def main() -> None:
        async with opened(model) as llm:
            good = asyncio.create_task(last(llm.generate([1, 2, 3], zoo.greedy(40))))
            with pytest.raises(RequestTooLong):
                await last(llm.generate([1] * 400, zoo.greedy(4)))
            assert len((await good).outputs[0].token_ids) == 40

    run(main)


def test_an_engine_that_stops_tells_everyone(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncLLM(model, device="cpu", **zoo.with_defaults({})) as llm:
            steps = iter(range(5))

            def step() -> None:
                if next(steps, None) is None:
                    raise AssertionError("a bug")
                time.sleep(0.01)

            monkeypatch.setattr(llm.engine, "step", step)
            results = await asyncio.gather(
                *(last(llm.generate([1, 2, 3], zoo.greedy(9))) for _ in range(3)),
                return_exceptions=True,
            )
            assert all(isinstance(result, AssertionError) for result in results)
            with pytest.raises(InvalidOperation):
                await last(llm.generate([1], zoo.greedy(1)))

    run(main)


def test_closing_ends_what_runs(model: PreTrainedModel) -> None:
    async def main() -> None:
        llm = AsyncLLM(model, device="cpu", **zoo.with_defaults({}))
        endless = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)
        tasks = [asyncio.create_task(last(llm.generate([i], endless))) for i in range(4)]
        await asyncio.sleep(0.05)
        await llm.close()
        await llm.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, InvalidOperation) for result in results)
        assert not llm._thread.thread.is_alive()
        assert llm._thread.driver.is_closed

    run(main)


def test_dropped_without_close_it_ends_too(model: PreTrainedModel) -> None:
    async def main() -> None:
        llm = AsyncLLM(model, device="cpu", **zoo.with_defaults({}))
        await last(llm.generate([1, 2, 3], zoo.greedy(5)))
        thread, driver = llm._thread.thread, llm._thread.driver
        del llm
        gc.collect()
        await asyncio.to_thread(janitor.drain, 20)
        assert not thread.is_alive()
        assert driver.is_closed

    run(main)
    assert not [t for t in threading.enumerate() if t.name == "vkv-engine" and t.is_alive()]
