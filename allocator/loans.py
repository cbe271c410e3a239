"""Pages that change hands between the caches of two processes: lent, then left or taken back.

    lends:     lend ──▶ both have the pages ── leave (the borrower owns them) │ take_back
    borrows:   borrow ─▶ both have the pages ── keep (owns them) │ close the slot: as before

Until the end the lender owns the pages. The borrower reads and writes nothing, and gives no memory
of theirs back to the system. Both ends are agreed upon elsewhere: a lender that takes back what the
borrower keeps has its tokens overwritten.
"""

from collections.abc import Sequence

import torch

from ..vmem.errors import InvalidOperation
from .backing import Backing
from .movable_slots import Lent, MovableSlots
from .parcel import Parcel
from .slot import Slot, SlotState
from .slot_table import SlotTable
from .timed_lock import TimedLock


class Loans:
    """The verbs of one cache. Its slots must be movable.

    All raise InvalidOperation where the state or the cache does not allow it.

    Args:
        backing: the pages behind the slots.
        table: the slots.
        lock: of the cache.
    """

    def __init__(self, backing: Backing, table: SlotTable, lock: TimedLock) -> None:
        self._backing = backing
        self._table = table
        self._lock = lock

    @property
    def are_possible(self) -> bool:
        """Whether the cache's pages can change hands."""
        return isinstance(self._backing, MovableSlots)

    @property
    def memory_name(self) -> str:
        """The memory that its pages are of; caches on one machine that agree in it can exchange
        pages. Empty where they cannot change hands."""
        return self._backing.memory_name if isinstance(self._backing, MovableSlots) else ""

    def lend(self, slot: Slot, num_tokens: int) -> Lent:
        """Let another process have the first `num_tokens` tokens of a slot that was pinned for it.

        The parcel's descriptors are the caller's to close. Pages that other slots have as well are
        not among those lent: either these slots have got copies (`Lent.num_parted_bytes`), or the
        bytes go beside the pages (`Lent.copied`). Until the loan ends, nobody can
        fork, adopt or pin the slot; its owner may go on, but what is written behind the tokens may
        be seen by the borrower.

        Raises DriverError with nothing lent.
        """
        with self._lock:
            backing = self._check(slot)
            if slot.loan is not None or slot.num_pins != 1 or num_tokens > slot.pinned_tokens:
                raise InvalidOperation(
                    f"{num_tokens} tokens of {slot} cannot be lent: it must be pinned so far, once "
                    f"(it is {slot.num_pins} times, {slot.pinned_tokens} tokens) and not be lent"
                )
            others = [*self._table.live.values(), *self._table.parked]
            return backing.lend(slot, num_tokens, others)

    def take_back(self, slot: Slot) -> None:
        """The borrower gave up: all is as before the loan. Nothing is unpinned."""
        with self._lock:
            self._check_loan(slot).take_back(slot)

    def leave(self, slot: Slot) -> None:
        """The borrower owns the pages: they are unmapped here, the slot unpinned and emptied.

        A live slot stays its owner's, to be closed. If the driver refuses to unmap (DriverError),
        the tokens are gone all the same, and the pages go with `close` or when they are reclaimed.
        """
        with self._lock:
            self._check_loan(slot).leave(slot)
            if slot.state is SlotState.OPEN:
                slot.promised_tokens = 0
                self._backing.pool.cancel(slot.reservation)
                self._table.unpin(slot)
                self._backing.shrink(slot, 0, [0] * len(slot.pages))
                return
            # First, for what is unpinned next may fail: nobody may find pages that are another's.
            self._table.parked.shorten(slot, 0)
            slot.num_tokens = 0
            self._table.unpin(slot)  # which closes it

    def borrow(self, slot: Slot, parcel: Parcel, descriptors: Sequence[int]) -> list[torch.Tensor]:
        """Map the pages of a parcel behind `slot`, which is new, in place of reserved memory.

        Returns the bytes to be filled with what comes beside the pages (`Lent.copied`). To undo it,
        close the slot.

        Raises OutOfPages, OutOfMappings or DriverError with nothing mapped; InvalidOperation if
        the parcel is of another format or geometry (copy the tokens instead), TransferError if it
        is not what a cache lends.
        """
        with self._lock:
            backing = self._check(slot)
            if slot.num_tokens or slot.num_pages or slot.state is not SlotState.OPEN:
                raise InvalidOperation(f"{slot} is not new; borrow for one that is")
            if parcel.num_tokens > slot.promised_tokens:
                raise InvalidOperation(
                    f"{parcel.num_tokens} tokens come, and {slot.promised_tokens} are reserved for "
                    f"{slot}; reserve memory first"
                )
            return backing.borrow(slot, parcel, descriptors)

    def keep(self, slot: Slot) -> None:
        """Own what was borrowed, from now on."""
        with self._lock:
            self._check_loan(slot).keep(slot)

    def _check(self, slot: Slot) -> MovableSlots:
        self._table.check(slot, allow_parked=True)
        if not isinstance(self._backing, MovableSlots):
            raise InvalidOperation(
                "pages of this cache cannot change hands; make it with movable=True, or copy"
            )
        return self._backing

    def _check_loan(self, slot: Slot) -> MovableSlots:
        backing = self._check(slot)
        if slot.loan is None:
            raise InvalidOperation(f"no pages of {slot} are lent or borrowed")
        return backing
