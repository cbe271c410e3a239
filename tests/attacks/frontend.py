"""Long attacks on the front doors, for an afternoon: every finished token is compared.

    python tests/attacks/frontend.py streams --minutes 5
    python tests/attacks/frontend.py signals --count 200
    python tests/attacks/frontend.py forks --count 100
    python tests/attacks/frontend.py tasks --count 1000

Each prints what it did and found; the exit status is 1 if anything was lost.
"""

import argparse
import asyncio
import gc
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import zoo
from signals import Timeout
from vkv import LLM, AsyncLLM, MemoryLimit, SamplingParams
from vkv.vmem import janitor
from vkv.vmem.errors import ForkedProcess, VkvError

PROMPTS = zoo.random_prompts([3, 20, 41, 9, 60, 33, 5, 27])
MODEL = zoo.tiny_model("llama")
Tokens = list[tuple[int, ...]]


def make(kind: Any, **options: Any) -> Any:
    return kind(MODEL, device="cpu", **zoo.with_defaults({"max_len": 160, **options}))


def tokens(llm: LLM, count: int = 40) -> Tokens:
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, zoo.greedy(count))]


def check(llm: Any, driver: Any) -> None:
    """Nothing is held but what is parked, and after a trim nothing at all."""
    while driver.has_work:
        time.sleep(0.01)
        llm.stats()
    assert janitor.drain(60)
    stats = llm.stats()
    assert stats.pages_held == stats.pages_parked
    llm.engine.cache.check_invariants()
    driver.trim()
    assert (llm.stats().pages_held, llm.stats().kv.slots_open) == (0, 0)


def leave_in_a_cycle(llm: LLM, rng: random.Random) -> None:
    kept: list[Any] = []
    try:
        for count, _ in enumerate(llm.stream(rng.choice(PROMPTS), zoo.greedy(60))):
            if count == rng.randrange(9):
                raise RuntimeError
    except RuntimeError as error:
        kept += [error, kept]


def streams(minutes: float, **_: Any) -> Counter[str]:
    """Two engines under one limit, whose streams only the collector ends, wherever it starts."""
    done: Counter[str] = Counter()
    limit = MemoryLimit("2MiB")
    llms = [make(LLM, kv_memory=limit) for _ in range(2)]
    expected = tokens(llms[0])
    gc.set_threshold(50, 3, 3)
    end = time.monotonic() + 60 * minutes

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            leave_in_a_cycle(rng.choice(llms), rng)
            done["streams"] += 1
            if rng.random() < 0.3:
                done["wrong"] += tokens(rng.choice(llms)) != expected
                done["outputs"] += len(PROMPTS)
            if rng.random() < 0.05:
                extra = make(LLM, kv_memory=limit)
                leave_in_a_cycle(extra, rng)
                del extra
                done["engines dropped"] += 1
            if rng.random() < 0.1:
                rng.choice(llms).trim()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    for llm in llms:
        check(llm, llm._driver)
        llm.close()
    assert janitor.drain(60)
    assert limit.taken_bytes == 0, limit.taken_bytes
    return done


def signals(count: int, **_: Any) -> Counter[str]:
    """Signals of three kinds at random instants, now and then two at once."""
    done: Counter[str] = Counter()
    rng = random.Random(0)
    llm: LLM = make(LLM)
    numbers = (signal.SIGINT, signal.SIGALRM, signal.SIGUSR1)
    is_under_attack = False

    def handle(number: int, frame: Any) -> None:
        done["handled"] += 1
        if is_under_attack and number != signal.SIGUSR1:
            done["raised"] += 1
            raise Timeout

    for number in numbers:
        signal.signal(number, handle)
    handlers = [signal.getsignal(number) for number in numbers]
    expected = tokens(llm)

    def streamed() -> tuple[int, ...]:
        deltas = llm.stream(PROMPTS[1], zoo.greedy(40))
        return tuple(token for delta in deltas for token in delta.token_ids)

    uses: dict[str, Callable[[], object]] = {
        "generate": lambda: tokens(llm) == expected or done.update(["wrong"]),
        "stream": lambda: streamed() == expected[1] or done.update(["wrong"]),
        "trim": lambda: (tokens(llm), llm.trim()),
        "sleep": lambda: (llm.sleep(), llm.wake()),
        "stats": lambda: [llm.stats() for _ in range(99)],
    }
    for number in numbers:
        for name, use in uses.items():
            for _ in range(count // len(uses)):
                delay, second = rng.random() ** 2 * 0.08, rng.random() < 0.3

                def send(number: int = number, delay: float = delay, twice: bool = second) -> None:
                    time.sleep(delay)
                    os.kill(os.getpid(), number)
                    if twice:
                        time.sleep(rng.random() * 0.001)
                        os.kill(os.getpid(), number)

                thread = threading.Thread(target=send)
                is_under_attack = True
                try:
                    try:
                        thread.start()
                        use()
                        done[f"{name} whole"] += 1
                    except Timeout:
                        done[f"{name} ended"] += 1
                        use()  # so that a second one comes in the middle of something, too
                except Timeout:
                    done[f"{name} ended twice"] += 1
                is_under_attack = False
                thread.join()
                done[signal.Signals(number).name] += 1
                assert [signal.getsignal(n) for n in numbers] == handlers
                llm.wake()
                check(llm, llm._driver)
        done["wrong"] += tokens(llm) != expected
    llm.close()
    return done


def forks(count: int, **_: Any) -> Counter[str]:
    """Children of a process whose other threads are in the middle of steps."""
    done: Counter[str] = Counter()
    llm: LLM = make(LLM)
    expected = tokens(llm)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            done["wrong"] += tokens(llm) != expected
            done["outputs"] += len(PROMPTS)

    thread = threading.Thread(target=work)
    thread.start()
    entries: Sequence[Callable[[], Any]] = (
        lambda: llm.generate([1, 2]),
        lambda: llm.stream([1, 2]),
        llm.stats,
        llm.trim,
        llm.sleep,
        llm.wake,
    )
    for _ in range(count):
        time.sleep(random.random() * 0.02)
        child = os.fork()
        if not child:
            signal.alarm(20)
            refused = 0
            for entry in entries:
                with suppress(ForkedProcess):
                    entry()
                    continue
                refused += 1
            llm.close()
            gc.collect()
            os._exit(0 if refused == len(entries) else 1)
        done["children"] += 1
        done["wrong"] += os.waitpid(child, 0)[1] != 0
    stop.set()
    thread.join()
    check(llm, llm._driver)
    llm.close()
    return done


def tasks(count: int, **_: Any) -> Counter[str]:
    """Tasks of an event loop that are cancelled, time out, or ask for what cannot be."""
    done: Counter[str] = Counter()
    rng = random.Random(0)
    with make(LLM) as llm:
        expected = tokens(llm)
    async_llm: AsyncLLM = make(AsyncLLM, max_unfinished=12, kv_memory="1MiB")
    malformed: Sequence[Any] = (
        {"temperature": 0},
        SamplingParams(temperature=0, repetition_penalty=1e-300),
        SamplingParams(min_tokens=3, max_tokens=9, stop_token_ids=range(zoo.VOCAB_SIZE)),
        SamplingParams(max_tokens=9, logit_bias={zoo.VOCAB_SIZE + 1: 1.0}),
    )

    async def one(index: int) -> None:
        await asyncio.sleep(rng.random() * count / 150)
        which = rng.randrange(len(PROMPTS))
        bad = rng.random() < 0.1
        params = rng.choice(malformed) if bad else zoo.greedy(40)
        try:
            async with asyncio.timeout(rng.choice([0.01, 0.1, 60, 60])):
                async for output in async_llm.generate(PROMPTS[which], params, f"task {index}"):
                    out = output
                    if rng.random() < 0.002:
                        async_llm.abort(f"task {index}")
        except TimeoutError:
            done["timed out"] += 1
        except VkvError:
            done["refused or failed"] += 1
            done["wrong"] += not bad
        else:
            if out.outputs[0].finish_reason == "abort":
                done["aborted"] += 1
            else:
                done["finished"] += 1
                done["wrong"] += not bad and out.outputs[0].token_ids != expected[which]

    async def main() -> None:
        everyone = [asyncio.create_task(one(index)) for index in range(count)]
        for task in everyone:
            if rng.random() < 0.2:
                asyncio.get_running_loop().call_later(rng.random() * count / 150, task.cancel)
        for result in await asyncio.gather(*everyone, return_exceptions=True):
            done["cancelled"] += isinstance(result, asyncio.CancelledError)
            done["wrong"] += isinstance(result, Exception)
        await asyncio.to_thread(check, async_llm, async_llm._thread.driver)
        assert async_llm._requests._places.num_free == 12
        await async_llm.close()

    asyncio.run(main())
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("attack", choices=["streams", "signals", "forks", "tasks"])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--count", type=int, default=200)
    options = vars(parser.parse_args())
    found: Counter[str] = globals()[options.pop("attack")](**options)
    sys.stdout.write(f"{dict(found)}\n")
    sys.exit(bool(found["wrong"]))
