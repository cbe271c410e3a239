"""`vkv bench move`: what it takes to get a slot's KV into another process, by size and by channel.

Two processes have a cache each, of one layout: keys and values of 16 layers in one range. A slot is
filled in the first; then its tokens move to the second, which reads all of them once, and closes
the slot. Channels take turns: pages handed over, and copies over a Unix socket and over TCP, the
last also with checksums. Measured are the stage (from asking for it to the receiver's last answer),
the ends of both transfers, and the first read. A copy of as many bytes within one process stands
beside them.
"""

import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ...allocator import KVCache, KVLayout, LayerGeometry, PagePool
from ...allocator.transfer import TransferKey, Transfers
from ...allocator.transfer.channels import Channel, CopyChannel, PageChannel
from ...runtime.frontend.progress import counted
from ...vmem import open_driver
from ...vmem.errors import InvalidOperation
from ..limits import LimitsProbe
from ..record import Findings, Record, Table, record_name
from .options import MoveOptions

WAYS = ("pages", "copies, Unix", "copies, TCP", "copies, TCP, checked")
_LAYERS = 16
_LAYER = LayerGeometry(num_kv_heads=4, key_dim=64, value_dim=64)


@dataclass
class Moves:
    """Moves of one size in one way.

    Attributes:
        memory_s, stage_s, end_s, read_s: of each move, what the receiver took to have memory (by
            pages: the promise of it), what the stage, both transfers' ends, and the receiver's
            first read of all bytes took.
        num_copied: bytes that one move copied.
    """

    way: str
    num_bytes: int
    memory_s: list[float] = field(default_factory=list)
    stage_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)
    num_copied: int = 0


def run(options: MoveOptions, folder: Path, command: str) -> tuple[Path, list[Table]]:
    """Measure, and write record, table and plot into `folder`; returns the record's path."""
    device = torch.device("cpu")
    record = Record(
        folder,
        record_name("move", device.type),
        device=device,
        config=asdict(options),
        command=command,
    )
    moves: list[Moves] = []
    probe = LimitsProbe(device, torch.float32)

    def steps() -> Generator[None, None, None]:
        with ExitStack() as stack:
            near = stack.enter_context(_cache(options))
            ways = {way: stack.enter_context(_other_process(way, options)) for way in WAYS}
            advance = stack.enter_context(counted("move", len(options.kv_bytes)))
            for num_bytes in options.kv_bytes:
                probe.measure()
                moves.extend(_of_size(near, ways, num_bytes, options.repeats))
                advance()
                yield

    def findings() -> Findings:
        return Findings(
            results={"moves": [asdict(found) for found in moves]},
            tables=[_table(moves)],
            draw=partial(_plot, moves),
        )

    return record.grow(steps(), findings, probe)


def _of_size(
    near: KVCache, ways: "dict[str, tuple[Channel, Connection]]", num_bytes: int, repeats: int
) -> list[Moves]:
    """All ways in turns, and a copy within this process."""
    num_tokens = num_bytes // near.layout.token_bytes
    found = {way: Moves(way, num_bytes) for way in (*ways, "memcpy")}
    for repeat in range(repeats):
        for number, (way, (channel, pipe)) in enumerate(ways.items()):
            key = TransferKey(f"{way} {num_bytes}", repeat * len(ways) + number)
            _move(near, channel, pipe, key, num_tokens, found[way])
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.ones_like(source)
    for _ in range(repeats):
        start_s = time.perf_counter()
        target.copy_(source)
        found["memcpy"].stage_s.append(time.perf_counter() - start_s)
        found["memcpy"].memory_s.append(0.0)
        found["memcpy"].end_s.append(0.0)
        found["memcpy"].read_s.append(_read([target]))
    found["memcpy"].num_copied = num_bytes
    return list(found.values())


def _move(
    near: KVCache,
    channel: Channel,
    pipe: Connection,
    key: TransferKey,
    num_tokens: int,
    found: Moves,
) -> None:
    slot = near.open()
    near.grow(slot, num_tokens)
    for (piece,) in near.spans(slot, 0, num_tokens):
        piece.fill_(key.epoch % 255 + 1)
    outgoing = Transfers(near).send(key, slot, num_tokens)
    start_s = time.perf_counter()
    pipe.send((key, num_tokens))
    pipe.recv()  # the receiver waits
    found.memory_s.append(time.perf_counter() - start_s)
    start_s = time.perf_counter()
    job = channel.send(outgoing, 0, num_tokens)
    job.run()
    found.stage_s.append(time.perf_counter() - start_s)
    if job.error is not None:
        raise job.error
    pipe.send("commit")
    read_s = pipe.recv()
    outgoing.commit()
    found.end_s.append(time.perf_counter() - start_s - found.stage_s[-1] - read_s)
    found.read_s.append(read_s)
    found.num_copied = job.num_bytes
    near.close(slot)
    near.pool.trim()


# -- the other process ---------------------------------------------------------------------------


@contextmanager
def _other_process(way: str, options: MoveOptions) -> Iterator[tuple[Channel, Connection]]:
    """A process with a cache, the channel to it, and a pipe to tell it what comes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = _connected("TCP" in way)
    pipe, its_pipe = context.Pipe()
    process = context.Process(target=_receive, args=(way, options, theirs, its_pipe), daemon=True)
    process.start()
    theirs.close()
    its_pipe.close()
    channel = _channel(way, ours)
    try:
        yield channel, pipe
    finally:
        channel.close()
        pipe.close()
        process.join(10)
        process.kill()


def _receive(way: str, options: MoveOptions, sock: socket.socket, pipe: Connection) -> None:
    """What the other process does: have everything, read it, and let it go."""
    torch.set_num_threads(1)
    channel = _channel(way, sock)
    with _cache(options) as cache:
        transfers = Transfers(cache)
        while True:
            try:
                key, num_tokens = pipe.recv()
            except EOFError:  # all was measured
                return
            tokens = range(num_tokens)
            incoming = transfers.receive(key, tokens, by_pages=channel.moves_pages)
            pipe.send("ready")
            job = channel.receive(incoming, 0, num_tokens)
            job.run()
            pipe.recv()
            if job.error is not None:
                raise job.error
            incoming.commit()
            slot = incoming.claim()
            if slot is None:
                raise InvalidOperation(f"{key} was committed and cannot be claimed")
            pieces = [piece for stream in cache.spans(slot, 0, num_tokens) for piece in stream]
            pipe.send(_read(pieces))
            if any(piece[place] != key.epoch % 255 + 1 for piece in pieces for place in (0, -1)):
                raise InvalidOperation("other bytes came than were sent")
            cache.close(slot)
            cache.pool.trim()


def _read(pieces: list[torch.Tensor]) -> float:
    """Seconds to read all bytes once."""
    start_s = time.perf_counter()
    for piece in pieces:
        piece[: len(piece) // 8 * 8].view(torch.int64).sum()
    return time.perf_counter() - start_s


def _channel(way: str, sock: socket.socket) -> Channel:
    if way == "pages":
        return PageChannel(sock)
    return CopyChannel(sock, is_checked="checked" in way)


def _connected(tcp: bool) -> tuple[socket.socket, socket.socket]:
    if not tcp:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


@contextmanager
def _cache(options: MoveOptions) -> Iterator[KVCache]:
    """A movable cache with room for two moves of the largest size."""
    most = max(options.kv_bytes)
    layers = (_LAYER,) * _LAYERS
    token_bytes = _LAYERS * 4 * 128 * 4
    layout = KVLayout(
        layers, torch.float32, max_len=most // token_bytes + 1, page_bytes=options.page_bytes
    )
    limit = 2 * most + 4 * options.page_bytes * layout.num_ranges
    with open_driver("cpu", options.page_bytes) as driver:
        cache = KVCache(layout, PagePool(driver, limit), num_slots=4, movable=True)
        with cache:
            yield cache


# -- results -------------------------------------------------------------------------------------


def _table(moves: list[Moves]) -> Table:
    rows = [
        [
            f"{found.num_bytes >> 20} MiB",
            found.way,
            *map(_milliseconds, (found.memory_s, found.stage_s, found.end_s, found.read_s)),
            f"{found.num_bytes / statistics.median(found.stage_s) / 1e9:.2f}",
            f"{found.num_copied >> 20} MiB" if found.num_copied else "0",
        ]
        for found in moves
    ]
    return Table(
        title="KV into another process, ms (median)",
        columns=["KV", "way", "memory", "stage", "ends", "first read", "GB/s", "copied"],
        rows=rows,
        notes=[f"{os.cpu_count()} cores; memcpy is a copy by one call within the first process."],
    )


def _milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.3g}"


def _plot(moves: list[Moves], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5))
    axes: Any = figure.subplots()
    for way in dict.fromkeys(found.way for found in moves):
        of_way = [found for found in moves if found.way == way]
        axes.plot(
            [found.num_bytes / (1 << 20) for found in of_way],
            [statistics.median(found.stage_s) * 1e3 for found in of_way],
            marker=".",
            label=way,
        )
    axes.set_xlabel("KV, MiB")
    axes.set_ylabel("ms until it is there")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
