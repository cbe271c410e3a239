"""Tensors in virtual memory that grow in place: where `VirtualCache` keeps keys and values.

On a CPU every head of every sequence has a *lane* of addresses, in which its tokens follow each
other: kernels there read one head at a time, faster than over tokens whose heads lie side by side.
On a GPU, where pages are megabytes, one lane has whole tokens of all sequences. All lanes of a
layer's keys, or of its values, grow together.
"""

import copy
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...vmem import OwnedLock, Page, ProcessOwner, VmemDriver, janitor, open_driver
from ...vmem.errors import ForkedProcess, InvalidOperation

_AHEAD = 64  # beside each so many pages that a lane needs, one more may be mapped
_CPU_PAGE_BYTES = 16 << 10  # every head takes two pages at least; a GPU has its own size
_COPY_BYTES = 4 << 20  # tokens are copied in portions of about this size


@dataclass
class Range:
    """A reserved range of addresses: lanes of equal size, each with one run of pages.

    Attributes:
        first_page: where the runs begin in their lanes, in pages.
        runs: the pages of each lane, equally many in all.
    """

    driver: VmemDriver
    address: int
    lane_bytes: int
    runs: list[list[Page]]
    first_page: int = 0

    @property
    def num_pages(self) -> int:
        """Of one lane."""
        return len(self.runs[0])

    @property
    def end_page(self) -> int:
        return self.first_page + self.num_pages

    def page_address(self, lane: int, page: int) -> int:
        """Where page `page` of a lane lies, counted from the lane's beginning."""
        return self.address + lane * self.lane_bytes + page * self.driver.page_bytes


class Arena:
    """The drivers of one cache, one for each device it meets, and the ranges reserved from them.

    Memory is given back when nobody can touch it any more (`Lease`). That may be found out at
    any moment, by the garbage collector too and in the midst of another call to the same driver,
    so a range that is let go is queued. The next call gives it back, or the janitor.

    Args:
        page_bytes: size of a physical page; None for 16 KiB on a CPU, and a GPU's own size.

    Attributes:
        owner: the process that may use the memory; a forked child may not.
    """

    def __init__(self, page_bytes: int | None = None) -> None:
        self.page_bytes = page_bytes
        self._drivers: dict[torch.device, VmemDriver] = {}
        self.owner = ProcessOwner("this virtual cache")
        self._lock = OwnedLock(self.owner)  # held during calls; no finaliser takes it
        self._let_go: deque[Range] = deque()
        janitor.start()
        _finalize(self, janitor.later, partial(_close, self._drivers))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Arena":
        return Arena(self.page_bytes)

    @property
    def physical_bytes(self) -> int:
        with self._calling():
            return sum(d.num_pages * d.page_bytes for d in self._drivers.values())

    @property
    def virtual_bytes(self) -> int:
        with self._calling():
            return sum(d.reserved_bytes for d in self._drivers.values())

    def reserve(self, device: torch.device, lane_bytes: int, num_lanes: int) -> Range:
        """Unbacked addresses on `device`: `num_lanes` lanes of at least `lane_bytes`."""
        with self._calling():
            driver = self._driver_of(device)
            lane_bytes = _ceil_div(max(lane_bytes, 1), driver.page_bytes) * driver.page_bytes
            address = driver.reserve(num_lanes * lane_bytes)
            return Range(driver, address, lane_bytes, [[] for _ in range(num_lanes)])

    def has_mappings_for(self, device: torch.device, num_lanes: int) -> bool:
        """Whether so many lanes leave half of the mappings to others; each takes two."""
        with self._calling():
            driver = self._driver_of(device)
            return driver.num_mappings + 2 * num_lanes <= driver.max_mappings // 2

    def back(self, area: Range, start: int, end: int) -> None:
        """Let pages lie behind bytes `start … end` of every lane, and nothing much beside them.

        Pages wholly before `start` go back to the system, and so do those behind `end` but one
        in sixty-four; as many are mapped ahead where a lane that has pages lacks some, so that
        the number of calls grows with the logarithm of the length. Raises OutOfPages or
        OutOfMappings, with `start … end` backed as far as before.
        """
        page_bytes = area.driver.page_bytes
        first, needed = start // page_bytes, _ceil_div(end, page_bytes)
        ahead = min(max(needed - first - 1, 0) // _AHEAD, area.lane_bytes // page_bytes - needed)
        with self._calling():
            self._drop(area, 0, max(first - area.first_page, 0))
            self._drop(area, max(needed + ahead - area.first_page, 0), area.num_pages)
            if not area.num_pages:
                area.first_page, ahead = first, 0
            if needed > area.end_page:
                self._extend(area, needed + ahead - area.end_page)

    def let_go(self, area: Range) -> None:
        """Give `area` back soon. For finalisers."""
        self._let_go.append(area)
        janitor.later(self._give_back)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        with self._lock:
            self._free_all()
            yield

    def _give_back(self) -> None:
        with suppress(ForkedProcess), self._lock:  # in a child: the pages are its parent's
            self._free_all()

    def _free_all(self) -> None:
        while self._let_go:
            self._free(self._let_go.popleft())

    def _free(self, area: Range) -> None:
        self._drop(area, 0, area.num_pages)
        area.driver.free(area.address)

    def _driver_of(self, device: torch.device) -> VmemDriver:
        driver = self._drivers.get(device)
        if driver is None:
            page_bytes = self.page_bytes
            if page_bytes is None and device.type == "cpu":
                page_bytes = _CPU_PAGE_BYTES
            # A tensor over several lanes spans the gaps between them: whatever PyTorch does with
            # the whole of its storage (saving it, say) must meet readable addresses.
            driver = open_driver(device, page_bytes, readable_gaps=True)
            self._drivers[device] = driver
        return driver

    def _extend(self, area: Range, num_pages: int) -> None:
        """Map `num_pages` more at the end of every lane, or nothing at all."""
        driver, end = area.driver, area.end_page
        num_lanes, size = len(area.runs), num_pages * driver.page_bytes
        starts = [area.page_address(lane, end) for lane in range(num_lanes)]
        homes = [home for s in starts for home in range(s, s + size, driver.page_bytes)]
        pages = driver.create(len(homes), homes)
        runs = [pages[i : i + num_pages] for i in range(0, len(pages), num_pages)]
        with ExitStack() as undo:
            undo.callback(driver.release, pages)
            for start, run in zip(starts, runs, strict=True):
                driver.map(start, run)
                undo.callback(driver.unmap, start, size)
            undo.pop_all()
        for held, run in zip(area.runs, runs, strict=True):
            held.extend(run)

    def _drop(self, area: Range, start: int, stop: int) -> None:
        """Give back the pages `start … stop` of every run, which are at either end of it."""
        driver, num_pages = area.driver, min(stop, area.num_pages) - start
        if num_pages <= 0:
            return
        driver.record_fence().wait()  # kernels that were launched may still touch them
        leaving = [page for run in area.runs for page in run[start : start + num_pages]]
        for lane, run in enumerate(area.runs):
            address = area.page_address(lane, area.first_page + start)
            driver.unmap(address, num_pages * driver.page_bytes)
            del run[start : start + num_pages]
        if start == 0:
            area.first_page += num_pages
        driver.release(leaving)


class Lease:
    """The right to touch a range: the memory is given back once its last holder is gone.

    Holders are a `LaneTensor` and every tensor over its memory, wherever a user keeps it.
    """

    def __init__(self, arena: Arena, area: Range) -> None:
        _finalize(self, arena.let_go, area)

    def extend_to(self, tensor: torch.Tensor) -> None:
        """Make the memory of `tensor`, and so every view of it, a holder."""
        _finalize(tensor.untyped_storage(), Lease._ends_with_a_tensor, self)

    def _ends_with_a_tensor(self) -> None:
        """Nothing is to be done but to drop `self`."""


class LaneTensor:
    """Keys or values of one layer, at addresses that stay while they grow.

    Args:
        arena: where the memory comes from.
        shape: of one token's states, (batch, heads, dim).
        max_len: the most tokens.
        dtype, device: of the states.

    Attributes:
        start, end: the tokens that are held, counted from the first ever. A caller that needs the
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
        batch, heads, dim = shape
        self._num_lanes = 1
        if device.type == "cpu" and arena.has_mappings_for(device, batch * heads):
            self._num_lanes = max(batch * heads, 1)
        self._token_bytes = batch * heads * dim * dtype.itemsize // self._num_lanes  # in a lane
        self._range = arena.reserve(device, max_len * self._token_bytes, self._num_lanes)
        self._lease = Lease(arena, self._range)
        self._lay_out()

    def __deepcopy__(self, memo: dict[int, Any]) -> "LaneTensor":
        clone = self._empty(self.shape[0], copy.deepcopy(self._arena, memo))
        clone._copy(self, None)
        return clone

    def states(self, start: int | None = None) -> torch.Tensor:
        """Tokens `start` (None: the first held) to the end, [batch, heads, num_tokens, dim]."""
        return self._between(self.start if start is None else start, self.end)

    def make_room(self, states: torch.Tensor) -> None:
        """Back the tokens that `states`, [batch, heads, num_tokens, dim], will be appended as.

        Raises InvalidOperation if they are of another batch or of other heads; a Shortage if
        memory is short. No token has changed then.
        """
        self._arena.owner.check()
        batch, heads, num_tokens, dim = states.shape
        if (batch, heads, dim) != self.shape:
            raise InvalidOperation(
                f"the cache holds (batch, heads, dim) = {self.shape} and was given "
                f"{(batch, heads, dim)}; use a new VirtualCache, or reset() this one"
            )
        self._back(self.start, self.end + num_tokens)

    def append(self, states: torch.Tensor) -> None:
        """Write `states`, [batch, heads, num_tokens, dim], behind the tokens held.

        There must be room for them.
        """
        self._arena.owner.check()
        end = self.end + states.shape[2]
        self._between(self.end, end).copy_(states.detach())
        self.end = end

    def cut(self, start: int, end: int) -> None:
        """Of the tokens held, hold `start … end` only; pages that back no other are given back."""
        self._arena.owner.check()
        self.start, self.end = start, end
        self._back(start, end, shrink=True)

    def select(self, indices: torch.Tensor) -> "LaneTensor":
        """The tokens of the sequences `indices`, int64 [new_batch].

        In place if the batch stays as large, else in memory of their own, with the old ones left
        as they are. Raises a Shortage, with nothing changed.
        """
        self._arena.owner.check()
        in_place = len(indices) == self.shape[0]
        chosen = self if in_place else self._empty(len(indices), self._arena)
        chosen._copy(self, indices)
        return chosen

    def _empty(self, batch: int, arena: Arena) -> "LaneTensor":
        shape = (batch, *self.shape[1:])
        return LaneTensor(arena, shape, self.max_len, self.dtype, self._backed.device)

    def _copy(self, source: "LaneTensor", indices: torch.Tensor | None) -> None:
        """Take the tokens of `source`, or of some of its sequences, a portion at a time."""
        source._arena.owner.check()
        self._back(source.start, source.end)
        self.start, self.end = source.start, source.end
        portion = max(1, _COPY_BYTES // max(self._token_bytes * self._num_lanes, 1))
        for start in range(self.start, self.end, portion):
            end = min(start + portion, self.end)
            states = source._between(start, end)
            self._between(start, end).copy_(states if indices is None else states[indices])

    def _between(self, start: int, end: int) -> torch.Tensor:
        """Tokens `start … end`, which are backed: [batch, heads, num_tokens, dim]."""
        return self._backed[:, :, start - self._first : end - self._first]

    def _back(self, start: int, end: int, *, shrink: bool = False) -> None:
        area, token_bytes = self._range, self._token_bytes
        lacks = end > self._first + self._backed.shape[2]
        has_spare = start * token_bytes // area.driver.page_bytes > area.first_page
        if shrink or lacks or has_spare:  # seldom: a page holds many tokens
            try:
                self._arena.back(area, start * token_bytes, end * token_bytes)
            finally:
                self._lay_out()

    def _lay_out(self) -> None:
        """Lay a tensor over the tokens that are backed, and over no others."""
        area, token_bytes = self._range, max(self._token_bytes, 1)
        page_bytes = area.driver.page_bytes
        batch, heads, dim = self.shape
        self._first = _ceil_div(area.first_page * page_bytes, token_bytes)
        end = max(self._first, min(area.end_page * page_bytes // token_bytes, self.max_len))
        if self._num_lanes == 1:
            strides = heads * dim, dim, batch * heads * dim, 1
        else:
            lane = area.lane_bytes // self.dtype.itemsize
            strides = heads * lane, lane, dim, 1
        with torch.inference_mode(False):  # or it could be written to in that mode only
            self._backed = area.driver.tensor(
                area.address + self._first * self._token_bytes,
                (batch, heads, end - self._first, dim),
                strides,
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
