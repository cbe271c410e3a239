"""The life of slots: open, grow, fork, park, adopt, close. Shared by both kinds of cache.

Everything a request can notice is here: reservation before promise, parking, prefix reuse. How
pages get behind a slot is `Backing`'s, in what order they are taken back is in `reclaim`.
"""

import heapq
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from ..vmem import Fence, OwnedLock, ProcessOwner, janitor
from ..vmem.errors import (
    DriverError,
    ForkedProcess,
    InvalidConfig,
    InvalidOperation,
    OutOfMappings,
    OutOfPages,
    OutOfSlots,
    RequestTooLong,
    Shortage,
)
from . import accounts
from .backing import Backing
from .kernel_view import KernelView
from .ledger import Use
from .look_ahead import LookAhead
from .parking import ParkingLot
from .reclaim import reclaim, reclaim_parked
from .slot import Slot, SlotState
from .stats import KVStats


class SlotCache(KernelView):
    """A KV cache of `num_slots` slots.

    An operation that raises has changed nothing for any live request; parked slots that it has
    reclaimed on the way stay reclaimed. All methods may be called from several threads, one
    slot's from one at a time. A forked child is refused each of them (ForkedProcess): it would
    write into its parent's pages.

    The cache gives everything back at `shutdown`, or soon after it is dropped (`vmem.janitor`).
    Its tensors must not be used after that.

    Args:
        backing: the pages behind the slots, from a pool that may be shared with other caches.
        num_slots: rows of the cache: requests that can be open or parked at once.
        max_parked: parked slots kept before the next finished one replaces the oldest; half of
            the slots by default.
    """

    def __init__(self, backing: Backing, *, num_slots: int, max_parked: int | None) -> None:
        if num_slots < 1:
            raise InvalidConfig(f"num_slots is {num_slots}; a cache needs at least one slot")
        max_parked = num_slots // 2 if max_parked is None else max_parked
        if not 0 <= max_parked <= num_slots:
            raise InvalidConfig(f"max_parked is {max_parked}; use 0 to num_slots ({num_slots})")
        super().__init__(backing.geometry)
        backing.allocate(num_slots)
        self.pool = backing.pool
        self.num_slots = num_slots
        self.max_parked = max_parked
        self._backing = backing
        self._ledger = backing.ledger
        self._no_pages = (0,) * backing.geometry.num_ranges
        shared = self._shared_limit = backing.pool.shared_limit
        self._owner = ProcessOwner("this cache")
        self._lock = OwnedLock(self._owner, None if shared is None else shared.lock)
        self._open: dict[int, Slot] = {}
        self._parked = ParkingLot()
        self._free_slots = list(range(num_slots))
        self._timing_depth = 0
        self._mapping_time_s = 0.0
        self._background_time_s = 0.0
        self._look_ahead = LookAhead(self._prepare)
        janitor.start()
        note = partial(_abandon, self._lock, backing, self._open, self._parked)
        self._finalizer = weakref.finalize(self, janitor.later, note)
        self._finalizer.atexit = False  # the system takes all of it back by itself
        if shared is not None:
            shared.join(self)

    # -- slots -----------------------------------------------------------------------------

    def open(self) -> Slot:
        """A slot without pages. Raises OutOfSlots if every slot is a live request's."""
        with self._critical():
            if self._is_shut_down:
                raise InvalidOperation("the cache has been shut down; create another")
            if not self._free_slots:
                if not self._parked:
                    raise OutOfSlots(f"all {self.num_slots} slots are in use; close one first")
                self._close_parked(self._parked.oldest())
            slot = Slot(heapq.heappop(self._free_slots), self._geometry.num_ranges)
            self._open[slot.index] = slot
            return slot

    def adopt(self, tokens: Sequence[int], variant: str = "") -> tuple[Slot, int]:
        """A slot for a request that begins with `tokens`, and how many it already holds.

        Only the KV of the same `variant` is found: what was parked under another was computed
        otherwise, or for somebody else.

        A parked slot with the longest common prefix is taken over whole; if most of its tokens
        would be lost by that, it stays parked and the prefix is aliased. Without a common
        prefix, the largest parked slot is taken over once memory or slots run short, so that a
        steady load maps nothing anew. Otherwise the slot is fresh. Raises OutOfSlots.
        """
        with self._critical():
            match = self._parked.best_prefix(tokens, variant)
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
            with self._promising(slot, num_tokens):
                self._claim(slot, num_tokens)

    def grow(self, slot: Slot, num_tokens: int) -> None:
        """Back the first `num_tokens` tokens of `slot` (a total, not an increment).

        Raises OutOfPages, OutOfMappings or DriverError with nothing mapped, RequestTooLong if
        the slot is shorter.
        Source: vAttention, arXiv:2405.04437, section 5.
        """
        with self._critical():
            self._check(slot)
            if num_tokens <= slot.ready_tokens:  # as nearly always: pages are larger than tokens
                slot.num_tokens = max(slot.num_tokens, num_tokens)
                slot.promised_tokens = max(slot.promised_tokens, num_tokens)
                if num_tokens > slot.settled_tokens:  # the next page is needed now
                    self._ledger.settle(slot)
                return
            with self._promising(slot, num_tokens):
                self.reserve(slot, num_tokens)
                if num_tokens > slot.num_tokens:
                    self._back(slot, num_tokens)
            self._backing.withdraw(slot, self._backing.lacking(slot, slot.promised_tokens))

    def look_ahead(self, slot: Slot, num_tokens: int) -> None:
        """Map memory for `num_tokens` tokens of `slot` in the background, if any is to spare.

        Raises what an earlier job in the background met (DriverError).
        """
        self._owner.check()
        self._check(slot)
        num_tokens = min(num_tokens, self.max_len)
        slot.ahead_tokens = num_tokens
        if num_tokens > slot.ready_tokens:
            self._look_ahead.submit(slot, num_tokens)

    def truncate(self, slot: Slot, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of `slot` and give the pages behind them back.

        If the driver refuses to unmap (DriverError), the tokens are gone all the same, and the
        pages go with the next `truncate` or `close`.
        """
        with self._critical():
            self._check(slot)
            if not 0 <= num_tokens <= slot.num_tokens:
                raise InvalidOperation(
                    f"cannot truncate {slot} to {num_tokens} tokens; use 0 to {slot.num_tokens}"
                )
            self.pool.cancel(slot.reservation)
            slot.promised_tokens = num_tokens
            self._backing.shrink(slot, num_tokens, self._geometry.pages_per_range(num_tokens))

    def fork(self, slot: Slot, num_tokens: int) -> Slot:
        """A new slot that starts with the first `num_tokens` tokens of `slot`.

        Pages that hold nothing else are shared, the rest of the last row is copied. Raises
        OutOfSlots, another Shortage or DriverError with nothing changed.
        """
        with self._critical(), ExitStack() as undo:
            self._check(slot, allow_parked=True)
            if not 0 <= num_tokens <= slot.num_tokens:
                raise InvalidOperation(f"cannot fork {num_tokens} tokens of {slot}")
            # `open` may have to reclaim a parked slot: never the one that is being forked.
            if not self._free_slots and slot.state is SlotState.PARKED:
                raise OutOfSlots(f"no free slot to fork {slot} into")
            child = self.open()
            undo.callback(self._discard, child)
            child.num_tokens = child.promised_tokens = num_tokens
            self._ledger.settle(child)
            shared = self._backing.alias(slot, child, num_tokens)
            self._claim(child, num_tokens, spare=slot)
            self._backing.extend(child, num_tokens)
            self._backing.copy(slot, child, shared)
            if slot.state is SlotState.PARKED:
                self._set_fence(slot, self.pool.driver.record_fence())  # the copy reads it
            undo.pop_all()
            return child

    def park(self, slot: Slot, tokens: Sequence[int], variant: str = "") -> None:
        """Let go of `slot` but keep it mapped: it holds the KV of `tokens`.

        `variant` names what else that KV depends on, or who may read it: an adapter, a tenant's
        salt. A later request of that variant may adopt it; it is reclaimed when memory runs short.
        """
        with self._critical():
            self._check(slot)
            if len(tokens) > slot.num_tokens:
                raise InvalidOperation(f"{slot} cannot hold the KV of {len(tokens)} tokens")
            if not self.max_parked or not len(tokens):
                self.close(slot)
                return
            while len(self._parked) >= self.max_parked:
                self._close_parked(self._parked.oldest())
            self._set_fence(slot, self.pool.driver.record_fence())
            self.pool.cancel(slot.reservation)
            slot.num_tokens = slot.promised_tokens = len(tokens)
            self._set_parked(slot, tokens, variant)

    def close(self, slot: Slot) -> None:
        """Unmap `slot` and give its pages back.

        If the driver refuses to unmap (DriverError), the slot stays open, without tokens, and may
        be closed again.
        """
        with self._critical():
            self._check(slot)
            self.pool.cancel(slot.reservation)
            slot.promised_tokens = 0
            self._backing.shrink(slot, 0, self._no_pages)
            del self._open[slot.index]
            self._retire(slot)

    # -- elasticity ------------------------------------------------------------------------

    def num_obtainable(self) -> int:
        """Pages that a new request could get, parked slots given up for it."""
        with self._lock:
            loose = self._ledger.num_reclaimable() + self._num_elsewhere()
            return self.pool.num_available + loose

    def reclaimable_bytes(self) -> int:
        """What `give_up` could free for another cache under the same `MemoryLimit`."""
        with self._lock:
            num_pages = self._ledger.count(Use.PARKED) + self.pool.num_spare
            return num_pages * self.pool.driver.page_bytes

    def give_up(self, num_bytes: int) -> None:
        """Return about `num_bytes` of parked slots and spare pages, or all of them, to the system.

        What is mapped ahead of live requests stays: only this cache's own thread knows whether
        work that touches it is about to be launched.
        """
        with self._lock:
            wanted = -(-num_bytes // self.pool.driver.page_bytes)
            short = wanted - self.pool.num_spare
            if short > 0:
                reclaim_parked(self._backing, self._parked, short)
                self._close_emptied()
            spare = self.pool.num_spare
            self.pool.trim(self.pool.num_free - min(wanted, spare, self.pool.num_free))

    def prefix_length(self, tokens: Sequence[int], variant: str = "") -> int:
        """Tokens that `adopt(tokens, variant)` would find parked, if nobody shares that slot."""
        with self._lock:
            match = self._parked.best_prefix(tokens, variant)
            return match.num_tokens if match else 0

    def trim(self) -> int:
        """Give everything that no live request needs back to the system; returns the bytes."""
        self._owner.check()
        self._look_ahead.drain()
        with self._critical():
            self._reclaim_all()
            return self.pool.trim() * self.pool.driver.page_bytes

    def shutdown(self) -> None:
        """Close every slot and give back memory and address space. Harmless when repeated.

        Tensors of the cache must not be used afterwards.
        """
        self._owner.check()
        self._look_ahead.stop()
        with self._critical():
            if self._is_shut_down:
                return
            for slot in list(self._open.values()):
                self.close(slot)
            self._reclaim_all()
            self.pool.trim()
            self._backing.free()
            self._finalizer.detach()

    @property
    def _is_shut_down(self) -> bool:
        return not self._finalizer.alive

    def __enter__(self) -> "SlotCache":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    # -- promises --------------------------------------------------------------------------

    @contextmanager
    def _promising(self, slot: Slot, num_tokens: int) -> Iterator[None]:
        """Promise `num_tokens` tokens; if what follows fails, all is as it was."""
        tokens, pages = slot.promised_tokens, slot.reservation.num_pages
        slot.promised_tokens = max(tokens, num_tokens)
        self._ledger.settle(slot)
        try:
            yield
        except BaseException:
            slot.promised_tokens = tokens
            self._ledger.settle(slot)
            self._backing.withdraw(slot, pages)
            raise

    def _claim(self, slot: Slot, num_tokens: int, spare: Slot | None = None) -> None:
        """Reserve what `slot` lacks for `num_tokens` tokens, reclaiming memory if need be."""
        lacking = self._backing.lacking(slot, num_tokens) - slot.reservation.num_pages
        if lacking > 0:
            short = lacking - self.pool.num_available
            if short > 0 and not self._reclaim(short, spare):
                self._reclaim_with_others(lacking, spare)
            self.pool.reserve(lacking, into=slot.reservation)

    def _back(self, slot: Slot, num_tokens: int) -> None:
        """Map what was claimed. Where the device itself is short, take spare memory back first."""
        try:
            self._backing.grow(slot, num_tokens)
        except OutOfPages:  # below the pool's limit; how far below, nobody can tell
            short = self._backing.lacking(slot, num_tokens) - self.pool.num_free
            if not self._reclaim(min(short, self._ledger.num_reclaimable())):
                raise
            self._backing.grow(slot, num_tokens)
        except OutOfMappings:
            self._reclaim_all()
            self._backing.grow(slot, num_tokens)

    def _num_elsewhere(self) -> int:
        """Pages that other caches under the same limit could give up."""
        if self._shared_limit is None:
            return 0
        return self._shared_limit.reclaimable_bytes(self) // self.pool.driver.page_bytes

    def _reclaim_with_others(self, num_pages: int, spare: Slot | None) -> None:
        """Make `num_pages` pages available with the help of other caches, if that is enough."""
        limit = self._shared_limit
        if limit is None:
            return
        own = self._ledger.num_reclaimable(spare)
        missing = num_pages - own - self.pool.num_available
        if missing > self._num_elsewhere():
            return
        limit.make_room(self, limit.room_bytes + missing * self.pool.driver.page_bytes)
        if own:
            self._reclaim(num_pages - self.pool.num_available, spare)

    def _reclaim(self, num_pages: int, spare: Slot | None = None) -> bool:
        done = reclaim(self._backing, self._open.values(), self._parked, num_pages, spare)
        self._close_emptied()
        return done

    def _close_emptied(self) -> None:
        """Close the parked slots of which nothing is left."""
        for slot in self._parked:
            if not slot.num_pages:
                self._close_parked(slot)

    def _reclaim_all(self) -> None:
        """Take back all that no live request was promised."""
        for slot in self._parked:
            self._close_parked(slot)
        for slot in self._open.values():
            self._backing.shrink(slot, slot.num_tokens, self._backing.promised_pages(slot))

    # -- parking ---------------------------------------------------------------------------

    def _is_tight(self, num_tokens: int) -> bool:
        """True if a fresh slot for `num_tokens` tokens would have to reclaim a parked one."""
        return (
            not self._free_slots
            or len(self._parked) >= self.max_parked
            or self.pool.num_available < self.num_pages(min(num_tokens, self.max_len))
        )

    def _take_over(self, parked: Slot, num_tokens: int) -> tuple[Slot, int]:
        """Open a parked slot again, of which `num_tokens` tokens are of use; fewer may be left."""
        num_tokens, keep = self._backing.usable(parked, num_tokens)
        self._parked.shorten(parked, num_tokens)
        self._backing.shrink(parked, num_tokens, keep)
        self._set_fence(parked, None)
        self._backing.clear_unused(parked)
        self._parked.remove(parked)
        slot = parked.hand_over()
        self._ledger.settle(slot)
        self._open[slot.index] = slot
        return slot, num_tokens

    def _discard(self, child: Slot) -> None:
        """Close a slot that nobody has a handle of. What the driver keeps mapped goes later."""
        try:
            self.close(child)
        except (DriverError, Shortage):
            self._set_parked(child, (), "")
            raise

    def _set_parked(self, slot: Slot, tokens: Sequence[int], variant: str) -> None:
        slot.state = SlotState.PARKED
        self._ledger.settle(slot)
        del self._open[slot.index]
        self._parked.add(slot, tokens, variant)

    def _close_parked(self, slot: Slot) -> None:
        self._parked.shorten(slot, 0)
        self._backing.shrink(slot, 0, self._no_pages)
        self._parked.remove(slot)
        self._retire(slot)

    def _retire(self, slot: Slot) -> None:
        slot.state = SlotState.CLOSED
        heapq.heappush(self._free_slots, slot.index)

    def _set_fence(self, slot: Slot, fence: Fence | None) -> None:
        """Note the last work that may touch a parked slot."""
        earlier, slot.fence = slot.fence, fence
        if earlier is not None:
            earlier.wait()  # over by now, as a rule; what is never waited for is never freed

    # -- look-ahead ------------------------------------------------------------------------

    def _prepare(self, slot: Slot, num_tokens: int) -> None:
        """The background job: map ahead from memory to spare, and keep fresh pages ready.

        New pages are made first, with nothing locked: it is what takes long.
        """
        start = time.perf_counter()
        with self._lock:
            is_open = slot.state is SlotState.OPEN
            lacking = self._backing.lacking(slot, num_tokens) if is_open else 0
        with suppress(OutOfPages):  # the device is full; whoever needs a page will be told
            self.pool.refill(lacking)
        with self._lock, suppress(Shortage):  # none to spare: the request will reclaim or wait
            if slot.state is SlotState.OPEN:
                self._ledger.settle(slot)
                self._backing.map_ahead(slot, num_tokens)
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
        if self._open.get(slot.index) is not slot and not (allow_parked and slot in self._parked):
            raise InvalidOperation(f"{slot} is not open in this cache")

    def stats(self) -> KVStats:
        """A snapshot of what the cache holds."""
        with self._lock:
            return accounts.snapshot(
                self._backing,
                list(self._open.values()),
                list(self._parked),
                virtual_bytes=self.virtual_bytes,
                mapping_time_s=self._mapping_time_s,
                background_time_s=self._background_time_s,
            )

    def check_invariants(self) -> None:
        """Recount everything from scratch; AssertionError names what does not add up."""
        with self._lock:
            accounts.recount(self._backing, self._open, self._parked)
            indices = [*self._open, *(slot.index for slot in self._parked), *self._free_slots]
            assert sorted(indices) == list(range(self.num_slots)), "a slot is lost or doubled"


def _abandon(
    lock: OwnedLock,
    backing: Backing,
    live: Mapping[int, Slot],
    parked: ParkingLot,
) -> None:
    """Give back what a cache held that was dropped without `shutdown`. The janitor's job."""
    # A driver that was closed, or that belongs to the parent process, has nothing left to give.
    with suppress(InvalidOperation, ForkedProcess), lock:
        for slot in [*live.values(), *parked]:
            backing.pool.cancel(slot.reservation)
            backing.shrink(slot, 0, [0] * len(slot.pages))
        backing.pool.trim()
        backing.free()
