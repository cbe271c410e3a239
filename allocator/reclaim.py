"""What can be taken back when memory runs short, and in which order.

First pages mapped ahead behind live requests, which cost nothing but the mapping. Then parked
slots, oldest first and from their ends, so that what is left of each stays a prefix.
"""

from collections.abc import Iterable

from .backing import Backing
from .parking import ParkingLot
from .slot import Slot


def num_reclaimable(backing: Backing, live: Iterable[Slot], parked: Iterable[Slot]) -> int:
    """Pages whose every reference is behind the promise of a live slot, or in a parked one."""
    loose = [
        page
        for slot in live
        for pages, promised in zip(slot.pages, backing.promised_pages(slot), strict=True)
        for page in pages[promised:]
    ]
    loose += [page for slot in parked for pages in slot.pages for page in pages]
    return backing.num_exclusive(loose)


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
    parked = [slot for slot in lot if slot is not spare]
    if not 0 < num_pages <= num_reclaimable(backing, live, parked):
        return False
    goal = backing.pool.num_available + num_pages
    for slot in live:
        if backing.pool.num_available < goal:
            backing.shrink(slot, slot.num_tokens, backing.promised_pages(slot))
    for slot in parked:
        while slot.num_pages and backing.pool.num_available < goal:
            _shorten(backing, lot, slot, goal - backing.pool.num_available)
    return True


def _shorten(backing: Backing, lot: ParkingLot, slot: Slot, num_pages: int) -> None:
    """Take a row or more, about `num_pages` pages, from the end of a parked slot."""
    rows = -(-num_pages // len(slot.pages))
    num_tokens = max(0, slot.num_tokens - rows * backing.geometry.row_tokens)
    lot.shorten(slot, num_tokens)
    backing.shrink(slot, num_tokens, backing.geometry.pages_per_range(num_tokens))
