"""`AsyncLLM` under malformed requests, shortages, failures, and event loops that come and go."""

import asyncio
import gc
import resource
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zoo
from transformers import PreTrainedModel
from vkv import LLM, AsyncLLM, MemoryLimit, RequestOutput, SamplingParams
from vkv.runtime.request.step_output import StepOutput
from vkv.vmem import janitor
from vkv.vmem.errors import (
    DriverError,
    InvalidOperation,
    InvalidSamplingParams,
    OutOfPages,
    StepFailed,
    VkvError,
)

_PROMPTS = zoo.random_prompts([20, 5, 33, 9])
_ENDLESS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama")


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> list[tuple[int, ...]]:
    with LLM(model, device="cpu", **zoo.with_defaults({})) as llm:
        return [out.outputs[0].token_ids for out in llm.generate(_PROMPTS, zoo.greedy(60))]


@contextmanager
def opened(model: PreTrainedModel, **options: Any) -> Iterator[AsyncLLM]:
    """Checked, and closed, without an event loop."""
    llm = AsyncLLM(model, device="cpu", **zoo.with_defaults(options))
    try:
        yield llm
        _wait(lambda: not llm._thread.driver.has_work)
        gc.collect()
        assert janitor.drain(20)
        stats = llm.stats()
        assert stats.pages_held == stats.pages_parked
        llm.engine.cache.check_invariants()
        assert llm._requests._places.num_free == options.get("max_unfinished", 256)
        assert not len(llm._thread.driver._sinks)
    finally:
        asyncio.run(llm.close())


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.002)


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    async for output in outputs:
        final = output
    return final


async def _neighbours(llm: AsyncLLM) -> list[tuple[int, ...]]:
    outs = await asyncio.gather(*(last(llm.generate(p, zoo.greedy(60))) for p in _PROMPTS))
    return [out.outputs[0].token_ids for out in outs]


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), timeout=60))


# -- one request's fault is its own ------------------------------------------------------------

_EVERY_TOKEN = tuple(range(zoo.VOCAB_SIZE))


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"temperature": 0}, InvalidSamplingParams),
        (SamplingParams(temperature=0, repetition_penalty=1e-300), InvalidOperation),
        (
            SamplingParams(temperature=0, min_tokens=3, max_tokens=9, stop_token_ids=_EVERY_TOKEN),
            InvalidOperation,
        ),
        (SamplingParams(stop_token_ids=(zoo.VOCAB_SIZE,)), InvalidSamplingParams),
    ],
)
def test_a_malformed_request_fails_alone(
    model: PreTrainedModel, expected: list[tuple[int, ...]], params: Any, error: type[VkvError]
) -> None:
    with opened(model) as llm:

        async def main() -> None:
            neighbours = asyncio.create_task(_neighbours(llm))
            for _ in range(3):
                await asyncio.sleep(0.01)
                with pytest.raises(error):
                    await last(llm.generate([1, 2, 3], params))
            assert await neighbours == expected
            assert await _neighbours(llm) == expected

        run(main)


def test_an_end_token_outside_the_vocabulary_is_nobodys(expected: list[tuple[int, ...]]) -> None:
    model = zoo.tiny_model("llama", eos_token_id=[3, zoo.VOCAB_SIZE, 10**6])
    with opened(model) as llm:
        assert llm.engine._eos_token_ids == {3}

        async def main() -> None:
            patient = SamplingParams(temperature=0, min_tokens=9, max_tokens=9)
            neighbours = asyncio.create_task(_neighbours(llm))
            assert len((await last(llm.generate([1, 2], patient))).outputs[0].token_ids) == 9
            assert await neighbours == expected

        run(main)


@pytest.mark.parametrize("waits", [True, False])
def test_a_shortage_that_a_neighbour_ends_is_waited_for(
    model: PreTrainedModel, expected: list[tuple[int, ...]], waits: bool
) -> None:
    limit = MemoryLimit("64KiB")
    options = {"kv_memory": limit, "max_len": 256}
    with (
        LLM(model, device="cpu", **zoo.with_defaults(options)) as busy,
        opened(model, **options, shortage_wait_s=20.0 if waits else 0.05) as llm,
    ):
        stream = busy.stream([1] * 245, zoo.greedy(11))  # which holds all pages from the start
        next(stream)

        async def main() -> None:
            asked = asyncio.create_task(last(llm.generate(_PROMPTS[2], zoo.greedy(60))))
            if not waits:
                with pytest.raises(OutOfPages):
                    await asked
                list(stream)
                busy.trim()
                asked = asyncio.create_task(last(llm.generate(_PROMPTS[2], zoo.greedy(60))))
            else:
                while llm.engine.scheduler.shortage is None:
                    await asyncio.sleep(0.001)
                list(stream)
            assert (await asked).outputs[0].token_ids == expected[2]

        run(main)


def test_what_was_copied_of_the_last_request_is_a_neighbours(model: PreTrainedModel) -> None:
    """At rest it notices that, or the slot would stay pinned until its next request comes."""
    options = {"kv_memory": MemoryLimit("64KiB"), "max_len": 256}
    with (
        opened(model, **options, swap_memory="1MiB") as resting,
        LLM(model, device="cpu", **zoo.with_defaults(options), shortage_wait_s=1.0) as llm,
    ):

        async def main() -> None:
            await last(resting.generate([1] * 200, zoo.greedy(5)))

        run(main)
        _wait(lambda: resting.engine.scheduler.tiers.is_settled)
        (out,) = llm.generate([[2] * 230], zoo.greedy(10))
        assert out.error is None
        assert len(out.outputs[0].token_ids) == 10


def _failing(calls: Any, error: Exception, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, but the calls of these numbers raise."""
    number = iter(range(10**9))

    def call(*args: Any, **options: Any) -> Any:
        if next(number) in calls:
            raise error
        return method(*args, **options)

    return call


@pytest.mark.parametrize("name", ["_create", "_map", "_map_unbacked", "_punch", "record_fence"])
@pytest.mark.parametrize("calls", [range(1, 3), range(2, 60, 3), range(4, 30)])
def test_a_driver_that_refuses_for_a_moment(
    model: PreTrainedModel,
    expected: list[tuple[int, ...]],
    name: str,
    calls: range,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests wait or fail with a typed error; what comes is right, and the engine lives."""
    with opened(model, kv_memory="256KiB", max_parked=2, shortage_wait_s=0.02) as llm:
        driver = llm.engine.cache.pool.driver
        error = DriverError(f"{name} was refused")

        async def main() -> None:
            with monkeypatch.context() as patched:
                patched.setattr(driver, name, _failing(calls, error, getattr(driver, name)))
                for _ in range(3):
                    outs = await asyncio.gather(
                        *(last(llm.generate(p, zoo.greedy(60))) for p in _PROMPTS),
                        return_exceptions=True,
                    )
                    for out, tokens in zip(outs, expected, strict=True):
                        if isinstance(out, BaseException):
                            assert isinstance(out, DriverError), out
                        else:
                            assert out.outputs[0].token_ids == tokens
            assert await _neighbours(llm) == expected

        run(main)
        llm._thread.driver.trim()
        assert llm.stats().pages_held == 0
        assert llm.stats().kv.slots_open == 0


def test_running_out_of_files_for_a_moment(
    model: PreTrainedModel, expected: list[tuple[int, ...]]
) -> None:
    """To ask what memory is available takes an open file."""
    kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened(model, shortage_wait_s=0.05, look_ahead_tokens=0) as llm:

        async def main() -> None:
            await _neighbours(llm)
            await asyncio.to_thread(llm._thread.driver.trim)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, kept[1]))
            try:
                with pytest.raises(DriverError, match="open files"):
                    await last(llm.generate(_PROMPTS[0], zoo.greedy(60)))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, kept)
            assert await _neighbours(llm) == expected

        run(main)


def test_text_that_cannot_be_made_fails_its_request_alone(
    model: PreTrainedModel, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(model) as llm:

        async def main() -> None:
            neighbours = asyncio.create_task(_neighbours(llm))
            outputs = llm.generate([1, 2, 3], _ENDLESS, request_id="mine")
            (stream,) = llm._requests._named["mine"]
            bad = _failing([4], ValueError("no text"), stream.request._sequences[0].accept)
            monkeypatch.setattr(stream.request._sequences[0], "accept", bad)
            del stream
            with pytest.raises(StepFailed, match="no text"):
                await last(outputs)
            assert await neighbours == expected

        run(main)


# -- names ---------------------------------------------------------------------------------------


def test_aborting_one_that_waits_for_its_place(model: PreTrainedModel) -> None:
    with opened(model, max_unfinished=1) as llm:

        async def main() -> None:
            first = asyncio.create_task(last(llm.generate([1, 2], _ENDLESS, "first")))
            waiting = asyncio.create_task(last(llm.generate([1, 3], _ENDLESS, "waiting")))
            late = llm.generate([1, 4], _ENDLESS, "late")
            await asyncio.sleep(0.02)
            llm.abort("late")
            llm.abort("waiting")
            out = await waiting
            assert (out.request_id, out.finished) == ("waiting", True)
            assert out.outputs[0].finish_reason == "abort"
            assert out.outputs[0].token_ids == ()
            assert not first.done()
            assert (await last(late)).outputs[0].finish_reason == "abort"
            llm.abort("first")
            assert (await first).outputs[0].finish_reason == "abort"

        run(main)


def test_a_name_taken_again_at_once_is_another_request(
    model: PreTrainedModel, expected: list[tuple[int, ...]]
) -> None:
    with opened(model, max_unfinished=2) as llm:

        async def main() -> None:
            for _ in range(10):
                old = asyncio.create_task(last(llm.generate([1, 2], _ENDLESS, "job")))
                await asyncio.sleep(0.005)
                llm.abort("job")
                new = llm.generate(_PROMPTS[0], zoo.greedy(60), "job")
                llm.abort("jo")
                assert (await last(new)).outputs[0].token_ids == expected[0]
                assert (await old).outputs[0].finish_reason == "abort"

        run(main)


def test_aborting_several_of_one_name_from_another_thread(model: PreTrainedModel) -> None:
    with opened(model) as llm:

        async def main() -> None:
            tasks = [
                asyncio.create_task(last(llm.generate([1, i], _ENDLESS, "same"))) for i in range(3)
            ]
            await asyncio.sleep(0.01)
            await asyncio.to_thread(llm.abort, "same")
            for out in await asyncio.gather(*tasks):
                assert out.outputs[0].finish_reason == "abort"

        run(main)
        gc.collect()
        _wait(lambda: not len(llm._requests._named))  # the engine may still hand an end over


# -- event loops ---------------------------------------------------------------------------------


def test_several_event_loops_at_once_and_one_after_the_other(
    model: PreTrainedModel, expected: list[tuple[int, ...]]
) -> None:
    with opened(model, max_unfinished=2) as llm:
        results: list[list[tuple[int, ...]]] = []

        def work() -> None:
            for _ in range(2):
                results.append(asyncio.run(_neighbours(llm)))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [expected] * 6


def _left_behind(llm: AsyncLLM, num_tasks: int, until: Callable[[], bool]) -> None:
    """An event loop that is closed with all its tasks in the middle of something."""
    loop = asyncio.new_event_loop()

    async def main() -> None:
        tasks = [
            asyncio.ensure_future(last(llm.generate([1, index], _ENDLESS)))
            for index in range(num_tasks)
        ]
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        while not until():
            await asyncio.sleep(0.001)

    loop.run_until_complete(main())
    loop.close()


def test_places_of_a_closed_event_loop_return(
    model: PreTrainedModel, expected: list[tuple[int, ...]]
) -> None:
    with opened(model, max_unfinished=2) as llm:
        for _ in range(3):
            _left_behind(llm, 5, lambda: llm.engine.has_work)
            gc.collect()
            assert asyncio.run(_neighbours(llm)) == expected


def test_a_place_given_to_a_loop_that_is_closed_returns(model: PreTrainedModel) -> None:
    """It was called, and never came: nothing of it is with the engine."""
    with opened(model, max_unfinished=1) as llm:
        _left_behind(llm, 1, lambda: True)
        gc.collect()
        assert janitor.drain(20)
        assert llm._requests._places.num_free == 1
        assert not llm.engine.has_work


def test_a_stream_of_a_closed_loop_ends_at_once(model: PreTrainedModel) -> None:
    """Also if the loop was called for it, and closed before it came to that."""
    with opened(model) as llm:
        loop = asyncio.new_event_loop()

        async def main() -> Any:
            outputs = llm.generate([1, 2], SamplingParams(max_tokens=250, ignore_eos=True))
            await anext(outputs)  # type: ignore[arg-type]
            return outputs

        outputs = loop.run_until_complete(main())
        _wait(lambda: any(sink() and sink()._is_called for sink in _sinks(llm)))  # type: ignore[union-attr]
        loop.close()
        before = llm.engine.stats().num_output_tokens
        _wait(lambda: not llm.engine.has_work)
        assert llm.engine.stats().num_output_tokens < 250, before
        del outputs


def _sinks(llm: AsyncLLM) -> list[Any]:
    return llm._thread.driver._sinks._sinks.valuerefs()


def test_a_blocked_event_loop_is_called_once_and_gets_the_newest_state(
    model: PreTrainedModel,
) -> None:
    with opened(model) as llm:

        async def main() -> None:
            loop = asyncio.get_running_loop()
            calls: list[Any] = []
            call = loop.call_soon_threadsafe

            def counted(callback: Callable[..., Any], *args: Any, **options: Any) -> Any:
                calls.append(callback)
                return call(callback, *args, **options)

            outputs = llm.generate([1, 2], zoo.greedy(200))
            first = await anext(outputs)  # type: ignore[arg-type]
            loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
            _wait(lambda: not llm.engine.has_work)  # the loop stands still
            del loop.call_soon_threadsafe
            assert len(calls) <= 1
            (stream,) = [sink() for sink in _sinks(llm)] or [None]
            if stream is not None:
                assert all(isinstance(item, StepOutput) for item in stream._mail)
                assert all(len(item.token_ids) <= 1 for item in stream._mail)
            rest = [output async for output in outputs]
            assert len(rest) <= 2
            assert len(rest[-1].outputs[0].token_ids) == 200
            assert len(first.outputs[0].token_ids) < 200

        run(main)


def test_a_stop_string_on_a_slow_loop_leaves_nothing_behind(llama_folder: Any) -> None:
    llm = AsyncLLM(llama_folder, device="cpu", dtype="float32", **zoo.with_defaults({}))

    async def main() -> None:
        async with llm:
            whole = await last(llm.generate("hello", zoo.greedy(40)))
            stop = whole.outputs[0].text[5:7]
            for _ in range(5):
                out = await last(llm.generate("hello", zoo.greedy(40, stop=stop)))
                assert out.outputs[0].finish_reason == "stop"
            del out, whole
            while llm._thread.driver.has_work:
                await asyncio.sleep(0.001)
            gc.collect()
            assert not len(llm._thread.driver._sinks)

    run(main)
