"""Rows in virtual memory that grow in place: where `VirtualCache` keeps keys and values.

A *row* is one token of every sequence of a batch, [batch, heads, dim], and the rows of a layer
follow each other. So a batch grows at one end only, whatever its size, and a layer needs one run
of pages for its keys and one for its values.
"""

import copy
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ..vmem import Page, VmemDriver, open_driver
from ..vmem.errors import ForkedProcess, InvalidOperation

_AHEAD = 16  # beside each so many pages that rows need, one more may be mapped
_CPU_PAGE_BYTES = 64 << 10  # every layer takes two pages at least; a GPU has its own size
_COPY_BYTES = 4 << 20  # rows are copied in portions of about this size


@dataclass
class Range:
    """A reserved range of addresses and the one run of pages mapped in it."""

    driver: VmemDriver
    address: int
    size: int
    first_page: int = 0
    pages: list[Page] = field(default_factory=list)

    @property
    def end_page(self) -> int:
        return self.first_page + len(self.pages)


class Arena:
    """The drivers of one cache, one for each device it meets, and the ranges reserved from them.

    Memory is given back when nobody can touch it any more (`Lease`). That may be found out at
    any moment, by the garbage collector too and in the midst of another call to the same driver,
    so a range that is let go is queued, and given back as soon as no call is under way.

    Args:
        page_bytes: size of a physical page; None for 64 KiB on a CPU, and a GPU's own size.
    """

    def __init__(self, page_bytes: int | None = None) -> None:
        self.page_bytes = page_bytes
        self._drivers: dict[torch.device, VmemDriver] = {}
        self._lock = threading.Lock()  # held during calls; never awaited by a finalizer
        self._let_go: deque[Range] = deque()
        _finalize(self, _close, self._drivers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Arena":
        return Arena(self.page_bytes)

    @property
    def physical_bytes(self) -> int:
        return sum(d.num_pages * d.page_bytes for d in self._drivers.values())

    @property
    def virtual_bytes(self) -> int:
        return sum(d.reserved_bytes for d in self._drivers.values())

    def reserve(self, device: torch.device, size: int) -> Range:
        """At least `size` bytes of addresses on `device`, unbacked."""
        with self._calling():
            driver = self._drivers.get(device)
            if driver is None:
                page_bytes = self.page_bytes
                if page_bytes is None and device.type == "cpu":
                    page_bytes = _CPU_PAGE_BYTES
                driver = self._drivers[device] = open_driver(device, page_bytes)
            size = _ceil_div(max(size, 1), driver.page_bytes) * driver.page_bytes
            return Range(driver, driver.reserve(size), size)

    def back(self, area: Range, start: int, end: int) -> None:
        """Let pages lie behind bytes `start … end` of `area`, and nothing much beside them.

        Pages wholly before `start` go back to the system, and so do those behind `end` but one
        in sixteen; as many are mapped ahead where pages are missing, so that the number of calls
        and of mappings grows with the logarithm of the length. Raises OutOfPages or
        OutOfMappings, with `start … end` backed as far as before.
        """
        page_bytes = area.driver.page_bytes
        first, needed = start // page_bytes, _ceil_div(end, page_bytes)
        ahead = min(max(needed - first - 1, 0) // _AHEAD, area.size // page_bytes - needed)
        with self._calling():
            self._drop(area, 0, max(first - area.first_page, 0))
            self._drop(area, max(needed + ahead - area.first_page, 0), len(area.pages))
            if not area.pages:
                area.first_page = first
            if needed > area.end_page:
                self._extend(area, needed + ahead - area.end_page)

    def let_go(self, area: Range) -> None:
        """Give `area` back, at once or when the call under way is over. For finalizers."""
        self._let_go.append(area)
        self._give_back()

    @contextmanager
    def _calling(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        while self._let_go and self._lock.acquire(blocking=False):
            try:
                while self._let_go:
                    self._free(self._let_go.popleft())
            finally:
                self._lock.release()

    def _free(self, area: Range) -> None:
        with suppress(ForkedProcess):  # in a child: the pages are its parent's
            self._drop(area, 0, len(area.pages))
            area.driver.free(area.address)

    def _extend(self, area: Range, num_pages: int) -> None:
        driver = area.driver
        pages = driver.create(num_pages)
        try:
            driver.map(area.address + area.end_page * driver.page_bytes, pages)
        except BaseException:
            driver.release(pages)
            raise
        area.pages.extend(pages)

    def _drop(self, area: Range, start: int, stop: int) -> None:
        """Give back `area.pages[start:stop]`, which are at either end of the run."""
        driver, leaving = area.driver, area.pages[start:stop]
        if not leaving:
            return
        driver.record_fence().wait()  # kernels that were launched may still touch them
        address = area.address + (area.first_page + start) * driver.page_bytes
        driver.unmap(address, len(leaving) * driver.page_bytes)
        del area.pages[start:stop]
        if start == 0:
            area.first_page += len(leaving)
        driver.release(leaving)


class Lease:
    """The right to touch a range: the memory is given back once its last holder is gone.

    Holders are the rows and every tensor over them, wherever a user keeps it.
    """

    def __init__(self, arena: Arena, area: Range) -> None:
        _finalize(self, arena.let_go, area)

    def extend_to(self, tensor: torch.Tensor) -> None:
        """Make the memory of `tensor`, and so every view of it, a holder."""
        _finalize(tensor.untyped_storage(), Lease._ends_with_a_tensor, self)

    def _ends_with_a_tensor(self) -> None:
        """Nothing is to be done but to drop `self`."""


class Rows:
    """Keys or values of one layer, at addresses that stay while they grow.

    Args:
        arena: where the memory comes from.
        shape: of a row, (batch, heads, dim).
        max_len: the most rows, in tokens.
        dtype, device: of the states.

    Attributes:
        start, end: the rows that are held, counted from the first ever. A caller that needs the
            first ones no longer moves `start`, and the next growth gives their pages back.
    """

    def __init__(
        self,
        arena: Arena,
        shape: tuple[int, int, int],
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.max_len = max_len
        self.start = self.end = 0
        self._arena = arena
        self._row_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        self._range = arena.reserve(device, max_len * self._row_bytes)
        self._lease = Lease(arena, self._range)
        self._lay_out()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rows":
        clone = self._empty(self.shape[0], copy.deepcopy(self._arena, memo))
        clone._copy(self, None)
        return clone

    def states(self, start: int | None = None) -> torch.Tensor:
        """Rows `start` (None: the first held) to the end, [batch, heads, num_tokens, dim]."""
        return self._between(self.start if start is None else start, self.end).permute(1, 2, 0, 3)

    def make_room(self, states: torch.Tensor) -> None:
        """Back the rows that `states`, [batch, heads, num_tokens, dim], will be appended to.

        Raises InvalidOperation if they are of another batch or of other heads; a Shortage if
        memory is short. No row has changed then.
        """
        batch, heads, num_tokens, dim = states.shape
        if (batch, heads, dim) != self.shape:
            raise InvalidOperation(
                f"the cache holds (batch, heads, dim) = {self.shape} and was given "
                f"{(batch, heads, dim)}; use a new VirtualCache, or reset() this one"
            )
        self._back(self.start, self.end + num_tokens)

    def append(self, states: torch.Tensor) -> None:
        """Write `states`, [batch, heads, num_tokens, dim], behind the rows held.

        There must be room for them.
        """
        end = self.end + states.shape[2]
        self._between(self.end, end).copy_(states.detach().permute(2, 0, 1, 3))
        self.end = end

    def cut(self, start: int, end: int) -> None:
        """Of the rows held, hold `start … end` only; pages that back no other are given back."""
        self.start, self.end = start, end
        self._back(start, end, shrink=True)

    def select(self, indices: torch.Tensor) -> "Rows":
        """The rows of the sequences `indices`, int64 [new_batch].

        In place if the batch stays as large, else in memory of their own, with the old rows left
        as they are. Raises a Shortage, with nothing changed.
        """
        in_place = len(indices) == self.shape[0]
        chosen = self if in_place else self._empty(len(indices), self._arena)
        chosen._copy(self, indices)
        return chosen

    def _empty(self, batch: int, arena: Arena) -> "Rows":
        shape = (batch, *self.shape[1:])
        return Rows(arena, shape, self.max_len, self.dtype, self._backed.device)

    def _copy(self, source: "Rows", indices: torch.Tensor | None) -> None:
        """Take the rows of `source`, or of some of its sequences, a portion at a time."""
        self._back(source.start, source.end)
        self.start, self.end = source.start, source.end
        portion = max(1, _COPY_BYTES // max(self._row_bytes, 1))
        for start in range(self.start, self.end, portion):
            end = min(start + portion, self.end)
            rows = source._between(start, end)
            self._between(start, end).copy_(rows if indices is None else rows[:, indices])

    def _between(self, start: int, end: int) -> torch.Tensor:
        """Rows `start … end`, which are backed: [num_tokens, batch, heads, dim]."""
        return self._backed[start - self._first : end - self._first]

    def _back(self, start: int, end: int, *, shrink: bool = False) -> None:
        area, row_bytes = self._range, self._row_bytes
        lacks = end > self._first + len(self._backed)
        has_spare = start * row_bytes // area.driver.page_bytes > area.first_page
        if shrink or lacks or has_spare:  # seldom: a page holds many rows
            try:
                self._arena.back(area, start * row_bytes, end * row_bytes)
            finally:
                self._lay_out()

    def _lay_out(self) -> None:
        """Lay a tensor over the rows that are backed, and over no others: whatever PyTorch does
        with the whole of a storage (saving it, say) then meets memory."""
        area, row_bytes = self._range, max(self._row_bytes, 1)
        page_bytes = area.driver.page_bytes
        batch, heads, dim = self.shape
        self._first = _ceil_div(area.first_page * page_bytes, row_bytes)
        end = max(self._first, min(area.end_page * page_bytes // row_bytes, self.max_len))
        with torch.inference_mode(False):  # or it could be written to in that mode only
            self._backed = area.driver.tensor(
                area.address + self._first * self._row_bytes,
                (end - self._first, batch, heads, dim),
                (batch * heads * dim, heads * dim, dim, 1),
                self.dtype,
            )
        self._lease.extend_to(self._backed)


def _finalize(target: object, function: Any, *args: object) -> None:
    """Call `function` when `target` is gone; not at exit, when the system takes everything."""
    weakref.finalize(target, function, *args).atexit = False


def _close(drivers: dict[torch.device, VmemDriver]) -> None:
    for driver in drivers.values():
        with suppress(ForkedProcess):
            driver.close()


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
