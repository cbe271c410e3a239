"""What each page of a cache is there for, kept as counts, so that no question lists the pages.

Several slots may share a page; it counts by the best use that any of them has for it. What use a
slot has for a page follows from the page's place in the slot's range:

    range    | needed        | promised      | ahead         | idle          (of a live slot)
             | parked                                                        (of a parked one)
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import pairwise

from ..vmem import Page, is_of_file
from .layout import PageGeometry
from .slot import ENDLESS, Borders, Slot, SlotState


class Use(IntEnum):
    """What a page is there for; the best first."""

    NEEDED = 0  # holds tokens of a live request, or such as a transfer reads
    PROMISED = 1  # mapped already for tokens that were promised
    AHEAD = 2  # mapped for tokens that were asked ahead
    IDLE = 3  # a live slot's, from an earlier owner
    PARKED = 4  # only parked slots'


class Ledger:
    """Counts the pages of one cache by their use. Not for use from several threads at once.

    Pages of files are left out: they are nobody's memory, and giving them up gains none.

    `attach` and `detach` follow every page that comes to a slot or leaves it. `settle` follows the
    slot's tokens: whoever changes `num_tokens`, `promised_tokens` or the state calls it before the
    counts are read. `ahead_tokens` may change at any time (nothing is locked then), so pages
    ahead are told from idle ones as of the last `settle`; nothing but statistics asks.

    Args:
        geometry: tokens to pages.
    """

    def __init__(self, geometry: PageGeometry) -> None:
        self._geometry = geometry
        self._uses: dict[Page, list[int]] = {}  # of each page, one a reference
        self._counts = [0] * len(Use)

    def count(self, *uses: Use) -> int:
        """Pages whose best use is one of `uses`."""
        return sum(self._counts[use] for use in uses)

    def num_reclaimable(self, spare: Slot | None = None) -> int:
        """Pages that no live slot was promised, nor the parked slot `spare` has."""
        loose = self.count(Use.AHEAD, Use.IDLE, Use.PARKED)
        if spare is None or spare.state is not SlotState.PARKED:
            return loose
        kept = (page for pages in spare.pages for page in pages)
        own = (page for page in kept if not is_of_file(page))
        return loose - sum(min(self._uses[page]) >= Use.AHEAD for page in own)

    def attach(self, slot: Slot, range_index: int, start: int, pages: Sequence[Page]) -> None:
        """Note that `slot` has `pages` in a range from position `start` on."""
        borders = slot.borders[range_index]
        for position, page in enumerate(pages, start):
            self._change(page, None, bisect_right(borders, position))

    def detach(self, slot: Slot, range_index: int, start: int, pages: Sequence[Page]) -> None:
        """Note that `slot` no longer has `pages`, which were in a range from `start` on."""
        borders = slot.borders[range_index]
        for position, page in enumerate(pages, start):
            self._change(page, bisect_right(borders, position), None)

    def settle(self, slot: Slot) -> None:
        """Note what `slot` has its pages for now; only those whose use changed are looked at."""
        settled = self._borders(slot)
        if settled == slot.borders:
            return
        for pages, before, after in zip(slot.pages, slot.borders, settled, strict=True):
            if before != after:
                for start, stop in pairwise(sorted({*before, *after})):
                    old, new = bisect_right(before, start), bisect_right(after, start)
                    if old != new:
                        for page in pages[start:stop]:
                            self._change(page, old, new)
        slot.borders = settled
        slot.settled_tokens = self._geometry.tokens_backed([needed for needed, *_ in settled])

    def _borders(self, slot: Slot) -> list[Borders]:
        to_pages, num_tokens = self._geometry.pages_per_range, slot.num_tokens
        if slot.state is not SlotState.OPEN:
            return [(n, n, n, n) for n in to_pages(slot.pinned_tokens)][: len(slot.pages)]
        promised_tokens = max(num_tokens, slot.promised_tokens)
        ahead_tokens = min(max(promised_tokens, slot.ahead_tokens), self._geometry.max_len)
        needed = to_pages(num_tokens)
        promised = needed if promised_tokens == num_tokens else to_pages(promised_tokens)
        ahead = promised if ahead_tokens == promised_tokens else to_pages(ahead_tokens)
        return [(n, p, a, ENDLESS) for n, p, a in zip(needed, promised, ahead, strict=True)]

    def _change(self, page: Page, old: int | None, new: int | None) -> None:
        """One reference to `page` was of use `old` and is of use `new`; None for no reference."""
        if is_of_file(page):
            return
        uses = self._uses.setdefault(page, [])
        if uses:
            self._counts[min(uses)] -= 1
        if old is not None:
            uses.remove(old)
        if new is not None:
            uses.append(new)
        if uses:
            self._counts[min(uses)] += 1
        else:
            del self._uses[page]

    def check(self, slots: Iterable[Slot]) -> None:
        """Recount everything from scratch; AssertionError names what does not add up."""
        uses: dict[Page, list[int]] = {}
        for slot in slots:
            fresh = self._borders(slot)
            for pages, borders, now in zip(slot.pages, slot.borders, fresh, strict=True):
                # The third may lag behind `ahead_tokens`.
                assert (*borders[:2], borders[3]) == (*now[:2], now[3]), f"{slot} is not settled"
                for position, page in enumerate(pages):
                    if not is_of_file(page):
                        uses.setdefault(page, []).append(bisect_right(borders, position))
        assert uses.keys() == self._uses.keys(), "the ledger lists other pages than the slots"
        for page, found in uses.items():
            assert sorted(found) == sorted(self._uses[page]), f"page {page} is of other use"
        best = Counter(min(found) for found in uses.values())
        assert [best[use] for use in Use] == self._counts, "the counts are of other pages"
