"""The life of slots: open, grow, fork, park, adopt, close. Shared by both kinds of cache.

What differs between contiguous virtual memory and a paged pool is only how a page becomes part
of a slot; the subclasses supply that (`_attach`, `_detach`, `_copy`). Everything a request can
notice is here: reservation before promise, roll-back, parking, prefix reuse and reclaim.
"""

import heapq
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch

from ..vmem import Page
from ..vmem.errors import (
    InvalidConfig,
    InvalidOperation,
    OutOfMappings,
    OutOfPages,
    OutOfSlots,
    RequestTooLong,
    Shortage,
)
from .look_ahead import LookAhead
from .page_pool import PagePool
from .parking import ParkingLot
from .slot import Slot, SlotState
from .stats import KVStats


class PageGeometry(Protocol):
    """What the life of a slot needs to know of a layout; see `KVLayout`."""

    @property
    def max_len(self) -> int: ...
    @property
    def num_ranges(self) -> int: ...
    @property
    def row_tokens(self) -> int: ...
    def pages_per_range(self, num_tokens: int) -> tuple[int, ...]: ...
    def whole_pages_per_range(self, num_tokens: int) -> tuple[int, ...]: ...
    def tokens_backed(self, pages: Sequence[int]) -> int: ...


class SlotCache(ABC):
    """A KV cache of `num_slots` slots over a `PagePool`.

    Args:
        layout: tokens to pages and strides.
        pool: where the pages come from; may be shared with other caches of the same driver.
        num_slots: rows of the cache: requests that can be open or parked at once.
        max_parked: parked slots kept before the next finished one replaces the oldest.
    """

    def __init__(
        self, layout: PageGeometry, pool: PagePool, *, num_slots: int, max_parked: int
    ) -> None:
        if num_slots < 1:
            raise InvalidConfig(f"num_slots is {num_slots}; a cache needs at least one slot")
        if not 0 <= max_parked <= num_slots:
            raise InvalidConfig(f"max_parked is {max_parked}; use 0 to num_slots ({num_slots})")
        self.pool = pool
        self.num_slots = num_slots
        self.max_parked = max_parked
        self._geometry = layout
        self._lock = threading.RLock()
        self._open: dict[int, Slot] = {}
        self._parked = ParkingLot()
        self._free_slots = list(range(num_slots))
        self._timing_depth = 0
        self._mapping_time_s = 0.0
        self._background_time_s = 0.0
        self._look_ahead = LookAhead(self._prepare)
        self._is_shut_down = False

    @property
    def max_len(self) -> int:
        """Tokens that a slot can hold."""
        return self._geometry.max_len

    @property
    def row_tokens(self) -> int:
        """Tokens that one page of every range covers."""
        return self._geometry.row_tokens

    def num_pages(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one slot need."""
        return sum(self._geometry.pages_per_range(num_tokens))

    def num_whole_pages(self, num_tokens: int) -> int:
        """Pages that hold nothing but the first `num_tokens` tokens: what a fork shares."""
        return sum(self._geometry.whole_pages_per_range(num_tokens))

    def num_obtainable(self) -> int:
        """Pages that a new request could get, parked slots given up for it."""
        with self._lock:
            loose = self._num_reclaimable(list(self._open.values()), list(self._parked))
            return self.pool.num_available + loose

    def prefix_length(self, tokens: Sequence[int]) -> int:
        """Tokens that `adopt(tokens)` would find in a parked slot."""
        with self._lock:
            match = self._parked.best_prefix(tokens)
            return match.num_tokens if match else 0

    # -- slots -----------------------------------------------------------------------------

    def open(self) -> Slot:
        """A slot without pages. Raises OutOfSlots if every slot is a live request's."""
        with self._critical():
            if self._is_shut_down:
                raise InvalidOperation("the cache has been shut down; create another")
            if not self._free_slots:
                if not self._parked:
                    raise OutOfSlots(f"all {self.num_slots} slots are in use; close one first")
                self._close_parked(next(iter(self._parked)))
            slot = Slot(heapq.heappop(self._free_slots), self._geometry.num_ranges)
            self._open[slot.index] = slot
            return slot

    def adopt(self, tokens: Sequence[int]) -> tuple[Slot, int]:
        """A slot for a request that begins with `tokens`, and how many it already holds.

        A parked slot with the longest common prefix is taken over whole; if most of its tokens
        would be lost by that, it stays parked and the prefix is aliased. Without a common
        prefix, the largest parked slot is taken over once memory or slots run short, so that a
        steady load maps nothing anew. Otherwise the slot is fresh. Raises OutOfSlots.
        """
        with self._critical():
            match = self._parked.best_prefix(tokens)
            if match is not None:
                if 2 * match.num_tokens < match.num_parked_tokens and self._free_slots:
                    try:
                        return self.fork(match.slot, match.num_tokens), match.num_tokens
                    except Shortage:
                        pass  # then the parked slot itself is the memory that is left
                return self._take_over(match.slot, match.num_tokens)
            if self._parked and self._is_tight(len(tokens)):
                return self._take_over(self._parked.largest(), 0)
            return self.open(), 0

    def reserve(self, slot: Slot, num_tokens: int) -> None:
        """Promise memory for the first `num_tokens` tokens of `slot`, without mapping any.

        Parked slots are reclaimed if need be. Raises OutOfPages, with nothing promised, if that
        is not enough, RequestTooLong if the slot is shorter.
        """
        with self._critical():
            self._check(slot)
            if num_tokens > self.max_len:
                raise RequestTooLong(
                    f"{num_tokens} tokens do not fit into a slot of {self.max_len}; "
                    "raise max_len or shorten the request"
                )
            missing = self._missing(slot, num_tokens) - slot.reservation.num_pages
            if missing > 0:
                self._claim(slot, missing)
            slot.promised_tokens = max(slot.promised_tokens, num_tokens)

    def grow(self, slot: Slot, num_tokens: int) -> None:
        """Back the first `num_tokens` tokens of `slot` (a total, not an increment).

        Raises OutOfPages, OutOfMappings or DriverError with nothing mapped.
        Source: vAttention, arXiv:2405.04437, section 5.
        """
        with self._critical(), ExitStack() as undo:
            undo.callback(self._withdraw, slot, slot.promised_tokens)
            self.reserve(slot, num_tokens)
            if num_tokens > slot.num_tokens:
                self._own_boundary(slot)
                self._extend(slot, self._geometry.pages_per_range(num_tokens))
                slot.num_tokens = num_tokens
            undo.pop_all()

    def look_ahead(self, slot: Slot, num_tokens: int) -> None:
        """Map memory for `num_tokens` tokens of `slot` in the background, if any is to spare."""
        if num_tokens > self.max_len:
            num_tokens = self.max_len
        if any(
            target > len(pages)
            for target, pages in zip(
                self._geometry.pages_per_range(num_tokens), slot.pages, strict=True
            )
        ):
            self._look_ahead.submit(slot, num_tokens)

    def truncate(self, slot: Slot, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of `slot` and give the pages behind them back."""
        with self._critical():
            self._check(slot)
            if not 0 <= num_tokens <= slot.num_tokens:
                raise InvalidOperation(
                    f"cannot truncate {slot} to {num_tokens} tokens; use 0 to {slot.num_tokens}"
                )
            self._shrink(slot, self._geometry.pages_per_range(num_tokens))
            self.pool.cancel(slot.reservation)
            slot.num_tokens = slot.promised_tokens = num_tokens

    def fork(self, slot: Slot, num_tokens: int) -> Slot:
        """A new slot that starts with the first `num_tokens` tokens of `slot`.

        Pages that hold nothing else are shared, the rest of the last row is copied. Raises
        OutOfSlots or a Shortage with nothing changed.
        """
        with self._critical(), ExitStack() as undo:
            self._check(slot, allow_parked=True)
            if not 0 <= num_tokens <= slot.num_tokens:
                raise InvalidOperation(f"cannot fork {num_tokens} tokens of {slot}")
            # `open` may have to reclaim a parked slot: never the one that is being forked.
            if not self._free_slots and slot.state is SlotState.PARKED:
                raise OutOfSlots(f"no free slot to fork {slot} into")
            child = self.open()
            undo.callback(self.close, child)
            child.num_tokens = child.promised_tokens = num_tokens
            shared = self._geometry.whole_pages_per_range(num_tokens)
            try:
                self._alias(slot, child, shared)
            except OutOfMappings:
                shared = tuple(0 for _ in shared)
            self._claim(child, self._missing(child, num_tokens), spare=slot)
            self._extend(child, self._geometry.pages_per_range(num_tokens))
            self._copy(slot, child, shared, num_tokens)
            undo.pop_all()
            return child

    def park(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Let go of `slot` but keep it mapped: its rows hold the KV of `tokens`.

        It may be adopted by a later request, or reclaimed when memory runs short.
        """
        with self._critical():
            self._check(slot)
            if len(tokens) > slot.num_tokens:
                raise InvalidOperation(f"{slot} cannot hold the KV of {len(tokens)} tokens")
            if not self.max_parked or not tokens:
                self.close(slot)
                return
            self.pool.cancel(slot.reservation)
            slot.fence = self.pool.driver.record_fence()
            slot.num_tokens = slot.promised_tokens = len(tokens)
            slot.state = SlotState.PARKED
            del self._open[slot.index]
            self._parked.add(slot, tokens)
            while len(self._parked) > self.max_parked:
                self._close_parked(next(iter(self._parked)))

    def close(self, slot: Slot) -> None:
        """Unmap `slot` and give its pages back."""
        with self._critical():
            self._check(slot)
            self._shrink(slot, [0] * len(slot.pages))
            self.pool.cancel(slot.reservation)
            slot.state = SlotState.CLOSED
            del self._open[slot.index]
            heapq.heappush(self._free_slots, slot.index)

    # -- elasticity ------------------------------------------------------------------------

    def trim(self) -> int:
        """Give everything that no live request needs back to the system; returns the bytes."""
        self._look_ahead.drain()
        with self._critical():
            for slot in self._parked:
                self._close_parked(slot)
            for slot in self._open.values():
                self._shrink(slot, self._promised_pages(slot))
            return self.pool.trim() * self.pool.driver.page_bytes

    def shutdown(self) -> None:
        """Close every slot and give back memory and address space. Harmless when repeated.

        Tensors of the cache must not be used afterwards.
        """
        self._look_ahead.stop()
        with self._critical():
            if self._is_shut_down:
                return
            for slot in list(self._open.values()):
                self.close(slot)
            for slot in self._parked:
                self._close_parked(slot)
            self.pool.trim()
            self._free_address_space()
            self._is_shut_down = True

    def __enter__(self) -> "SlotCache":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    # -- what kernels and models see ---------------------------------------------------------

    @abstractmethod
    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer over the whole cache, [rows, tokens, kv_heads, head_dim].

        Contiguous: a row is a slot. Paged: a row is a block.
        """

    @abstractmethod
    def locate(
        self, slots: Sequence[Slot], starts: Sequence[int], counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where tokens `start … start + count` of each slot lie: (row, position), int64.

        Flat over all slots, in order; indices into the first two dimensions of `layer`.
        """

    @abstractmethod
    def block_tables(self, slots: Sequence[Slot]) -> torch.Tensor | None:
        """int32 [num_slots, max_blocks] of a paged cache, None of a contiguous one."""

    @property
    @abstractmethod
    def virtual_bytes(self) -> int:
        """Address space that the cache reserves."""

    # -- what a kind of cache supplies -------------------------------------------------------

    @abstractmethod
    def _attach(self, slot: Slot, range_index: int, pages: Sequence[Page]) -> None:
        """Make `pages` follow those that back the range already. All or nothing."""

    @abstractmethod
    def _detach(self, slot: Slot, range_index: int, keep: int) -> None:
        """Take all but the first `keep` pages of the range away from it."""

    @abstractmethod
    def _zero(self, slot: Slot, range_index: int, start: int, stop: int | None) -> None:
        """Clear bytes `start … stop` of a range; to the end of its pages if `stop` is None."""

    @abstractmethod
    def _copy(self, source: Slot, target: Slot, skip: Sequence[int], num_tokens: int) -> None:
        """Copy what the first `num_tokens` tokens have behind the first `skip[r]` pages."""

    @abstractmethod
    def _replace(self, slot: Slot, range_index: int, page_index: int, used_bytes: int) -> None:
        """Swap a shared page for a copy of its first `used_bytes`, taken from the reservation."""

    @abstractmethod
    def _free_address_space(self) -> None: ...

    # -- growing and shrinking ---------------------------------------------------------------

    def _extend(self, slot: Slot, targets: Sequence[int]) -> None:
        """Attach pages from the reservation until each range has `targets[r]` of them."""
        missing = [max(0, t - len(p)) for t, p in zip(targets, slot.pages, strict=True)]
        if not any(missing):
            return
        pages = self.pool.commit(slot.reservation, sum(missing))
        with ExitStack() as undo:
            undo.callback(self.pool.restore, slot.reservation, pages)
            remaining = iter(pages)
            for index, count in enumerate(missing):
                if not count:
                    continue
                run = [next(remaining) for _ in range(count)]
                before = len(slot.pages[index])
                self._attach(slot, index, run)
                undo.callback(self._forget, slot, index, before)
                slot.pages[index].extend(run)
                if self.pool.needs_zero(run):
                    self._zero(slot, index, before * self.pool.driver.page_bytes, None)
            undo.pop_all()

    def _forget(self, slot: Slot, range_index: int, keep: int) -> None:
        """Undo an attach; the pages themselves are somebody else's to release."""
        self._detach(slot, range_index, keep)
        del slot.pages[range_index][keep:]

    def _shrink(self, slot: Slot, keep: Sequence[int]) -> int:
        """Detach all but the first `keep[r]` pages of each range; returns pages detached."""
        if all(len(pages) <= count for pages, count in zip(slot.pages, keep, strict=True)):
            return 0
        # Work that was launched may still read the rows; a parked slot knows its last.
        (slot.fence or self.pool.driver.record_fence()).wait()
        detached = 0
        for index, count in enumerate(keep):
            leaving = slot.pages[index][count:]
            if leaving:
                self._forget(slot, index, count)
                self.pool.release(leaving)
                detached += len(leaving)
        return detached

    def _alias(self, source: Slot, target: Slot, counts: Sequence[int]) -> None:
        """Map the first `counts[r]` pages of `source` at the start of `target` too."""
        with ExitStack() as undo:
            for index, count in enumerate(counts):
                pages = source.pages[index][:count]
                if not pages:
                    continue
                self.pool.retain(pages)
                undo.callback(self.pool.release, pages)
                self._attach(target, index, pages)
                undo.callback(self._forget, target, index, 0)
                target.pages[index].extend(pages)
            undo.pop_all()

    def _own_boundary(self, slot: Slot) -> None:
        """Copy shared pages that the next token of `slot` would be written to.

        Only the page that holds the last token can be both shared and written: a fork shares
        whole pages, and truncating gives back what lies behind.
        """
        for index, page_index in enumerate(self._geometry.whole_pages_per_range(slot.num_tokens)):
            if self._is_shared(slot, index, page_index):
                self._replace(slot, index, page_index, self._used_bytes(slot, index, page_index))

    def _is_shared(self, slot: Slot, range_index: int, page_index: int) -> bool:
        pages = slot.pages[range_index]
        return page_index < len(pages) and self.pool.references(pages[page_index]) > 1

    @abstractmethod
    def _used_bytes(self, slot: Slot, range_index: int, page_index: int) -> int:
        """Bytes at the start of a page that hold the slot's tokens."""

    def _missing(self, slot: Slot, num_tokens: int) -> int:
        """Pages that growing to `num_tokens` would take from the pool."""
        targets = self._geometry.pages_per_range(num_tokens)
        missing = sum(max(0, t - len(p)) for t, p in zip(targets, slot.pages, strict=True))
        if num_tokens > slot.num_tokens:
            boundary = self._geometry.whole_pages_per_range(slot.num_tokens)
            missing += sum(self._is_shared(slot, r, page) for r, page in enumerate(boundary))
        return missing

    def _withdraw(self, slot: Slot, promised_tokens: int) -> None:
        """Promise `promised_tokens` again, and give the pool what was reserved beyond that."""
        slot.promised_tokens = promised_tokens
        needed = self._missing(slot, max(slot.num_tokens, promised_tokens))
        excess = slot.reservation.num_pages - needed
        if excess > 0:
            self.pool.cancel(slot.reservation, excess)

    def _promised_pages(self, slot: Slot) -> tuple[int, ...]:
        return self._geometry.pages_per_range(max(slot.num_tokens, slot.promised_tokens))

    # -- parking and reclaim -------------------------------------------------------------------

    def _is_tight(self, num_tokens: int) -> bool:
        """True if a fresh slot for `num_tokens` tokens would have to reclaim a parked one."""
        needed = sum(self._geometry.pages_per_range(min(num_tokens, self.max_len)))
        return (
            not self._free_slots
            or len(self._parked) >= self.max_parked
            or self.pool.num_available < needed
        )

    def _take_over(self, slot: Slot, num_tokens: int) -> tuple[Slot, int]:
        """Open a parked slot again, of which `num_tokens` tokens are of use."""
        keep = []
        for index, whole in enumerate(self._geometry.whole_pages_per_range(num_tokens)):
            count = len(slot.pages[index])
            shared = (i for i in range(whole, count) if self._is_shared(slot, index, i))
            keep.append(next(shared, count))  # nobody else's pages may be written
        self._shrink(slot, keep)
        num_tokens = min(num_tokens, self._geometry.tokens_backed(keep))
        self._parked.remove(slot)
        slot.state = SlotState.OPEN
        slot.fence = None
        slot.num_tokens = slot.promised_tokens = num_tokens
        self._open[slot.index] = slot
        if self.pool.sanitize == "zero":
            for index, whole in enumerate(self._geometry.whole_pages_per_range(num_tokens)):
                used = whole * self.pool.driver.page_bytes
                used += self._used_bytes(slot, index, whole)
                self._zero(slot, index, used, None)
        return slot, num_tokens

    def _close_parked(self, slot: Slot) -> None:
        self._shrink(slot, [0] * len(slot.pages))
        self._parked.remove(slot)
        slot.state = SlotState.CLOSED
        heapq.heappush(self._free_slots, slot.index)

    def _claim(self, slot: Slot, num_pages: int, spare: Slot | None = None) -> None:
        """Add `num_pages` to the slot's reservation, reclaiming parked memory if need be."""
        if num_pages > self.pool.num_available:
            self._reclaim(num_pages - self.pool.num_available, keep={slot, spare})
        self.pool.reserve(num_pages, into=slot.reservation)

    def _reclaim(self, num_pages: int, keep: set[Slot | None]) -> None:
        """Free `num_pages` pages, or none if there are not that many to be had.

        First pages mapped ahead behind live requests, which cost nothing but the mapping; then
        parked slots, oldest first, from their ends, so that what is left stays a prefix.
        """
        victims = [s for s in self._open.values() if s not in keep]
        parked = [s for s in self._parked if s not in keep]
        if self._num_reclaimable(victims, parked) < num_pages:
            return
        goal = self.pool.num_available + num_pages
        for slot in victims:
            if self.pool.num_available < goal:
                self._shrink(slot, self._promised_pages(slot))
        for slot in parked:
            while slot.num_pages and self.pool.num_available < goal:
                self._shorten_parked(slot, goal - self.pool.num_available)
            if not slot.num_pages:
                self._close_parked(slot)

    def _shorten_parked(self, slot: Slot, num_pages: int) -> None:
        """Give back at least one row, about `num_pages` pages, from the end of a parked slot."""
        rows = -(-num_pages // len(slot.pages))
        keep = [max(0, len(pages) - rows) for pages in slot.pages]
        self._shrink(slot, keep)
        slot.num_tokens = min(slot.num_tokens, self._geometry.tokens_backed(keep))
        slot.promised_tokens = slot.num_tokens
        self._parked.shorten(slot, slot.num_tokens)
        if not slot.num_tokens:
            self._shrink(slot, [0] * len(slot.pages))

    def _num_reclaimable(self, live: Sequence[Slot], parked: Sequence[Slot]) -> int:
        """Pages whose every reference is behind a live request or in a parked slot."""
        loose: Counter[Page] = Counter()
        for slot in live:
            for pages, count in zip(slot.pages, self._promised_pages(slot), strict=True):
                loose.update(pages[count:])
        for slot in parked:
            for pages in slot.pages:
                loose.update(pages)
        return sum(self.pool.references(page) == times for page, times in loose.items())

    # -- look-ahead ------------------------------------------------------------------------

    def _prepare(self, slot: Slot, num_tokens: int) -> None:
        """The background job: map ahead from memory to spare, then keep fresh pages ready."""
        start = time.perf_counter()
        with self._lock:
            if slot.state is SlotState.OPEN:
                extra = self._missing(slot, num_tokens) - slot.reservation.num_pages
                try:
                    if extra > 0:
                        self.pool.reserve(extra, into=slot.reservation)
                    self._extend(slot, self._geometry.pages_per_range(num_tokens))
                except (OutOfPages, OutOfMappings):
                    # None to spare: the request itself will reclaim or wait.
                    self._withdraw(slot, slot.promised_tokens)
        try:
            self.pool.refill()
        except OutOfPages:
            pass  # the device is full; whoever needs a page now will be told
        self._background_time_s += time.perf_counter() - start

    # -- accounts --------------------------------------------------------------------------

    @contextmanager
    def _critical(self) -> Iterator[None]:
        """Hold the lock, and count the time that the caller waits for memory."""
        start = time.perf_counter()
        with self._lock:
            self._timing_depth += 1
            try:
                yield
            finally:
                self._timing_depth -= 1
                if not self._timing_depth:
                    self._mapping_time_s += time.perf_counter() - start

    def _check(self, slot: Slot, *, allow_parked: bool = False) -> None:
        known = self._open.get(slot.index) is slot
        if not known and not (allow_parked and slot.state is SlotState.PARKED):
            raise InvalidOperation(f"{slot} is not open in this cache")

    def stats(self) -> KVStats:
        """A snapshot of what the cache holds."""
        with self._lock:
            held: set[Page] = set()
            ahead: set[Page] = set()
            for slot in self._open.values():
                targets = self._geometry.pages_per_range(slot.num_tokens)
                for pages, count in zip(slot.pages, targets, strict=True):
                    held.update(pages[:count])
                    ahead.update(pages[count:])
            parked = {page for slot in self._parked for pages in slot.pages for page in pages}
            driver = self.pool.driver
            return KVStats(
                virtual_bytes=self.virtual_bytes,
                physical_bytes=self.pool.num_created * driver.page_bytes,
                page_bytes=driver.page_bytes,
                row_tokens=self._geometry.row_tokens,
                pages_held=len(held),
                pages_ahead=len(ahead - held),
                pages_parked=len(parked - held - ahead),
                pages_free=self.pool.num_free,
                pages_reserved=self.pool.num_reserved,
                pages_limit=self.pool.limit_pages,
                tokens_held=sum(slot.num_tokens for slot in self._open.values()),
                tokens_parked=sum(slot.num_tokens for slot in self._parked),
                slots_open=len(self._open),
                slots_parked=len(self._parked),
                num_mappings=driver.num_mappings,
                mapping_time_s=self._mapping_time_s,
                background_time_s=self._background_time_s,
                driver_calls=dict(driver.counters),
            )

    def check_invariants(self) -> None:
        """Recount everything from scratch; AssertionError names what does not add up."""
        with self._lock:
            self.pool.check_invariants()
            slots = [*self._open.values(), *self._parked]
            indices = [slot.index for slot in slots] + self._free_slots
            assert sorted(indices) == list(range(self.num_slots)), "a slot is lost or doubled"
            references: Counter[Page] = Counter()
            reserved = 0
            for slot in slots:
                expected = SlotState.OPEN if slot.index in self._open else SlotState.PARKED
                assert slot.state is expected, f"{slot} is filed as {expected}"
                reserved += slot.reservation.num_pages
                needed = self._geometry.pages_per_range(slot.num_tokens)
                for pages, count in zip(slot.pages, needed, strict=True):
                    assert len(pages) >= count, f"{slot} lacks pages for its tokens"
                    references.update(pages)
                if slot.state is SlotState.OPEN:
                    missing = self._missing(slot, slot.promised_tokens)
                    assert missing <= slot.reservation.num_pages, f"{slot} was promised more"
            for page, count in references.items():
                assert count <= self.pool.references(page), f"page {page} is under-counted"
            assert reserved <= self.pool.num_reserved, "a reservation is not in the pool's count"
            self._check_backing(slots)

    @abstractmethod
    def _check_backing(self, slots: Sequence[Slot]) -> None:
        """Compare the slots' pages with what the memory really shows."""
