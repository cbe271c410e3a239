"""What finished requests left goes back to the system when nobody asks, and not before."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zoo
from vkv import LLM
from vkv.vmem import janitor
from vkv.vmem.errors import InvalidConfig

_PATIENCE_S = 20.0  # a failure, not a measure of speed


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _idle_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vkv-idle-trim"]


def _open(folder: Path, idle_trim_s: float | None) -> LLM:
    return LLM(
        folder,
        device="cpu",
        dtype="float32",
        **zoo.with_defaults({"max_seqs": 4, "idle_trim_s": idle_trim_s}),
    )


def test_memory_comes_back_by_itself_each_time_the_engine_rests(llama_folder: Path) -> None:
    with _open(llama_folder, 0.01) as llm:
        first = llm.generate("hello", zoo.greedy(30))
        for _ in range(2):
            _wait_for(lambda: llm.stats().physical_bytes == 0)
            llm.engine.cache.check_invariants()
            again = llm.generate("hello", zoo.greedy(30))
            assert again[0].outputs[0].token_ids == first[0].outputs[0].token_ids
        _wait_for(lambda: llm.stats().pages_held == 0)


def test_nothing_is_trimmed_while_a_request_runs(llama_folder: Path) -> None:
    with _open(llama_folder, 0.0) as llm:
        stream = llm.stream("a long answer", zoo.greedy(150))
        next(stream)
        llm.generate("a short one beside it", zoo.greedy(5))
        for _ in range(100):
            next(stream)
            time.sleep(0.0005)  # the lock is free
        assert llm.stats().pages_parked > 0
        list(stream)
        _wait_for(lambda: llm.stats().physical_bytes == 0)


def test_a_refused_prompt_does_not_stop_the_clock(llama_folder: Path) -> None:
    with _open(llama_folder, 0.3) as llm:
        llm.generate("hello", zoo.greedy(30))
        with pytest.raises(ValueError, match="max_len"):
            llm.generate([[1, 2], [1] * 300], zoo.greedy(3))
        _wait_for(lambda: llm.stats().physical_bytes == 0)


def test_without_the_option_nothing_is_given_back(llama_folder: Path) -> None:
    with _open(llama_folder, None) as llm:
        llm.generate("hello", zoo.greedy(30))
        assert not _idle_threads()
        assert llm.stats().pages_parked > 0


@pytest.mark.parametrize("closed", [True, False])
def test_the_thread_ends_with_its_llm(llama_folder: Path, closed: bool) -> None:
    llm = _open(llama_folder, 1000.0)
    (thread,) = _idle_threads()
    driver = llm.engine.cache.pool.driver
    llm.generate("hello", zoo.greedy(5))
    assert thread.is_alive()
    if closed:
        llm.close()
    else:
        del llm
        janitor.drain(_PATIENCE_S)
    thread.join(_PATIENCE_S)
    assert not thread.is_alive()
    assert driver is not None
    assert driver.num_pages == 0


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan"), "1", True])
def test_times_that_are_none_are_refused(llama_folder: Path, seconds: object) -> None:
    with pytest.raises(InvalidConfig, match="idle_trim_s"):
        _open(llama_folder, seconds)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["closed", "interrupted"])
def test_memory_comes_back_too_after_requests_that_were_dropped(
    llama_folder: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _open(llama_folder, 0.01) as llm:
        if how == "closed":
            stream = llm.stream("hello", zoo.greedy(200))
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        else:
            launch = llm.engine.runner.launch

            def interrupted(*args: Any, **options: Any) -> Any:
                os.kill(os.getpid(), signal.SIGINT)
                return launch(*args, **options)

            monkeypatch.setattr(llm.engine.runner, "launch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate("hello", zoo.greedy(200))
        _wait_for(lambda: llm.stats().physical_bytes == 0)
