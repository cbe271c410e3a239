"""The slots of a cache: which are free, which are live requests', and which are parked."""

import heapq
from collections.abc import Sequence

from ..vmem import Fence
from ..vmem.errors import DriverError, InvalidOperation, OutOfSlots, Shortage
from .backing import Backing
from .page_pool import Owner
from .parking import ParkingLot
from .slot import Slot, SlotState


class SlotTable:
    """Hands slots out, parks them and takes them back. Not for use from several threads at once.

    Args:
        backing: the pages behind the slots.
        num_slots: slots in all.
        max_parked: parked slots kept before the next one replaces the oldest.

    Attributes:
        live: the open slots, by index.
        parked: the parked ones.
        free: a heap of the indices of the others.
    """

    def __init__(self, backing: Backing, num_slots: int, max_parked: int) -> None:
        self.live: dict[int, Slot] = {}
        self.parked = ParkingLot()
        self.free = list(range(num_slots))
        self.num_slots = num_slots
        self.max_parked = max_parked
        self._backing = backing
        self._num_ranges = backing.geometry.num_ranges

    def check(self, slot: Slot, *, allow_parked: bool = False) -> None:
        """Raise InvalidOperation if `slot` is not open here."""
        if self.live.get(slot.index) is not slot and not (allow_parked and slot in self.parked):
            raise InvalidOperation(f"{slot} is not open in this cache")

    def open(self, owner: Owner) -> Slot:
        """A slot without pages, in the place of the oldest parked one if need be.

        Raises OutOfSlots if every slot is a live request's.
        """
        if not self.free:
            oldest = self.parked.oldest()
            if oldest is None:
                raise OutOfSlots(f"all {self.num_slots} slots are in use; close one first")
            self.close_parked(oldest)
        slot = Slot(heapq.heappop(self.free), self._num_ranges, owner)
        self.live[slot.index] = slot
        return slot

    def close(self, slot: Slot) -> None:
        """Give up an open slot. Where the driver refuses (DriverError) it stays, without tokens.

        What is pinned of it stays parked, under no tokens, until the last `unpin`.
        """
        if slot.num_pins:
            self.park(slot, (), "")
            return
        self._backing.pool.cancel(slot.reservation)
        slot.promised_tokens = 0
        self._backing.shrink(slot, 0, (0,) * self._num_ranges)
        del self.live[slot.index]
        self._retire(slot)

    def discard(self, slot: Slot) -> None:
        """Close a slot that nobody has a handle of. What the driver keeps mapped goes later."""
        try:
            self.close(slot)
        except (DriverError, Shortage):
            self._set_parked(slot, (), "")
            raise

    def park(self, slot: Slot, tokens: Sequence[int], variant: str) -> None:
        """Park an open slot, which holds the KV of `tokens`, once there is a place for it."""
        self._make_places(1)
        self.set_fence(slot, self._backing.pool.driver.record_fence())
        self._backing.pool.cancel(slot.reservation)
        slot.num_tokens = slot.promised_tokens = len(tokens)
        self._set_parked(slot, tokens, variant)

    def pin(self, slot: Slot, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens of a live or parked slot where they are."""
        slot.num_pins += 1
        slot.pinned_tokens = max(slot.pinned_tokens, num_tokens)
        self._backing.ledger.settle(slot)

    def unpin(self, slot: Slot) -> None:
        """Undo a `pin`. With the last one goes a slot that was closed meanwhile."""
        slot.num_pins -= 1
        if slot.num_pins:
            return
        slot.pinned_tokens = 0
        self._backing.ledger.settle(slot)
        if slot.state is SlotState.PARKED and not slot.num_tokens:
            self.close_parked(slot)
        self._make_places(0)

    def _make_places(self, count: int) -> None:
        """Close the oldest parked slots until `count` more may be parked; pinned ones stay."""
        while len(self.parked) + count > self.max_parked and (oldest := self.parked.oldest()):
            self.close_parked(oldest)

    def take_over(
        self, parked: Slot, num_tokens: int, owner: Owner, num_wanted: int
    ) -> tuple[Slot, int]:
        """Open a parked slot again, of which `num_tokens` tokens are of use; fewer may be left.

        Its next `owner` begins with `num_wanted` tokens.
        """
        num_tokens, keep = self._backing.usable(parked, num_tokens)
        self.parked.shorten(parked, num_tokens)
        self._backing.shrink(parked, num_tokens, keep)
        self.set_fence(parked, None)
        self._backing.clear_for(owner, parked, num_wanted)
        self.parked.remove(parked)
        slot = parked.hand_over(owner)
        self._backing.ledger.settle(slot)
        self.live[slot.index] = slot
        return slot, num_tokens

    def close_parked(self, slot: Slot) -> None:
        """Give up a parked slot."""
        self.parked.shorten(slot, 0)
        self._backing.shrink(slot, 0, (0,) * self._num_ranges)
        self.parked.remove(slot)
        self._retire(slot)

    def close_emptied(self) -> None:
        """Give up the parked slots of which nothing is left."""
        for slot in self.parked:
            if not slot.num_pages and not slot.num_pins:
                self.close_parked(slot)

    def set_fence(self, slot: Slot, fence: Fence | None) -> None:
        """Note the last work that may touch a parked slot."""
        earlier, slot.fence = slot.fence, fence
        if earlier is not None:
            earlier.wait()  # over by now, as a rule; what is never waited for is never freed

    def check_invariants(self) -> None:
        """Every slot is in one place; AssertionError if one is lost or doubled."""
        indices = [*self.live, *(slot.index for slot in self.parked), *self.free]
        assert sorted(indices) == list(range(self.num_slots)), "a slot is lost or doubled"

    def _set_parked(self, slot: Slot, tokens: Sequence[int], variant: str) -> None:
        slot.state = SlotState.PARKED
        self._backing.ledger.settle(slot)
        del self.live[slot.index]
        self.parked.add(slot, tokens, variant)

    def _retire(self, slot: Slot) -> None:
        slot.state = SlotState.CLOSED
        heapq.heappush(self.free, slot.index)
