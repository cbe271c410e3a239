"""A cache's page map, counted again page by page."""

from collections import Counter
from collections.abc import Sequence

from vkv.allocator import PageRuns, Slot, SlotCache, SlotState
from vkv.vmem import is_of_file


def check_page_map(cache: SlotCache, slots: Sequence[Slot]) -> None:
    """`cache.page_map()` says of `slots`, all that are not free, what listing their pages says."""
    found = cache.page_map()
    references = Counter(p for slot in slots for pages in slot.pages for p in pages)
    assert found.stats.pages_held == cache.stats().pages_held
    assert sum(lane.num_ranges for lane in found.lanes) == cache.layout.num_ranges
    most = cache.layout.pages_per_range(cache.max_len)
    assert sum(lane.num_ranges * lane.num_pages for lane in found.lanes) == sum(most)
    firsts = [cache.layout.range_widths.index(w) for w in dict.fromkeys(cache.layout.range_widths)]
    by_index = sorted(slots, key=lambda slot: slot.index)
    assert [s.slot for s in found.slots] == [slot.index for slot in by_index]
    for slot, drawn in zip(by_index, found.slots, strict=True):
        assert drawn.is_parked == (slot.state is SlotState.PARKED)
        assert drawn.num_tokens == slot.num_tokens
        assert drawn.num_promised == slot.reservation.num_pages
        for index, runs in zip(firsts, drawn.runs, strict=True):
            assert sum(runs) == len(slot.pages[index])
            counted = _count(cache, slot, index, references)
            assert counted in (None, runs)


def _count(cache: SlotCache, slot: Slot, index: int, references: Counter[int]) -> PageRuns | None:
    """Its runs; None where a driver that refused to unmap left shared pages behind others."""

    def pages_of(num_tokens: int) -> int:
        return cache.layout.pages_per_range(min(num_tokens, cache.max_len))[index]

    kinds: list[str] = []
    for position, page in enumerate(slot.pages[index]):
        is_shared = references[page] > 1 or is_of_file(page)
        if position < pages_of(slot.num_tokens) and is_shared:
            kinds.append("shared")
        elif slot.state is SlotState.PARKED:
            kinds.append("held" if position < pages_of(slot.pinned_tokens) else "parked")
        elif position < pages_of(slot.num_tokens):
            kinds.append("held")
        elif position < pages_of(max(slot.promised_tokens, slot.ahead_tokens)):
            kinds.append("ahead")
        else:
            kinds.append("parked")
    order = PageRuns._fields
    num_shared = kinds.count("shared")
    if "shared" in kinds[num_shared:]:
        return None
    assert kinds == sorted(kinds, key=order.index), "the runs lie otherwise"
    return PageRuns(*(kinds.count(kind) for kind in order))
