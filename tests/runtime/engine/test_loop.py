"""The loop around an engine: no output is lost, whatever fails, and a queue costs nothing."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zoo
from transformers import PreTrainedModel
from vkv import LLM
from vkv.allocator.transfer import kv_dir
from vkv.runtime.engine.engine import Engine
from vkv.runtime.engine.loop import EngineLoop
from vkv.runtime.engine.messages import Abort, Add, Finish
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.request.step_output import StepOutput
from vkv.vmem.errors import DriverError, InvalidConfig, OutOfPages


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama")


@pytest.fixture
def llm(model: PreTrainedModel) -> Iterator[LLM]:
    with LLM(model, device="cpu", **zoo.with_defaults({"max_parked": 2})) as llm:
        yield llm


@pytest.fixture
def loop(llm: LLM) -> EngineLoop:
    return llm._driver._loop


def _add(name: str, count: int = 5, **options: Any) -> Add:
    return Add(RequestSpec(request_id=name, prompt_token_ids=[1, 2, 3], params=zoo.greedy(count)))


def _ends(outputs: list[StepOutput]) -> dict[str, str]:
    return {out.request_id: out.finish_reason for out in outputs if out.finish_reason}


def test_what_came_before_a_turn_failed_comes_with_the_next(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Add(RequestSpec(request_id="b", prompt_token_ids=[], params=zoo.greedy(5)))
    loop.turn([_add("a")])

    def fail(*_: Any) -> None:
        raise AssertionError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(loop.engine, "step", fail)
        with pytest.raises(AssertionError, match="a bug"):
            loop.turn([Abort("a"), refused])
    outputs = loop.carry_out()
    assert _ends(outputs) == {"a": "abort", "b": "error"}
    assert outputs[0].failure is not None


def test_messages_are_carried_out_in_order_and_strangers_are_nobodys(loop: EngineLoop) -> None:
    outputs = loop.carry_out([Abort("a"), _add("a"), Finish("x", 0), Finish("a", 7), Abort("x")])
    assert outputs == []
    assert loop.engine.has_work
    assert _ends(loop.carry_out([Abort("a"), Abort("a")])) == {"a": "abort"}
    assert loop.carry_out([_add("a"), Finish("a", 0)]) == []
    assert not loop.engine.has_work


def test_closing_may_be_tried_again_and_the_last_outputs_are_kept(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.turn([_add("a")])
    driver = loop.engine.cache.pool.driver

    def refuse(*_: Any) -> None:
        raise DriverError("not now")

    with monkeypatch.context() as patched:
        patched.setattr(driver, "unmap", refuse)
        with pytest.raises(DriverError):
            loop.close()
    assert loop.is_closed
    assert _ends(loop.take_outputs()) == {"a": "abort"}
    loop.close()
    loop.close()
    assert (driver.num_pages, driver.num_mappings) == (0, 0)  # type: ignore[attr-defined]


def test_closing_an_llm_again_gives_back_what_was_refused(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = llm.stream([1, 2, 3], zoo.greedy(9))
    next(stream)
    driver = llm.engine.cache.pool.driver

    def refuse(*_: Any) -> None:
        raise DriverError("not now")

    with monkeypatch.context() as patched:
        patched.setattr(driver, "unmap", refuse)
        with pytest.raises(DriverError):
            llm.close()
    assert llm.is_closed
    with pytest.raises(Exception, match="closed while it generated"):
        next(stream)
    llm.close()
    assert (driver.num_pages, driver.num_mappings) == (0, 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["unmap", "record_fence"])
def test_a_slot_that_cannot_be_let_go_tears_no_step(
    llm: LLM, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests end all the same, and what they held goes once the system takes it back."""
    prompts = zoo.random_prompts([60, 30, 45, 20])
    expected = [out.outputs[0].token_ids for out in llm.generate(prompts, zoo.greedy(30))]
    llm.trim()

    def refuse(*_: Any) -> None:
        raise DriverError("not now")

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.cache.pool.driver, method, refuse)
        outs = llm.generate(prompts, zoo.greedy(30))
        assert [out.outputs[0].token_ids for out in outs] == expected
        stream = llm.stream(prompts[0], zoo.greedy(30))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        llm.stats()
        assert not llm.engine.has_work
        llm.engine.cache.check_invariants()
    llm.trim()
    assert llm.stats().kv.slots_open == 0
    assert llm.stats().pages_held == 0
    llm.engine.cache.check_invariants()
    outs = llm.generate(prompts, zoo.greedy(30))
    assert [out.outputs[0].token_ids for out in outs] == expected


@pytest.mark.parametrize("behind", ["swap_memory", "kv_dir"])
def test_what_cannot_be_copied_tears_no_step(
    llm: LLM,
    model: PreTrainedModel,
    behind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Requests that end or give way are not copied then, and nothing stays pinned."""
    prompts = zoo.random_prompts([60, 30, 45, 20])
    expected = [out.outputs[0].token_ids for out in llm.generate(prompts, zoo.greedy(30))]
    monkeypatch.setattr(kv_dir, "_LEAST_TOKENS", 20)
    options = {behind: tmp_path if behind == "kv_dir" else 8 << 20, "kv_memory": 14 * 4096}
    with LLM(model, device="cpu", **zoo.with_defaults(options)) as pressed:
        with monkeypatch.context() as patched:
            tiers: Any = pressed.engine.scheduler.tiers
            folder, swapping = tiers.kv_files.folder, tiers.swapping
            copier = folder._writer if folder is not None else swapping.tier._copier
            patched.setattr(copier, "submit", _raise(DriverError("not now")))
            outs = pressed.generate(prompts, zoo.greedy(30))
            assert [out.outputs[0].token_ids for out in outs] == expected
            assert pressed.stats().num_preemptions > 0
            assert tiers.is_settled
            assert "not now" in caplog.text
        pressed.trim()
        assert pressed.stats().kv.slots_open == 0
        assert pressed.stats().pages_held == 0
        pressed.engine.cache.check_invariants()
        outs = pressed.generate(prompts, zoo.greedy(30))
        assert [out.outputs[0].token_ids for out in outs] == expected


def test_tokens_that_cannot_be_had_fail_their_step_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, count = llm.engine.runner.launch, iter(range(1000))

    def failing(*args: Any, **options: Any) -> Any:
        launched = launch(*args, **options)
        if next(count) == 3:
            monkeypatch.setattr(launched, "wait", _raise(RuntimeError("the device failed")))
        return launched

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner, "launch", failing)
        (out,) = llm.generate([1, 2, 3], zoo.greedy(9))
    assert out.outputs[0].finish_reason == "error"
    assert "the device failed" in str(out.error)
    assert len(out.outputs[0].token_ids) == 3
    assert len(llm.generate([1, 2, 3], zoo.greedy(9))[0].outputs[0].token_ids) == 9


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


# -- one of many goes wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_one_of_many_goes_wrong(
    model: PreTrainedModel, overlap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = zoo.random_prompts([9, 20, 14, 31])
    params = [zoo.greedy(20), zoo.greedy(20, repetition_penalty=1e-300), *[zoo.greedy(20)] * 2]
    with LLM(model, device="cpu", **zoo.with_defaults({"overlap": overlap})) as llm:
        expected = [out.outputs[0].token_ids for out in llm.generate(prompts, zoo.greedy(20))]
        with caplog.at_level(logging.WARNING):
            outs = llm.generate(prompts, params)
        assert "1 of 4 requests failed" in caplog.text
        for index, out in enumerate(outs):
            assert out.finished
            if index == 1:
                assert out.outputs[0].finish_reason == "error"
                assert "no token can be chosen" in str(out.error)
            else:
                assert out.error is None
                assert out.outputs[0].token_ids == expected[index]
        before = llm.stats().num_output_tokens
        with pytest.raises(Exception, match="no token can be chosen"):
            llm.generate(prompts, params, on_error="raise")
        assert llm.stats().num_output_tokens >= before + 60  # the others had ended
        with pytest.raises(ValueError, match="on_error is 'ignore'"):
            llm.generate(prompts, on_error="ignore")  # type: ignore[arg-type]
        zoo.assert_idle(llm)
        llm.engine.cache.check_invariants()


# -- many are queued -----------------------------------------------------------------------------


def test_stats_wait_for_no_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = llm.engine.runner.launch
    within, go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **options: Any) -> Any:
        within.set()
        assert go_on.wait(20)
        return launch(*args, **options)

    monkeypatch.setattr(llm.engine.runner, "launch", slow)
    thread = threading.Thread(target=lambda: llm.generate([1, 2, 3], zoo.greedy(2)))
    thread.start()
    assert within.wait(20)
    assert llm.stats().num_output_tokens == 0  # while the step stands still
    go_on.set()
    thread.join()
    assert llm.stats().num_output_tokens == 2


class _Watched(dict[Any, Any]):
    """The requests of an engine, which may not be listed."""

    is_watched = True

    def __iter__(self) -> Iterator[Any]:
        assert not self.is_watched, "all requests were looked at"
        return super().__iter__()

    def values(self) -> Any:
        assert not self.is_watched, "all requests were looked at"
        return super().values()


def test_aborting_one_and_taking_a_step_look_at_no_other_of_those_queued(
    loop: EngineLoop, llm: LLM
) -> None:
    engine: Engine = loop.engine
    loop.carry_out([_add(str(index)) for index in range(2000)])
    scheduler, line = engine.scheduler, engine.scheduler.waiting
    all_of_them = engine._requests, scheduler._requests, line._places = [
        _Watched(each) for each in (engine._requests, scheduler._requests, line._places)
    ]
    for index in (1500, 3, 1999, 700):
        assert _ends(loop.carry_out([Abort(str(index))])) == {str(index): "abort"}
    for _ in range(20):
        loop.turn()
        loop.stats(fresh=True)
    assert loop.stats().num_waiting > 1800
    for each in all_of_them:
        each.is_watched = False
    loop.carry_out([Abort(str(index)) for index in range(2000)])
    assert not engine.has_work


def test_a_shortage_is_waited_for_and_then_fails_the_first_in_line(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = zoo.with_defaults({"shortage_wait_s": 1000.0})
    with LLM(model, device="cpu", **options) as llm:
        loop, now = llm._driver._loop, [1.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(llm.engine.cache, "reserve", _raise(OutOfPages("none")))
        assert loop.turn([_add("a"), _add("b")]) == []
        now[0] = 999.0
        assert loop.turn() == []
        assert [request.key[0] for request in llm.engine.requests] == ["a", "b"]
        now[0] = 1002.0
        (output,) = loop.turn()
        assert (output.request_id, output.finish_reason) == ("a", "error")
        assert isinstance(output.failure and output.failure.error(), OutOfPages)
        now[0] = 1500.0
        assert loop.turn() == []
        monkeypatch.undo()
        while loop.engine.has_work:
            loop.turn()


def test_each_request_that_is_short_of_memory_has_a_patience_of_its_own(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was dropped while it waited leaves nothing of its waiting to the next."""

    def refuse(*_: Any) -> None:
        raise OutOfPages("none")

    now = [100.0]
    monkeypatch.setattr("vkv.runtime.engine.loop.time.monotonic", lambda: now[0])
    monkeypatch.setattr("vkv.runtime.engine.loop.time.sleep", lambda _: None)
    options = zoo.with_defaults({"shortage_wait_s": 10.0})
    with LLM(model, device="cpu", **options) as llm:
        loop = llm.loop
        monkeypatch.setattr(llm.engine.cache, "grow", refuse)
        assert not loop.turn([_add("a")])
        now[0] += 9.0
        assert _ends(loop.carry_out([Abort("a")])) == {"a": "abort"}
        now[0] += 9.0
        assert not loop.turn([_add("b")])
        now[0] += 9.0
        assert not loop.turn()
        now[0] += 2.0
        assert _ends(loop.turn()) == {"b": "error"}
        monkeypatch.undo()


def test_a_shortage_found_before_requests_ended_is_not_held_against_the_next(
    model: PreTrainedModel,
) -> None:
    """With overlap, the step under way ends requests after the scheduler looked."""
    options = zoo.with_defaults(
        {"kv_memory": 2 * 4096, "look_ahead_tokens": 0, "shortage_wait_s": 0.0, "max_parked": 0}
    )
    with LLM(model, device="cpu", overlap=True, **options) as llm:
        prompts = zoo.random_prompts([14, 14])
        outs = llm.generate(prompts, [zoo.greedy(10), zoo.greedy(10)])
        assert [out.error for out in outs] == [None, None]
        assert [len(out.outputs[0].token_ids) for out in outs] == [10, 10]


def test_with_less_memory_requests_give_way_and_their_tokens_are_the_same(llm: LLM) -> None:
    loop, pool = llm._driver._loop, llm.engine.cache.pool
    params = zoo.greedy(60)
    prompts = zoo.random_prompts([70, 90, 80, 75])
    right = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    loop.trim()
    for number, prompt in enumerate(prompts):
        spec = RequestSpec(request_id=str(number), prompt_token_ids=prompt, params=params)
        loop.post(Add(spec))
    found: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    before = loop.stats().num_preemptions
    for turn in range(2000):
        if turn == 20:
            num_held = pool.num_held
            loop.limit_memory((num_held + 1) * pool.driver.page_bytes)
        for output in loop.turn():
            assert output.failure is None
            found[output.request_id] += output.token_ids
        if not loop.has_work:
            break
    assert list(map(tuple, found.values())) == list(map(tuple, right))
    assert loop.stats(fresh=True).num_preemptions > before
    assert pool.num_created <= num_held + 1
    loop.limit_memory()
    assert pool.num_available == pool.limit_pages - pool.num_held
    with pytest.raises(InvalidConfig, match="were made for"):
        loop.limit_memory(1 << 40)


def test_a_limit_that_the_system_does_not_let_be_kept_tears_no_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, limit = llm.loop, llm.engine.cache.pool.shared_limit
    assert limit is not None
    llm.generate(zoo.random_prompts([60, 30]), zoo.greedy(5))
    driver = llm.engine.cache.pool.driver
    with monkeypatch.context() as patched:
        patched.setattr(driver, "unmap", _raise(DriverError("not now")))
        with pytest.raises(DriverError):
            loop.limit_memory(3 * 4096)
        assert limit.room_bytes < 0
        outputs = [*loop.turn([_add("a")]), *loop.turn()]
        assert _ends(outputs) == {}
    while loop.has_work:
        outputs += loop.turn()
    assert _ends(outputs) == {"a": "length"}
    assert limit.room_bytes >= 0
