"""The life of slots: open, grow, fork, park, adopt, close. Shared by both kinds of cache.

Everything a request can notice is here. Which slots there are is `SlotTable`'s, promises and
reclaim are `Supply`'s, and how pages get behind a slot is `Backing`'s.
"""

import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import torch

from ..vmem import OwnedLock, ProcessOwner, janitor
from ..vmem.errors import (
    InvalidConfig,
    InvalidOperation,
    OutOfPages,
    OutOfSlots,
    RequestTooLong,
    Shortage,
)
from . import accounts, page_map
from .backing import Backing
from .kernel_view import KernelView
from .loans import Loans
from .look_ahead import LookAhead
from .page_map import PageMap
from .page_pool import Owner
from .parking import PrefixMatch
from .slot import Slot, SlotState
from .slot_table import SlotTable
from .stats import KVStats
from .supply import Supply
from .timed_lock import TimedLock


class SlotCache(KernelView):
    """A KV cache of `num_slots` slots.

    An operation that raises has changed nothing for any live request; parked slots that it has
    reclaimed on the way stay reclaimed. All methods may be called from several threads, one
    slot's from one at a time. They are many, as one lock holds for all of them. A forked child is
    refused each of them (ForkedProcess): it would write into its parent's pages.

    The cache gives everything back at `shutdown`, or soon after it is dropped (`vmem.janitor`).
    Its tensors must not be used after that.

    Args:
        backing: the pages behind the slots, from a pool that may be shared with other caches.
        num_slots: requests that can be open or parked at once.
        max_parked: parked slots kept before the next finished one replaces the oldest; half of
            the slots by default.

    Attributes:
        loans: lets pages change hands with the cache of another process.
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
        shared = backing.pool.shared_limit
        self._owner = ProcessOwner("this cache")
        self._lock = OwnedLock(self._owner, None if shared is None else shared.lock)
        self._working = TimedLock(self._lock)
        self._table = SlotTable(backing, num_slots, max_parked)
        self._supply = Supply(backing, self._table, self._lock)
        self.loans = Loans(backing, self._table, self._working)
        self._background_time_s = 0.0
        self._look_ahead = LookAhead(self._prepare)
        janitor.start()
        self._finalizer = weakref.finalize(self, _abandon, self._supply)
        self._finalizer.atexit = False  # the system takes all of it back by itself

    # -- slots -----------------------------------------------------------------------------

    def open(self, owner: Owner = "") -> Slot:
        """A slot without pages, to show nothing that others than `owner` left, if the pool clears
        memory between tenants. Raises OutOfSlots if every slot is a live request's."""
        with self._working:
            if not self._finalizer.alive:
                raise InvalidOperation("the cache has been shut down; create another")
            return self._table.open(owner)

    def adopt(
        self, tokens: Sequence[int], variant: str = "", *, owner: Owner = None, recycle: bool = True
    ) -> tuple[Slot, int]:
        """A slot for a request that begins with `tokens`, and how many it already holds.

        Only the KV of the same `variant` is found: what was parked under another was computed
        otherwise, or for somebody else. `owner` is as of `open`; the variant, where it is None.

        A parked slot with the longest common prefix is taken over whole; if most of its tokens
        would be lost by that, it stays parked and the prefix is aliased. Without a common
        prefix, the largest parked slot is taken over once memory or slots run short, so that a
        steady load maps nothing anew; not so without `recycle`, where the oldest is to go first.
        Otherwise the slot is fresh. A pinned slot is never taken over. Raises OutOfSlots.
        """
        with self._working:
            table = self._table
            owner = variant if owner is None else owner
            match = table.parked.best_prefix(tokens, variant)
            if match is not None:
                is_pinned = match.slot.num_pins > 0
                if (is_pinned or 2 * match.num_tokens < match.num_parked_tokens) and table.free:
                    try:
                        return self.fork(match.slot, match.num_tokens, owner), match.num_tokens
                    except Shortage:
                        pass  # then the parked slot itself is the memory that is left
                if not is_pinned:
                    return table.take_over(match.slot, match.num_tokens, owner, len(tokens))
            elif recycle and self._is_tight(len(tokens)):
                largest = table.parked.largest()
                if largest is not None:
                    return table.take_over(largest, 0, owner, len(tokens))
            return self.open(owner), 0

    def reserve(self, slot: Slot, num_tokens: int) -> None:
        """Promise memory for the first `num_tokens` tokens of `slot`, without mapping any.

        Parked slots are reclaimed if need be. Raises OutOfPages, with nothing promised, if that
        is not enough, RequestTooLong if the slot is shorter.
        """
        with self._working:
            self._table.check(slot)
            self._check_length(num_tokens)
            with self._supply.promising(slot, num_tokens):
                self._supply.claim(slot, num_tokens)

    def grow(self, slot: Slot, num_tokens: int) -> None:
        """Back the first `num_tokens` tokens of `slot` (a total, not an increment).

        Raises OutOfPages, OutOfMappings or DriverError with nothing mapped, RequestTooLong if
        the slot is shorter.
        Source: vAttention, arXiv:2405.04437, section 5.
        """
        with self._working:
            self._table.check(slot)
            if num_tokens <= slot.ready_tokens:  # as nearly always: pages are larger than tokens
                slot.num_tokens = max(slot.num_tokens, num_tokens)
                slot.promised_tokens = max(slot.promised_tokens, num_tokens)
                if num_tokens > slot.settled_tokens:  # the next page is needed now
                    self._ledger.settle(slot)
                return
            with self._supply.promising(slot, num_tokens):
                self.reserve(slot, num_tokens)
                if num_tokens > slot.num_tokens:
                    self._supply.back(slot, num_tokens)
            self._backing.withdraw(slot, self._backing.lacking(slot, slot.promised_tokens))

    def look_ahead(self, slot: Slot, num_tokens: int) -> None:
        """Map memory for `num_tokens` tokens of `slot` in the background, if any is to spare.

        A job that fails is logged and counted (`KVStats.background_failures`). What it did not
        map, `grow` maps, and raises only if that fails too.
        """
        self._owner.check()
        self._table.check(slot)
        num_tokens = min(num_tokens, self.max_len)
        slot.ahead_tokens = num_tokens
        if num_tokens > slot.ready_tokens:
            self._look_ahead.submit(slot, num_tokens)

    def truncate(self, slot: Slot, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of `slot` and give the pages behind them back.

        If the driver refuses to unmap (DriverError), the tokens are gone all the same, and the
        pages go with the next `truncate` or `close`.
        """
        with self._working:
            self._table.check(slot)
            if not slot.pinned_tokens <= num_tokens <= slot.num_tokens:
                raise InvalidOperation(
                    f"cannot truncate {slot} to {num_tokens} tokens; use "
                    f"{slot.pinned_tokens} to {slot.num_tokens}"
                )
            self.pool.cancel(slot.reservation)
            slot.promised_tokens = num_tokens
            self._backing.shrink(slot, num_tokens, self._geometry.pages_per_range(num_tokens))

    def fork(self, slot: Slot, num_tokens: int, owner: Owner = None) -> Slot:
        """A new slot that starts with the first `num_tokens` tokens of `slot`.

        Pages that hold nothing else are shared, the rest of the last ones is copied. `owner` is as
        of `open`; that of `slot`, where it is None. Raises
        OutOfSlots, another Shortage or DriverError with nothing changed.
        """
        with self._working, ExitStack() as undo:
            self._table.check(slot, allow_parked=True)
            if not 0 <= num_tokens <= slot.num_tokens:
                raise InvalidOperation(f"cannot fork {num_tokens} tokens of {slot}")
            if slot.loan is not None:
                raise OutOfSlots(f"{slot} is changing hands and cannot be forked; compute instead")
            # `open` may have to reclaim a parked slot: never the one that is being forked.
            if not self._table.free and slot.state is SlotState.PARKED:
                raise OutOfSlots(f"no free slot to fork {slot} into")
            child = self.open(slot.owner if owner is None else owner)
            undo.callback(self._table.discard, child)
            child.num_tokens = child.promised_tokens = num_tokens
            self._ledger.settle(child)
            shared = self._backing.alias(slot, child, num_tokens)
            self._supply.claim(child, num_tokens, spare=slot)
            self._backing.extend(child, num_tokens)
            self._backing.copy(slot, child, shared)
            if slot.state is SlotState.PARKED:
                self._table.set_fence(slot, self.pool.driver.record_fence())  # the copy reads it
            undo.pop_all()
            return child

    def attach(
        self, slot: Slot, fd: int, offsets: Sequence[int], num_tokens: int
    ) -> tuple[int, ...]:
        """Let the first `num_tokens` tokens of `slot`, which is new, be those in the file `fd`.

        The bytes of stream `r` of the geometry's `token_format` begin at `offsets[r]`, a multiple
        of the system's page size. Pages that they fill are mapped, not read, take no memory, and
        are copied where the slot writes to them. The rest of each stream has pages of its own, to
        be written through `spans`; returns from which byte of each stream on.

        Raises OutOfPages, OutOfMappings or DriverError with nothing changed; InvalidOperation if
        the slot is not new, or the cache is not of contiguous slots in the host's memory.
        """
        with self._working:
            self._table.check(slot)
            self._check_length(num_tokens)
            if slot.num_tokens or slot.num_pages:
                raise InvalidOperation(f"{slot} is not new; attach a file to one that is")
            with self._supply.promising(slot, num_tokens), ExitStack() as undo:
                undo.callback(self._backing.shrink, slot, 0, [0] * len(slot.pages))
                slot.num_tokens = num_tokens
                self._ledger.settle(slot)
                counts = self._backing.attach_file(slot, fd, offsets)
                self._supply.claim(slot, num_tokens)
                self._backing.extend(slot, num_tokens)
                undo.pop_all()
            return tuple(count * self.pool.driver.page_bytes for count in counts)

    def park(self, slot: Slot, tokens: Sequence[int], variant: str = "") -> None:
        """Let go of `slot` but keep it mapped: it holds the KV of `tokens`.

        `variant` names what else that KV depends on, or who may read it: an adapter, a tenant's
        salt. A later request of that variant may adopt it; it is reclaimed when memory runs short.
        """
        with self._working:
            self._table.check(slot)
            if len(tokens) > slot.num_tokens:
                raise InvalidOperation(f"{slot} cannot hold the KV of {len(tokens)} tokens")
            if not self.max_parked or not len(tokens):
                self.close(slot)
                return
            self._table.park(slot, tokens, variant)

    def close(self, slot: Slot) -> None:
        """Unmap `slot` and give its pages back.

        If the driver refuses to unmap (DriverError), the slot stays open, without tokens, and may
        be closed again.
        """
        with self._working:
            self._table.check(slot)
            self._table.close(slot)

    def pin(self, slot: Slot, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of a live or parked slot as they are, until `unpin`.

        Its owner may go on, park or close it. It is not taken over, and not reclaimed, but others
        may share it. Pins are counted.
        """
        with self._working:
            self._table.check(slot, allow_parked=True)
            if not 0 <= num_tokens <= slot.num_tokens or slot.loan is not None:
                raise InvalidOperation(f"cannot pin {num_tokens} tokens of {slot}")
            self._table.pin(slot, num_tokens)

    def unpin(self, slot: Slot) -> None:
        """Undo a `pin`. The last one gives back what was closed meanwhile.

        If the driver refuses to unmap that (DriverError), the pin is gone all the same, and what is
        left stays parked, under no tokens, to be reclaimed.
        """
        with self._working:
            self._table.check(slot, allow_parked=True)
            if not slot.num_pins:
                raise InvalidOperation(f"{slot} is not pinned")
            self._table.unpin(slot)

    def find(self, tokens: Sequence[int], variant: str = "") -> PrefixMatch | None:
        """The parked slot with the longest common prefix, which counts as used just now."""
        with self._lock:
            match = self._table.parked.best_prefix(tokens, variant)
            if match is not None:
                self._table.parked.touch(match.slot)
            return match

    def spans(self, slot: Slot, start: int, stop: int) -> list[list[torch.Tensor]]:
        """The bytes of tokens `start … stop` of a slot: of each stream of the geometry's
        `token_format` the pieces that they lie in, each a uint8 tensor over the slot's memory.

        Contiguous slots have one piece a stream, the paged baseline one a block. They may be read
        and written while the slot is its owner's, or as far as it is pinned.
        """
        with self._lock:
            self._table.check(slot, allow_parked=slot.num_pins > 0)
            if not 0 <= start <= stop <= max(slot.num_tokens, slot.pinned_tokens):
                raise InvalidOperation(f"tokens {start} to {stop} are not all in {slot}")
            return self._backing.spans(slot, start, stop)

    # -- elasticity ------------------------------------------------------------------------

    def num_obtainable(self) -> int:
        """Pages that a new request could get, parked slots given up for it."""
        with self._lock:
            return self._supply.num_obtainable()

    def prefix_length(self, tokens: Sequence[int], variant: str = "") -> int:
        """Tokens that `adopt(tokens, variant)` would find parked, if nobody shares that slot."""
        with self._lock:
            match = self._table.parked.best_prefix(tokens, variant)
            return match.num_tokens if match else 0

    def trim(self) -> int:
        """Give everything that no live request needs back to the system; returns the bytes."""
        self._owner.check()
        self._look_ahead.drain()
        with self._working:
            self._supply.reclaim_all()
            return self.pool.trim() * self.pool.driver.page_bytes

    def shutdown(self) -> None:
        """Close every slot and give back memory and address space. Harmless when repeated.

        Tensors of the cache must not be used afterwards.
        """
        self._owner.check()
        self._look_ahead.stop()
        table = self._table
        with self._working:
            if not self._finalizer.alive:
                return
            pinned = [slot for slot in (*table.live.values(), *table.parked) if slot.num_pins]
            if pinned:
                raise InvalidOperation(f"{pinned[0]} is being read by a transfer; end it first")
            for slot in list(table.live.values()):
                self.close(slot)
            self._supply.reclaim_all()
            self.pool.trim()
            self._backing.free()
            self._finalizer.detach()

    def __enter__(self) -> "SlotCache":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    # -- inside ----------------------------------------------------------------------------

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self.max_len:
            raise RequestTooLong(
                f"{num_tokens} tokens do not fit into a slot of {self.max_len}; "
                "raise max_len or shorten the request"
            )

    def _is_tight(self, num_tokens: int) -> bool:
        """True if a fresh slot for `num_tokens` tokens would have to reclaim a parked one."""
        return (
            not self._table.free
            or len(self._table.parked) >= self.max_parked
            or self.pool.num_available < self.num_pages(min(num_tokens, self.max_len))
        )

    def _prepare(self, slot: Slot, num_tokens: int) -> None:
        """The background job: map ahead from memory to spare, and keep fresh pages ready.

        New pages are made first, with nothing locked: it is what takes long.
        """
        start = time.perf_counter()
        with self._lock:
            is_open = slot.state is SlotState.OPEN
            lacking = self._backing.lacking(slot, num_tokens) if is_open else 0
        if not self._backing.has_segments:  # pages of segments are made for who needs them
            with suppress(OutOfPages):  # the device is full; whoever needs a page will be told
                self.pool.refill(lacking)
        with self._lock, suppress(Shortage):  # none to spare: the request will reclaim or wait
            if slot.state is SlotState.OPEN:
                self._ledger.settle(slot)
                self._backing.map_ahead(slot, num_tokens)
        self._background_time_s += time.perf_counter() - start

    # -- accounts --------------------------------------------------------------------------

    def stats(self) -> KVStats:
        """A snapshot of what the cache holds."""
        with self._lock:
            return accounts.snapshot(
                self._backing,
                self._table,
                virtual_bytes=self.virtual_bytes,
                mapping_time_s=self._working.total_s,
                background_time_s=self._background_time_s,
                background_failures=self._look_ahead.num_failures,
            )

    def page_map(self) -> PageMap:
        """What each slot has its pages for, and `stats` of the same moment."""
        with self._lock:
            return page_map.draw(self._backing, self._table, self.stats())

    def check_invariants(self) -> None:
        """Recount everything from scratch; AssertionError names what does not add up."""
        with self._lock:
            accounts.recount(self._backing, self._table)


def _abandon(supply: Supply) -> None:
    """The finaliser of a cache: others under its limit may have all of it, and the janitor will."""
    supply.mark_abandoned()
    janitor.later(supply.abandon)
