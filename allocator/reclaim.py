"""What can be taken back when memory runs short, and in which order.

First pages mapped ahead behind live requests, which cost nothing but the mapping. Then parked
slots, oldest first and from their ends, so that what is left of each stays a prefix.
"""

from collections.abc import Iterable

from .backing import Backing
from .ledger import Use
from .parking import ParkingLot
from .slot import Slot


def reclaim(
    backing: Backing,
    live: Iterable[Slot],
    lot: ParkingLot,
    num_pages: int,
    spare: Slot | None = None,
) -> bool:
    """Free `num_pages` pages, or none if there are not that many to be had; True if done.

    The parked slot `spare` is left as it is. Others may end without tokens and pages.
    """
    if not 0 < num_pages <= backing.ledger.num_reclaimable(spare):
        return False
    goal = backing.pool.num_available + num_pages
    for slot in live:
        if backing.pool.num_available < goal:
            backing.shrink(slot, slot.num_tokens, backing.promised_pages(slot))
    _shorten_all(backing, (slot for slot in lot if slot is not spare), lot, goal)
    return True


def reclaim_parked(backing: Backing, lot: ParkingLot, num_pages: int) -> None:
    """Free `num_pages` pages of parked slots, or as many as they have alone."""
    num_pages = min(num_pages, backing.ledger.count(Use.PARKED))
    _shorten_all(backing, lot, lot, backing.pool.num_available + num_pages)


def _shorten_all(backing: Backing, slots: Iterable[Slot], lot: ParkingLot, goal: int) -> None:
    """Shorten parked slots, in order, until `goal` pages are available.

    What a slot has of a file alone stays: it takes no memory.
    """
    for slot in slots:
        while slot.has_memory and backing.pool.num_available < goal:
            if not shorten(backing, lot, slot, goal - backing.pool.num_available):
                break


def shorten(backing: Backing, lot: ParkingLot, slot: Slot, num_pages: int) -> bool:
    """Take a growth step or more, about `num_pages` pages, from the end of a parked slot.

    What is pinned or a file's stays. Returns False once nothing more can be had.
    """
    steps = -(-num_pages // len(slot.pages))
    wanted = slot.num_tokens - steps * backing.geometry.growth_tokens
    least = max(slot.pinned_tokens, backing.tokens_of_file(slot))
    num_tokens = min(slot.num_tokens, max(wanted, least))
    lot.shorten(slot, num_tokens)
    kept = max(num_tokens, slot.pinned_tokens)
    backing.shrink(slot, num_tokens, backing.geometry.pages_per_range(kept))
    return num_tokens > least
