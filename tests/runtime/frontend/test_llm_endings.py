"""Interruption, failure, threads and the end: what the front door leaves behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import zoo
from transformers import PreTrainedModel
from vkv import LLM
from vkv.vmem import janitor
from vkv.vmem.errors import ForkedProcess, InvalidOperation, StepFailed


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return zoo.tiny_model("llama", attention="sdpa")


def _generate_forever(llm: LLM) -> None:
    while True:
        llm.generate(zoo.random_prompts([30, 50, 20, 60]), zoo.greedy(150))


def test_ctrl_c_leaves_no_pages_behind(llm: LLM) -> None:
    """The signal arrives somewhere within the run, most likely in the middle of a step."""

    def interrupt() -> None:
        while not llm.engine.scheduler.running:
            time.sleep(0.001)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    for _ in range(3):
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            _generate_forever(llm)
        thread.join()
        zoo.assert_idle(llm)
        llm.trim()
        assert llm.stats().pages_held == 0
        llm.engine.cache.check_invariants()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(llm.generate("on", zoo.greedy(5))[0].outputs[0].token_ids) == 5


def test_an_interrupt_within_a_step_waits_for_its_end(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = llm.engine.runner.launch
    completed = []

    def interrupted(batch: Any, *args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        launched = launch(batch, *args, **options)
        completed.append(batch)
        return launched

    monkeypatch.setattr(llm.engine.runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("hello", zoo.greedy(50))
    assert len(completed) == 1
    zoo.assert_idle(llm)
    assert llm.stats().pages_held == 0


def test_an_interrupt_while_requests_are_queued_loses_none_of_them(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = llm.engine.add

    def interrupted(*args: Any) -> Any:
        requests = add(*args)
        os.kill(os.getpid(), signal.SIGINT)
        return requests

    monkeypatch.setattr(llm.engine, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], zoo.greedy(50))
    zoo.assert_idle(llm)


def test_a_failing_step_gives_everything_back(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    launch = llm.engine.runner.launch

    def fail(batch: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("a kernel failed")
        return launch(batch, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner, "launch", fail)
        with pytest.raises(StepFailed, match="RuntimeError: a kernel failed"):
            llm.generate(["a", "bc", "def"], zoo.greedy(50), on_error="raise")
    zoo.assert_idle(llm)
    assert llm.stats().pages_held == 0
    assert llm.generate("on", zoo.greedy(5))[0].finished


def test_closing_gives_all_memory_back(llama_folder: Path) -> None:
    llm = LLM(llama_folder, device="cpu", **zoo.with_defaults({}))
    driver = llm.engine.cache.pool.driver
    assert driver is not None
    llm.generate("hello", zoo.greedy(30))
    stream = llm.stream("more", zoo.greedy(30))
    next(stream)
    assert driver.num_pages > 0
    llm.close()
    llm.close()
    assert driver.num_pages == 0
    assert driver.num_mappings == 0
    with pytest.raises(InvalidOperation, match="closed while it generated"):
        next(stream)
    for use in (llm.stats, llm.trim, lambda: llm.generate("x"), lambda: llm.stream("x")):
        with pytest.raises(InvalidOperation, match="closed"):
            use()


def test_closing_under_a_running_batch_is_no_result(llama_folder: Path) -> None:
    llm = LLM(llama_folder, device="cpu", **zoo.with_defaults({}))

    def close() -> None:
        while not llm.engine.scheduler.running:
            time.sleep(0.001)
        llm.close()

    thread = threading.Thread(target=close)
    thread.start()
    with pytest.raises(InvalidOperation, match="closed"):
        _generate_forever(llm)
    thread.join()


def test_dropping_an_llm_closes_it(llama_folder: Path) -> None:
    llm = LLM(llama_folder, device="cpu", **zoo.with_defaults({}))
    driver = llm.engine.cache.pool.driver
    assert driver is not None
    llm.generate("hello", zoo.greedy(30))
    del llm
    janitor.drain(20)
    assert driver.num_pages == 0
    with pytest.raises(TypeError):
        LLM(llama_folder, "too", "many")  # type: ignore[misc]


def test_two_threads_share_an_llm(llm: LLM, reference: PreTrainedModel) -> None:
    prompts = zoo.random_prompts([10, 30, 25, 7, 50, 14, 22, 9])
    results: dict[int, list[int]] = {}
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for i in range(index, len(prompts), 3):
                (out,) = llm.generate(prompts[i], zoo.greedy(40))
                results[i] = list(out.outputs[0].token_ids)
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert results == {i: zoo.generate_alone(reference, p, 40) for i, p in enumerate(prompts)}
    zoo.assert_idle(llm)


def test_threads_join_each_others_batches(llm: LLM) -> None:
    """A thread that generates must not keep others waiting until it is done."""
    started = threading.Event()
    long_done = threading.Event()

    def long_run() -> None:
        for count, _ in enumerate(llm.stream("long", zoo.greedy(250))):
            if count == 3:
                started.set()
        long_done.set()

    thread = threading.Thread(target=long_run)
    thread.start()
    started.wait()
    llm.generate("short", zoo.greedy(2))
    assert not long_done.is_set()
    thread.join()


def test_a_forked_child_leaves_its_parents_memory_alone(llm: LLM) -> None:
    """Whatever it drops or closes is the parent's; using it is a typed error."""
    stream = llm.stream("x", zoo.greedy(9))
    next(stream)
    child = os.fork()
    if child == 0:
        closed = False
        try:
            stream.close()  # type: ignore[attr-defined]
            llm.close()
            closed = True
            llm.generate("x")
        except ForkedProcess:
            os._exit(0 if closed else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert sum(len(delta.token_ids) for delta in stream) == 8


def test_a_program_that_never_closes_ends_quietly() -> None:
    program = """
import zoo
from vkv import LLM
llm = LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({}))
llm.generate([1, 2, 3] * 20, zoo.greedy(60))
stream = llm.stream([1, 2, 3], zoo.greedy(60))
next(stream)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2] / "support",
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_result_that_another_thread_has_made_is_given_whatever_is_closed_then(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(llama_folder, device="cpu", **zoo.with_defaults({}))
    turn = llm._driver.turn

    def late(unless: Any = None) -> None:
        """As if another thread ran the last steps, and a third one closed, before this one came."""
        while not unless():
            turn()
        llm.close()
        turn(unless=unless)

    monkeypatch.setattr(llm._driver, "turn", late)
    (out,) = llm.generate([1, 2, 3], zoo.greedy(4))
    assert len(out.outputs[0].token_ids) == 4
