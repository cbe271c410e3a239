"""How a cache gets memory: promised before it is mapped, taken back where it runs short."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..vmem import OwnedLock
from ..vmem.errors import ForkedProcess, InvalidOperation, OutOfMappings, OutOfPages
from .backing import Backing
from .ledger import Use
from .reclaim import reclaim, reclaim_parked, shorten
from .slot import Slot
from .slot_table import SlotTable


class Supply:
    """Promises pages to the slots of one cache, and takes them back from those of less use.

    Caches under one `MemoryLimit` meet here: each is a member by its supply. `reclaimable_bytes`,
    `give_up` and `abandon` lock; all others are for callers that hold `lock`.

    Args:
        backing: the pages.
        table: the slots.
        lock: of the cache.
    """

    def __init__(self, backing: Backing, table: SlotTable, lock: OwnedLock) -> None:
        self._backing = backing
        self._table = table
        self._lock = lock
        self._ledger = backing.ledger
        self._pool = backing.pool
        self._limit = backing.pool.shared_limit
        self._page_bytes = backing.pool.driver.page_bytes
        self._is_abandoned = self._is_over = False
        if self._limit is not None:
            self._limit.join(self)

    # -- promises --------------------------------------------------------------------------

    def num_obtainable(self) -> int:
        """Pages that a new request could get, parked slots given up for it."""
        return self._pool.num_available + self._ledger.num_reclaimable() + self._num_elsewhere()

    @contextmanager
    def promising(self, slot: Slot, num_tokens: int) -> Iterator[None]:
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

    def claim(self, slot: Slot, num_tokens: int, spare: Slot | None = None) -> None:
        """Reserve what `slot` lacks for `num_tokens` tokens, reclaiming memory if need be.

        The parked slot `spare` is left as it is. Raises OutOfPages, with nothing reserved.
        """
        lacking = self._backing.lacking(slot, num_tokens) - slot.reservation.num_pages
        if lacking > 0:
            short = lacking - self._pool.num_available
            if short > 0 and not self._reclaim(short, spare):
                self._reclaim_with_others(lacking, spare)
            self._pool.reserve(lacking, into=slot.reservation)

    def back(self, slot: Slot, num_tokens: int) -> None:
        """Map what was claimed. Where the device itself is short, take spare memory back first."""
        try:
            self._backing.grow(slot, num_tokens)
        except OutOfPages:  # below the pool's limit; how far below, nobody can tell
            short = self._backing.lacking(slot, num_tokens) - self._pool.num_free
            if not self._reclaim(min(short, self._ledger.num_reclaimable())):
                raise
            self._backing.grow(slot, num_tokens)
        except OutOfMappings:
            self.reclaim_all()
            self._backing.grow(slot, num_tokens)

    # -- taking back -----------------------------------------------------------------------

    def reclaim_all(self) -> None:
        """Take back all that no live request was promised."""
        for slot in self._table.parked:
            if slot.num_pins:
                shorten(self._backing, self._table.parked, slot, slot.num_pages)
            else:
                self._table.close_parked(slot)
        for slot in self._table.live.values():
            self._backing.shrink(slot, slot.num_tokens, self._backing.promised_pages(slot))

    def _reclaim(self, num_pages: int, spare: Slot | None = None) -> bool:
        live, parked = self._table.live.values(), self._table.parked
        done = reclaim(self._backing, live, parked, num_pages, spare)
        self._table.close_emptied()
        return done

    def _reclaim_with_others(self, num_pages: int, spare: Slot | None) -> None:
        """Make `num_pages` pages available with the help of other caches, if that is enough."""
        limit = self._limit
        if limit is None:
            return
        own = self._ledger.num_reclaimable(spare)
        missing = num_pages - own - self._pool.num_available
        if missing > self._num_elsewhere():
            return
        limit.make_room(self, limit.room_bytes + missing * self._page_bytes)
        if own:
            self._reclaim(num_pages - self._pool.num_available, spare)

    def _num_elsewhere(self) -> int:
        """Pages that other caches under the same limit could give up."""
        return 0 if self._limit is None else self._limit.reclaimable_bytes(self) // self._page_bytes

    # -- as the other members of a limit see it --------------------------------------------

    def reclaimable_bytes(self) -> int:
        """What `give_up` could free."""
        with self._lock:
            num_pages = self._ledger.count(Use.PARKED)
            if self._is_abandoned:
                promised = sum(s.reservation.num_pages for s in self._table.live.values())
                num_pages = self._ledger.count(*Use) + promised
            return (num_pages + self._pool.num_spare) * self._page_bytes

    def give_up(self, num_bytes: int) -> None:
        """Return about `num_bytes` of parked slots and spare pages, or all of them, to the system.

        What is mapped ahead of live requests stays: only the cache's own thread knows whether
        work that touches it is about to be launched. A cache that was dropped gives up all.
        """
        with self._lock:
            if self._is_abandoned:
                self.abandon()
                return
            wanted = -(-num_bytes // self._page_bytes)
            short = wanted - self._pool.num_spare
            if short > 0:
                reclaim_parked(self._backing, self._table.parked, short)
                self._table.close_emptied()
            spare = self._pool.num_spare
            self._pool.trim(self._pool.num_free - min(wanted, spare, self._pool.num_free))

    # -- the end ---------------------------------------------------------------------------

    def mark_abandoned(self) -> None:
        """Note that the cache was dropped: all of it may go. For finalisers; locks nothing."""
        self._is_abandoned = True

    def abandon(self) -> None:
        """Give back, once, what a cache held that was dropped without `shutdown`."""
        # A driver that was closed, or that belongs to the parent process, has nothing left to give.
        with suppress(InvalidOperation, ForkedProcess), self._lock:
            if self._is_over:
                return
            slots = [*self._table.live.values(), *self._table.parked]
            for slot in slots:
                self._pool.cancel(slot.reservation)
                self._backing.shrink(slot, 0, [0] * len(slot.pages))
            self._pool.trim()
            self._backing.free()
            self._is_over = True
