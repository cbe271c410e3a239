"""Progress bars for batches and benchmarks that take a while."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PATIENCE_S = 2.0  # without a word; then a terminal is shown a bar
_INTERVAL_S = 0.2


class Request(Protocol):
    """What is shown of a request."""

    @property
    def num_output_tokens(self) -> int: ...
    @property
    def is_finished(self) -> bool: ...


class BatchProgress:
    """Shows finished requests, tokens per second and the time left, on standard error.

    `shown` True shows it at once, False never, None on a terminal once the batch takes long.
    """

    def __init__(self, requests: Sequence[Request], shown: bool | None) -> None:
        self._requests = requests
        self._wanted = shown if shown is not None else sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + (0.0 if shown else _PATIENCE_S)
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def update(self) -> None:
        """Redraw, if it is time to."""
        now = time.monotonic()
        if self._wanted and now >= self._next:
            self._draw(now)
            took = time.monotonic() - now  # to count a hundred thousand requests takes a while
            self._next = now + max(_INTERVAL_S, 50 * took)

    def _draw(self, now: float) -> None:
        if self._progress is None:
            console = Console(stderr=True)
            self._progress = Progress(
                TextColumn("generating"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:.0f} tokens/s"),
                TimeRemainingColumn(),
                console=console,
                transient=console.is_terminal,  # a log file keeps the last state instead
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=len(self._requests), rate=0.0)
        tokens = sum(request.num_output_tokens for request in self._requests)
        finished = sum(request.is_finished for request in self._requests)
        rate = tokens / max(now - self._start, 1e-9)
        self._progress.update(self._task, completed=finished, rate=rate)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._draw(time.monotonic())
            self._progress.stop()


@contextmanager
def counted(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's standard error; the function that it yields counts one of `total`."""
    console = Console(stderr=True)
    with Progress(
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
