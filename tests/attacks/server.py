"""Good callers of a server beside hostile ones, disconnects, kills: nothing may be wrong.

    python tests/attacks/server.py [--seconds 600] [--clients 64] [--seed 0]

Half of the callers ask what has an answer that the library gave beforehand, and compare; the others
mean harm (`tests/support/hostile.py`). Afterwards no page, descriptor or thread may be missing, and
resident memory may have grown by MOST_GROWTH_MIB since the first quarter. Then 200 callers hang up,
and processes are killed. The exit status is 1 if anything was wrong.
`tests/runtime/serving/test_attack.py` is its short form.
"""

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import callers
import hostile
import httpx
from callers import Streamed, Wrong
from served import Served, is_alive
from vkv import LLM
from vkv.bench.record import Table

MOST_GROWTH_MIB = 32
MOST_BODY_BYTES = 200_000
MOST_STREAMS = 6  # that run at once: some are of two requests
KEY = "the-key"
OPTIONS = ("--repeatable", "--max-num-seqs", "8", "--restart-engine", "--api-key", KEY)
OPTIONS += ("--max-body-bytes", str(MOST_BODY_BYTES))


class Found:
    """What was done, and what was wrong."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.rows: list[list[str]] = []

    def check(self, what: str, is_right: bool, detail: object = "") -> None:
        """Note a finding."""
        self.rows.append([what, "right" if is_right else "WRONG", str(detail)])
        sys.stderr.write(f"{self.rows[-1]}\n")
        if not is_right:
            self.wrong.append(f"{what}: {detail}")


def serve(folder: Path, name: str, *more: str) -> Served:
    """A server whose temporary files are in `folder`."""
    server = Served(*OPTIONS, *more, log=folder / f"{name}.log")
    server.client.headers["authorization"] = f"Bearer {KEY}"
    return server


def target_of(server: Served) -> hostile.Target:
    """Where it is attacked."""
    url = httpx.URL(server.url)
    assert url.port is not None
    return hostile.Target(url.host, url.port, KEY, MOST_BODY_BYTES)


def client_of(server: Served) -> httpx.AsyncClient:
    """A client whose requests are let in."""
    headers = {"authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120, limits=limits)


# -- what a process holds --------------------------------------------------------------------------


def vitals(pid: int) -> dict[str, int]:
    """Resident MiB, descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "resident MiB": int(fields["VmRSS"].split()[0]) >> 10,
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(fields["Threads"]),
    }


def both(server: Served) -> dict[str, dict[str, int]]:
    """Of the front and of the engine."""
    return {"front": vitals(server.process.pid), "engine": vitals(server.engine())}


def wait_for(condition: Callable[[], bool], within_s: float) -> float | None:
    """Seconds until it holds; None if it does not in time."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > within_s:
            return None
        time.sleep(0.02)
    return time.monotonic() - begin


def is_idle(server: Served) -> bool:
    """Whether nothing is under way, and no page is held by a request."""
    load = server.load()
    return not (load["server_load"] or load["running"] or load["kv_used_bytes"])


def check_idle(found: Found, server: Served, what: str) -> None:
    """All must be given back within a second."""
    took_s = wait_for(lambda: is_idle(server), 1.0)
    detail = server.load() if took_s is None else f"{took_s:.2f} s"
    found.check(f"{what}: pages and places are back", took_s is not None, detail)


def check_vitals(
    found: Found, server: Served, what: str, before: dict[str, dict[str, int]]
) -> None:
    """Descriptors and threads must be what they were, within a second; memory nearly."""
    wait_for(lambda: not _more(both(server), before), 1.0)
    after = both(server)
    for process, values in after.items():
        for name, value in values.items():
            allowed = before[process][name] + (MOST_GROWTH_MIB if "MiB" in name else 0)
            detail = f"{before[process][name]}, then {value}"
            found.check(f"{what}: {name} of the {process}", value <= allowed, detail)


def _more(after: dict[str, dict[str, int]], before: dict[str, dict[str, int]]) -> bool:
    names = ("descriptors", "threads")
    return any(after[process][n] > before[process][n] for process in after for n in names)


def check_log(found: Found, server: Served, what: str) -> None:
    """No traceback, no status of 500."""
    log = server.log()
    lines = [line for line in log.splitlines() if '" 500 ' in line or "Traceback" in line]
    lines += [line for line in log.splitlines() if "never retrieved" in line or " ERROR " in line]
    found.check(f"{what}: the log", not lines, lines[:3])


# -- the attacks -----------------------------------------------------------------------------------


async def mixed(
    found: Found, server: Served, cases: list[callers.Case], seconds: float, clients: int, seed: int
) -> None:
    """Good callers beside hostile ones, for so long."""
    target, end = target_of(server), time.monotonic() + seconds

    async def good(rng: random.Random, client: httpx.AsyncClient) -> str:
        await callers.ask(client, case := rng.choice(cases), streams=rng.random() < 0.5)
        return f"right answers, {case.path}"

    async def bad(rng: random.Random) -> str:
        harm = rng.choice(hostile.HARM)
        await harm(target, rng)
        return harm.__name__.replace("_", " ")

    async def work(number: int, client: httpx.AsyncClient) -> None:
        rng = random.Random(1000 * seed + number)
        while time.monotonic() < end:
            try:
                found.done[await (good(rng, client) if number % 2 else bad(rng))] += 1
            except (Wrong, OSError, TimeoutError, httpx.HTTPError, EOFError) as error:
                found.wrong.append(f"{type(error).__name__}: {error}"[:600])

    async with client_of(server) as client:
        await asyncio.gather(*(work(number, client) for number in range(clients)))


async def disconnect(found: Found, server: Served, count: int, seed: int) -> None:
    """So many callers leave at some time."""
    target, rng = target_of(server), random.Random(seed)
    harms = [rng.choice(hostile.LEAVING) for _ in range(count)]
    for error in await asyncio.gather(
        *(harm(target, random.Random(seed + i)) for i, harm in enumerate(harms)),
        return_exceptions=True,
    ):
        if error is not None:
            found.wrong.append(f"{type(error).__name__}: {error}"[:600])
    found.done["disconnects"] += count


async def read_streams(server: Served, count: int, then: Callable[[], object]) -> list[Streamed]:
    """Streams that all have begun when `then` is called, to their ends."""
    begun: list[asyncio.Future[None]] = [asyncio.Future() for _ in range(count)]
    reads = [Streamed() for _ in range(count)]

    async def read(number: int) -> None:
        path, body = hostile.STREAMS[number % len(hostile.STREAMS)]
        headers = {"connection": "close"}
        try:
            async with client.stream("POST", path, json=body, headers=headers) as answer:
                async for line in answer.aiter_lines():
                    reads[number].take(line)
                    if not begun[number].done():
                        begun[number].set_result(None)
        except httpx.TransportError:
            reads[number].end = reads[number].end or "broken"
        if not begun[number].done():
            begun[number].set_result(None)

    async with client_of(server) as client:
        tasks = [asyncio.ensure_future(read(number)) for number in range(count)]
        await asyncio.gather(*begun)
        await asyncio.to_thread(then)
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
    return reads


def ends(reads: list[Streamed]) -> dict[str, int]:
    """How streams ended, counted."""
    return dict(Counter(str(read.end) for read in reads))


async def check_answers(found: Found, server: Served, what: str, cases: list[callers.Case]) -> None:
    """It answers, and rightly."""
    try:
        async with client_of(server) as client:
            for case in cases[:20]:
                await callers.ask(client, case, streams=True)
        found.check(f"{what}: answers after it", True)
    except (Wrong, httpx.HTTPError) as error:
        found.check(f"{what}: answers after it", False, error)


async def kill_engine(found: Found, server: Served, cases: list[callers.Case]) -> None:
    """Streams have an end, and another engine comes."""
    what, told = "a killed engine", {}

    def kill() -> None:
        os.kill(server.engine(), signal.SIGKILL)
        told["s"] = wait_for(lambda: server.client.get("/health").status_code == 503, 1.0)

    reads = await read_streams(server, MOST_STREAMS, kill)
    found.check(f"{what}: every stream ends with an error event", _all(reads, "error"), ends(reads))
    found.check(f"{what}: /health within a second", told["s"] is not None, told["s"])
    await asyncio.to_thread(server.wait_until_ready)
    await check_answers(found, server, what, cases)
    check_idle(found, server, what)


def _all(reads: list[Streamed], end: str) -> bool:
    return all(read.end == end for read in reads)


async def kill_front(found: Found, folder: Path, cases: list[callers.Case]) -> None:
    """The streams of the other front go on, and another one comes."""
    what = "a killed front of two"
    server = serve(folder, "fronts", "--api-server-count", "2")
    engine = server.engine()

    def kill() -> None:
        """The one of more callers."""
        fronts = [pid for pid in server.children() if pid != engine]
        front = max(fronts, key=lambda pid: vitals(pid)["descriptors"])
        os.kill(front, signal.SIGKILL)

    reads = await read_streams(server, MOST_STREAMS, kill)
    is_right = all(read.end in ("done", "broken") for read in reads)
    found.check(f"{what}: others' streams end well", is_right, ends(reads))
    is_back = wait_for(lambda: len(server.children()) == 3, 30)
    found.check(f"{what}: it is started again", is_back is not None, is_back)
    await check_answers(found, server, what, cases)
    check_idle(found, server, what)
    found.check(f"{what}: exit status", server.stop() == 0)
    check_left(found, folder, what, server, [engine])


async def end_under_load(found: Found, folder: Path, patience_s: int) -> None:
    """Streams have their end, and nothing is left behind."""
    what = f"SIGTERM, {patience_s} s"
    server = serve(folder, f"sigterm-{patience_s}", "--shutdown-timeout", str(patience_s))
    children = server.children()
    target, rng = target_of(server), random.Random(0)
    async with target.connection() as (_, writer):  # one that takes nothing
        writer.write(target.request(*hostile.STREAMS[0]))
        loose = [asyncio.ensure_future(hostile.left(target, rng)) for _ in range(8)]
        reads = await read_streams(server, MOST_STREAMS, server.process.terminate)
        await asyncio.gather(*loose, return_exceptions=True)
    found.check(f"{what}: every stream ends", _all(reads, "done"), ends(reads))
    status = await asyncio.to_thread(server.stop)
    found.check(f"{what}: exit status", status == 0, status)
    check_log(found, server, what)
    check_left(found, folder, what, server, children)


def kill_supervisor(found: Found, folder: Path) -> None:
    """Its children end; what a kill leaves in the temporary folder is told, and is all."""
    what = "a killed supervisor"
    server = serve(folder, "supervisor", "--api-server-count", "2")
    children = server.children()
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    took_s = wait_for(lambda: not any(map(is_alive, children)), 5.0)
    found.check(f"{what}: its children end", took_s is not None, took_s)
    kept = sorted(path.name for path in folder.glob("vkv-*"))
    detail = f"{len(kept)} folders stay in the temporary folder: the socket's and the metrics'"
    found.check(f"{what}: what is left", len(kept) == 2, detail)
    for name in kept:
        shutil.rmtree(folder / name)


def check_left(found: Found, folder: Path, what: str, server: Served, children: list[int]) -> None:
    """No process, no file."""
    kept = [path.name for path in folder.glob("vkv-*")]
    kept += [f"process {pid}" for pid in (server.process.pid, *children) if is_alive(pid)]
    found.check(f"{what}: nothing is left", not kept, kept)


# -- all of it -------------------------------------------------------------------------------------


async def attack(found: Found, folder: Path, options: argparse.Namespace) -> None:
    """All attacks, one after another."""
    with LLM(device="cpu", repeatable=True, max_seqs=8) as llm:
        cases = callers.known_cases(llm, options.seed, 100)
    server = serve(folder, "mixed")
    part = options.seconds / 4
    await mixed(found, server, cases, part, options.clients, options.seed)
    check_idle(found, server, "the first quarter")
    time.sleep(1.0)
    before = both(server)
    await mixed(found, server, cases, 3 * part, options.clients, options.seed + 1)
    check_idle(found, server, "the end")
    check_vitals(found, server, "the end", before)
    await disconnect(found, server, 200, options.seed)
    check_idle(found, server, "200 disconnects")
    check_vitals(found, server, "200 disconnects", before)
    check_log(found, server, "all of it")
    await kill_engine(found, server, cases)
    found.check("SIGTERM at rest: exit status", server.stop() == 0)
    check_left(found, folder, "SIGTERM at rest", server, [])
    await kill_front(found, folder, cases)
    for patience_s in (30, 0):
        await end_under_load(found, folder, patience_s)
    kill_supervisor(found, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="of mixed load")
    parser.add_argument("--clients", type=int, default=64, help="callers at once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = Found()
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        os.environ["TMPDIR"] = folder  # of the servers, so that others' files do not count
        shared = set(os.listdir("/dev/shm"))
        asyncio.run(attack(found, Path(folder), options))
        new = {name for name in set(os.listdir("/dev/shm")) - shared if name.startswith("vkv")}
        found.check("shared memory: nothing is left", not new, new)
    done = [[what, f"{count:,}"] for what, count in sorted(found.done.items())]
    for table in (
        Table(title="What was done", columns=("", "times"), rows=done),
        Table(title="What was found", columns=("", "", ""), rows=found.rows),
    ):
        sys.stdout.write(table.markdown() + "\n")
    for text, count in Counter(found.wrong).most_common(30):
        sys.stdout.write(f"WRONG, {count} times: {text}\n")
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
