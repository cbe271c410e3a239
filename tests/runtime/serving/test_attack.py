"""The short form of `tests/attacks/server.py`: good callers beside hostile ones, and kills."""

import asyncio
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import callers
import hostile
import httpx
import pytest
from callers import Case, Streamed
from served import Served, is_alive
from vkv import LLM

MOST_BODY_BYTES = 100_000
KEY = "the-key"
HEADERS = {"authorization": f"Bearer {KEY}"}
NUM_STREAMS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose temporary files lie in a folder of their own."""
    folder = tmp_path_factory.mktemp("attack")
    arguments = ["--repeatable", "--max-num-seqs", "8", "--restart-engine", "--api-key", KEY]
    arguments += ["--max-body-bytes", str(MOST_BODY_BYTES), "--shutdown-timeout", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        server = Served(*arguments, log=folder / "log", wait=False)
    with server:
        server.client.headers.update(HEADERS)
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    with LLM(device="cpu", repeatable=True, max_seqs=8) as llm:
        return callers.known_cases(llm, seed=0, count=15)


@pytest.fixture(scope="module")
def target(server: Served) -> hostile.Target:
    url = httpx.URL(server.url)
    assert url.port is not None
    return hostile.Target(url.host, url.port, KEY, MOST_BODY_BYTES)


def client_of(server: Served) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, headers=HEADERS, timeout=60)


def held(server: Served) -> dict[str, int]:
    """Descriptors of the front and of the engine."""
    pids = {"front": server.process.pid, "engine": server.engine()}
    return {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()}


def wait_for_rest(server: Served, before: dict[str, int]) -> None:
    """Until all is given back."""
    server.wait_until_idle()
    deadline = time.monotonic() + 10
    while any(held(server)[name] > before[name] for name in before):
        assert time.monotonic() < deadline, (before, held(server))
        time.sleep(0.02)


def check_log(server: Served) -> None:
    log = server.log()
    for word in ('" 500 ', "Traceback", "never retrieved"):
        assert word not in log, log[log.index(word) - 200 :][:2000]


def test_what_can_be_wrong_with_a_body(server: Served, target: hostile.Target) -> None:
    async def work() -> None:
        for path, body in hostile.WRONG_BODIES:
            await hostile.refused(target, path, body)

    asyncio.run(work())
    check_log(server)


def test_good_callers_beside_hostile_ones(
    server: Served, target: hostile.Target, cases: list[Case]
) -> None:
    before = held(server)

    async def good(client: httpx.AsyncClient) -> None:
        for case, streams in itertools.product(cases, (True, False)):
            await callers.ask(client, case, streams=streams)

    async def bad(seed: int) -> None:
        rng = random.Random(seed)
        for harm in rng.sample(hostile.HARM, len(hostile.HARM)):
            await harm(target, rng)

    async def work() -> None:
        async with client_of(server) as client:
            await asyncio.gather(good(client), *map(bad, range(6)))

    asyncio.run(work())
    wait_for_rest(server, before)
    check_log(server)


def test_disconnects_give_all_back(server: Served, target: hostile.Target) -> None:
    before = held(server)

    async def work() -> None:
        rng = random.Random(1)
        await asyncio.gather(*(rng.choice(hostile.LEAVING)(target, rng) for _ in range(40)))

    asyncio.run(work())
    wait_for_rest(server, before)
    check_log(server)


def streams_until(server: Served, what: int, pid: int) -> list[Streamed]:
    """Streams that have begun when a process gets a signal, to their ends."""
    reads = [Streamed() for _ in range(NUM_STREAMS)]
    have_begun = threading.Barrier(NUM_STREAMS + 1)

    def read(number: int) -> None:
        path, body = hostile.STREAMS[number % len(hostile.STREAMS)]
        with (
            httpx.Client(headers=HEADERS, timeout=60) as client,
            client.stream("POST", server.url + path, json=body) as answer,
        ):
            lines = answer.iter_lines()
            reads[number].take(next(lines))
            have_begun.wait(60)
            for line in lines:
                reads[number].take(line)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    have_begun.wait(60)
    os.kill(pid, what)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return reads


def test_a_killed_engine_under_load(server: Served, cases: list[Case]) -> None:
    reads = streams_until(server, signal.SIGKILL, server.engine())
    assert [read.end for read in reads] == ["error"] * NUM_STREAMS
    server.wait_until_ready()

    async def work() -> None:
        async with client_of(server) as client:
            for case in cases[:5]:
                await callers.ask(client, case, streams=True)

    asyncio.run(work())
    server.wait_until_idle()


def test_an_end_under_load(server: Served, target: hostile.Target) -> None:
    """The last test: no stream without its end, and nothing is left behind."""
    children = server.children()
    reads = streams_until(server, signal.SIGTERM, server.process.pid)
    assert [read.end for read in reads] == ["done"] * NUM_STREAMS
    assert server.stop() == 0
    assert not [pid for pid in children if is_alive(pid)]
    assert not list((Path(server.log_path).parent).glob("vkv-*"))
    check_log(server)
