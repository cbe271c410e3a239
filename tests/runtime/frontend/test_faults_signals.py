"""Exceptions that signals' handlers raise, at any line: no step is torn, no clean-up skipped."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from types import FrameType
from typing import Any

import pytest
import zoo
from signals import SignalAt, Timeout, time_out
from transformers import PreTrainedModel
from vkv import LLM
from vkv.runtime.engine import engine, interrupts, loop
from vkv.runtime.frontend import llm
from vkv.runtime.frontend.driving import driver, sinks
from vkv.runtime.scheduling import scheduler
from vkv.vmem import janitor

_FRONT = [module.__file__ or "" for module in (llm, driver, sinks, loop, interrupts)]
_ENGINE = [module.__file__ or "" for module in (engine, scheduler)]
_PROMPTS = zoo.random_prompts([9, 14])


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler that raises nothing."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama")


def _open(model: PreTrainedModel, **options: Any) -> LLM:
    return LLM(model, device="cpu", **zoo.with_defaults({"look_ahead_tokens": 0, **options}))


@pytest.fixture(scope="module")
def shared(model: PreTrainedModel) -> Iterator[LLM]:
    with _open(model) as llm:
        yield llm


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A caller's time limit, and a handler that raises nothing."""
    mine = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGALRM: time_out,
        signal.SIGUSR1: _ignore,
    }
    monkeypatch.setattr(signal, "valid_signals", lambda: set(mine))  # fewer lines to try
    kept = {number: signal.signal(number, handler) for number, handler in mine.items()}
    yield
    assert {number: signal.getsignal(number) for number in mine} == mine
    for number, handler in kept.items():
        signal.signal(number, handler)


def _generate(llm: LLM) -> object:
    return llm.generate(_PROMPTS, zoo.greedy(2))


def _stream(llm: LLM) -> object:
    """One within another, which is left before its end."""
    with closing(llm.stream(_PROMPTS[0], zoo.greedy(40))) as outer:  # type: ignore[type-var]
        next(outer)
        return list(llm.stream(_PROMPTS[1], zoo.greedy(2)))


def _trim(llm: LLM) -> object:
    llm.generate(_PROMPTS, zoo.greedy(2))
    return llm.trim()


def _sleep(llm: LLM) -> object:
    llm.sleep()
    return llm.wake()


def _check_whole(llm: LLM, expected: list[Any]) -> None:
    assert janitor.drain(20)
    llm.wake()
    llm.trim()
    stats = llm.stats()
    assert (stats.pages_held, stats.kv.slots_open, stats.num_waiting) == (0, 0, 0)
    assert not llm.engine.has_work
    llm.engine.cache.check_invariants()
    assert [out.outputs[0].token_ids for out in llm.generate(_PROMPTS, zoo.greedy(4))] == expected


@pytest.mark.parametrize("files", [_FRONT, _ENGINE], ids=["front", "engine"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
@pytest.mark.parametrize("use", [_generate, _stream, _trim, _sleep, LLM.stats])
def test_a_handler_that_raises_at_any_line(
    shared: LLM, use: Callable[[LLM], object], number: int, files: list[str]
) -> None:
    expected = [out.outputs[0].token_ids for out in shared.generate(_PROMPTS, zoo.greedy(4))]
    raised, event = 0, 1
    while True:
        sent = SignalAt(files, event, number, lambda: use(shared))
        if not sent.was_sent:
            break
        raised += sent.raised is not None
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        _check_whole(shared, expected)
        event += 1 if event < 40 and files is _FRONT else 13
    assert event == 1 or raised


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_closing_interrupted_at_any_line_closes_all_the_same(
    model: PreTrainedModel, number: int
) -> None:
    for event in range(1, 200, 6):
        llm = _open(model, max_seqs=2)
        pages = llm.engine.cache.pool.driver
        stream = llm.stream(_PROMPTS[0], zoo.greedy(40))
        next(stream)
        sent = SignalAt(_FRONT + _ENGINE, event, number, llm.close)
        llm.close()
        assert (pages.num_pages, pages.num_mappings) == (0, 0)  # type: ignore[union-attr]
        if not sent.was_sent:
            return
    raise AssertionError("closing takes more lines than were tried")


def test_a_second_interrupt_while_a_stream_is_left(shared: LLM) -> None:
    """The exception is kept, as interactive shells do: what it leads to lives on."""
    kept: list[BaseException] = []
    driver = shared._driver
    abandon = driver.abandon

    def interrupted(requests: Any) -> None:
        driver.abandon = abandon  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGINT)
        abandon(requests)

    stream = shared.stream(_PROMPTS[0], zoo.greedy(40))
    next(stream)
    driver.abandon = interrupted  # type: ignore[method-assign]
    try:
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    except KeyboardInterrupt as error:
        kept.append(error)
    assert kept
    assert janitor.drain(20)
    assert not shared.engine.has_work


@pytest.mark.parametrize("use", [LLM.generate, LLM.chat, LLM.stream])
def test_a_time_limit_within_a_step(
    llm: LLM, use: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two signals in the middle of a step, one after the other: both wait for its end."""
    launch, whole = llm.engine.runner.launch, []

    def interrupted(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGALRM)
        os.kill(os.getpid(), signal.SIGINT)
        whole.append(launched := launch(*args, **options))
        return launched

    prompt: Any = [{"role": "user", "content": "hello"}] if use is LLM.chat else "hello"
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner, "launch", interrupted)
        with pytest.raises((Timeout, KeyboardInterrupt)):
            list(use(llm, prompt, zoo.greedy(30)))
    assert len(whole) == 1
    zoo.assert_idle(llm)
    llm.trim()
    assert llm.stats().pages_held == 0


def test_ctrl_c_in_the_middle_of_a_trim(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.generate("hello", zoo.greedy(30))
    shrink, whole = llm.engine.cache._backing.shrink, []

    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        shrink(*args)
        whole.append(args)

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.cache._backing, "shrink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.trim()
    assert whole
    assert llm.stats().pages_held == 0
    llm.engine.cache.check_invariants()
    assert llm.generate("hello", zoo.greedy(30))[0].finished


def test_a_handler_may_use_what_it_interrupts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs between steps, with nothing held."""
    seen: list[int] = []

    def use(number: int, frame: FrameType | None) -> None:
        seen.append(llm.stats().num_running)
        seen.append(len(llm.generate("x", zoo.greedy(3))[0].outputs[0].token_ids))

    signal.signal(signal.SIGUSR1, use)
    expected = llm.generate("hello", zoo.greedy(30))[0].outputs[0].token_ids
    launch = llm.engine.runner.launch

    def interrupted(*args: Any, **options: Any) -> Any:
        if not seen:
            os.kill(os.getpid(), signal.SIGUSR1)
        return launch(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner, "launch", interrupted)
        out = llm.generate("hello", zoo.greedy(30))
    signal.signal(signal.SIGUSR1, _ignore)
    assert out[0].outputs[0].token_ids == expected
    assert 3 in seen
