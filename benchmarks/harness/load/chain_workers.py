"""Engines in processes of their own, which run requests at given times all together."""

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ...runtime.frontend.llm import LLM
from ..driver import Driver
from .client import RequestTrace, drive
from .workloads import WorkItem

_HEAD_START_S = 0.2  # for what the workers are told to reach all of them
_END_S = 60.0
_WAIT_POLICY = "OMP_WAIT_POLICY"  # of OpenMP's threads; read when a process starts


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker opens: a model's folder, or a zoo and the name of its first model."""

    source: str
    model: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Load:
    """Requests of one worker, and when each arrives, in seconds since the start of all."""

    work: Sequence[WorkItem]
    arrivals_s: Sequence[float]


@dataclass(frozen=True)
class Answer:
    """What came of a load.

    Attributes:
        pss_bytes: of the worker's memory, each page divided by the processes that share it.
        stats: of blocks: what they take, and the rows of their calls.
    """

    requests: list[RequestTrace]
    pss_bytes: int
    block_bytes: int
    rows_per_call: float


class Workers:
    """Those of one way to serve the models.

    Args:
        orders: for each worker.
    """

    def __init__(self, orders: Sequence[Order]) -> None:
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        with _waiting_passively():
            for order in orders:
                self._start(order)
        for end in self._ends:
            end.recv()  # it is ready; EOFError if it died

    def _start(self, order: Order) -> None:
        context = multiprocessing.get_context("spawn")
        mine, its = context.Pipe()
        process = context.Process(target=_work, args=(its, order), daemon=True)
        process.start()
        its.close()
        self._ends.append(mine)
        self._processes.append(process)

    def run(self, loads: Sequence[Load]) -> list[Answer]:
        """Have each worker run its load; all start at the same time."""
        start = time.monotonic() + _HEAD_START_S
        for end, load in zip(self._ends, loads, strict=True):
            end.send((start, load))
        return [end.recv() for end in self._ends]

    def close(self) -> None:
        """End all workers."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(_END_S)


@contextmanager
def _waiting_passively() -> Iterator[None]:
    """Processes that start meanwhile share the cores: a thread of theirs that waits for another
    must not keep one busy.
    """
    before = os.environ.get(_WAIT_POLICY)
    os.environ[_WAIT_POLICY] = "passive"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WAIT_POLICY]
        else:
            os.environ[_WAIT_POLICY] = before


@contextmanager
def workers(orders: Sequence[Order]) -> Iterator[Workers]:
    """Workers for as long as they are wanted."""
    found = Workers(orders)
    try:
        yield found
    finally:
        found.close()


def _work(pipe: Connection, order: Order) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # whichever way, all of the machine
    with LLM(order.source, model=order.model, **order.options) as llm:
        driver = Driver(llm)
        pipe.send("ready")
        while True:
            try:
                start, load = pipe.recv()
            except EOFError:
                return
            time.sleep(max(0.0, start - time.monotonic()))
            trace = drive(driver, load.work, load.arrivals_s) if load.work else None
            blocks = llm.stats().blocks
            calls = sum(block.num_calls for block in blocks)
            pipe.send(
                Answer(
                    requests=trace.requests if trace is not None else [],
                    pss_bytes=pss_bytes(),
                    block_bytes=sum(block.num_bytes for block in blocks),
                    rows_per_call=sum(b.num_rows for b in blocks) / calls if calls else 0.0,
                )
            )


def pss_bytes() -> int:
    """Of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0
