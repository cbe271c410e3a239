"""What the pages of every slot are there for: counts along its ranges, in place of single pages."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from .backing import Backing
from .layout import PageGeometry
from .slot import Slot, SlotState
from .slot_table import SlotTable
from .stats import KVStats


class PageRuns(NamedTuple):
    """Pages of one range of a slot, in the order in which they lie from its start on.

    Behind them, up to the lane's `num_pages`, is address space that nothing backs.

    Attributes:
        shared: that another slot has, too.
        held: with tokens of a live request, or such as a transfer reads.
        ahead: mapped for a live request's tokens to come.
        parked: that no live request needs: a parked slot's, or left by a slot's earlier owner.
    """

    shared: int
    held: int
    ahead: int
    parked: int


@dataclass(frozen=True, slots=True)
class Lane:
    """Ranges whose tokens are equally wide, and whose pages so come and go together.

    Attributes:
        num_ranges: of each slot.
        num_pages: that one of them has room for.
    """

    num_ranges: int
    num_pages: int


class SlotPages(NamedTuple):
    """A slot that is not free.

    Attributes:
        slot: its index.
        is_parked: False while it is a live request's.
        num_tokens: that it holds.
        num_promised: pages set aside for it and not mapped yet, over all ranges.
        runs: of one range of each lane.
    """

    slot: int
    is_parked: bool
    num_tokens: int
    num_promised: int
    runs: tuple[PageRuns, ...]


@dataclass(frozen=True, slots=True)
class PageMap:
    """What a cache holds, slot by slot, at one moment.

    Attributes:
        stats: the same in sum.
        lanes: what each range of a slot is like.
        slots: those that are not free, by index.
    """

    stats: KVStats
    lanes: tuple[Lane, ...]
    slots: tuple[SlotPages, ...]


def draw(backing: Backing, table: SlotTable, stats: KVStats) -> PageMap:
    """The map that goes with `stats`, for which the ledger has been settled.

    It takes time for each slot and lane, not for each page or range. Where the driver refused to
    unmap some ranges' pages, the others' are shown for the lane until that is tried again.
    """
    lanes = _lanes(backing.geometry)
    slots = [*table.live.values(), *table.parked]
    return PageMap(
        stats=stats,
        lanes=tuple(lanes.values()),
        slots=tuple(
            SlotPages(
                slot.index,
                slot.state is SlotState.PARKED,
                slot.num_tokens,
                slot.reservation.num_pages,
                tuple(_runs(backing, slot, index) for index in lanes),
            )
            for slot in sorted(slots, key=lambda slot: slot.index)
        ),
    )


def _lanes(geometry: PageGeometry) -> dict[int, Lane]:
    """The lanes of a slot, each with the index of its first range."""
    widths, full = geometry.range_widths, geometry.pages_per_range(geometry.max_len)
    return {
        widths.index(width): Lane(widths.count(width), full[widths.index(width)])
        for width in dict.fromkeys(widths)
    }


def _runs(backing: Backing, slot: Slot, range_index: int) -> PageRuns:
    pages, (needed, _, ahead, _) = slot.pages[range_index], slot.borders[range_index]
    # Shared pages come first: a fork shares from the start on, and what is written is one's own.
    # Behind its tokens a slot may still have some that the driver refused to unmap.
    backed = min(backing.geometry.pages_per_range(slot.num_tokens)[range_index], len(pages))
    shared = 0
    if backed and backing.is_shared(pages[0]):
        shared = bisect_left(pages, True, hi=backed, key=lambda page: not backing.is_shared(page))
    held = max(shared, min(needed, len(pages)))
    wanted = max(held, min(ahead, len(pages)))
    return PageRuns(shared, held - shared, wanted - held, len(pages) - wanted)
