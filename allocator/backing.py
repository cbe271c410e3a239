"""How slots come by their pages: attach, share, copy on write, detach.

What differs between contiguous virtual memory and a paged pool is only how a page becomes part
of a slot; the subclasses supply that. Everything here keeps two promises: an operation that
raises has changed nothing, and a slot's page list says what is really attached.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch

from ..vmem import Page, segment_of
from ..vmem.errors import OutOfMappings
from .layout import PageGeometry
from .ledger import Ledger
from .page_pool import UNKNOWN, Owner, PagePool
from .slot import Slot


class Backing(ABC):
    """The pages behind the slots of one cache. Not for use from several threads at once.

    A third of its many methods is what a kind of memory supplies; the others undo each other.

    Args:
        geometry: tokens to pages.
        pool: where the pages come from.

    Attributes:
        has_segments: whether every slot has pages of its own kind, of no use to other slots.
    """

    has_segments = False

    def __init__(self, geometry: PageGeometry, pool: PagePool) -> None:
        self.geometry = geometry
        self.pool = pool
        self.ledger = Ledger(geometry)

    # -- counts ----------------------------------------------------------------------------

    def lacking(self, slot: Slot, num_tokens: int) -> int:
        """Pages that growing `slot` to `num_tokens` tokens takes from the pool."""
        targets = self.geometry.pages_per_range(num_tokens)
        lacking = sum(max(0, t - len(p)) for t, p in zip(targets, slot.pages, strict=True))
        if num_tokens > slot.num_tokens:
            lacking += sum(1 for _ in self._shared_tail(slot, targets))
        return lacking

    def promised_pages(self, slot: Slot) -> tuple[int, ...]:
        """Pages of each range that `slot` has a right to; what it has beyond was mapped ahead."""
        return self.geometry.pages_per_range(max(slot.num_tokens, slot.promised_tokens))

    def usable(self, slot: Slot, num_tokens: int) -> tuple[int, Sequence[int]]:
        """How much a new owner can keep of a parked slot: tokens, and pages of each range.

        It must not write into pages that others share. So of the first `num_tokens` tokens it keeps
        those before the first shared page from the place on where it would write.
        """
        while True:
            full = self.geometry.whole_pages_per_range(num_tokens)
            keep = [
                next((i for i in range(start, len(pages)) if self.is_shared(pages[i])), len(pages))
                for start, pages in zip(full, slot.pages, strict=True)
            ]
            backed = min(num_tokens, self.geometry.tokens_backed(keep))
            if backed == num_tokens:
                return num_tokens, keep
            num_tokens = backed

    def tokens_of_file(self, slot: Slot) -> int:
        """Tokens of `slot` that need no page but those of a file."""
        return self.geometry.tokens_backed(slot.file_pages)

    # -- growing ---------------------------------------------------------------------------

    def grow(self, slot: Slot, num_tokens: int) -> None:
        """Let `slot` have `num_tokens` tokens, more than now, with pages of its reservation.

        Pages that others share are copied where the new tokens would be written to. All or
        nothing.
        """
        targets = self.geometry.pages_per_range(num_tokens)
        with ExitStack() as undo:
            replaced = [
                self._own(slot, index, position, undo)
                for index, position in list(self._shared_tail(slot, targets))
            ]
            self.extend(slot, num_tokens)
            undo.pop_all()
        slot.num_tokens = num_tokens
        self.ledger.settle(slot)
        self._note_ready(slot)
        self.pool.release(replaced, slot.owner)

    def extend(self, slot: Slot, num_tokens: int) -> bool:
        """Attach pages of the slot's reservation that back `num_tokens` tokens. All or nothing.

        True if some of them had to be cleared.
        """
        targets = self.geometry.pages_per_range(num_tokens)
        missing = [max(0, t - len(p)) for t, p in zip(targets, slot.pages, strict=True)]
        if not any(missing):
            return False
        stretches = ((i, len(slot.pages[i]), count) for i, count in enumerate(missing))
        named = self._names(slot, stretches)
        pages = self.pool.commit(slot.reservation, sum(missing), named)
        with ExitStack() as undo:
            undo.callback(self.pool.restore, slot.reservation, pages)  # those not attached
            for index, count in enumerate(missing):
                if count:
                    run = pages[:count]
                    self._attach(slot, index, run)
                    undo.callback(self._retract, slot, index, len(slot.pages[index]))
                    self._add(slot, index, run)
                    del pages[:count]
            clears = False
            for index, count in enumerate(missing):
                first = len(slot.pages[index]) - count
                if self.pool.needs_zero(slot.pages[index][first:], slot.owner):
                    self._clear_pages(slot, index, first)
                    clears = True
            undo.pop_all()
        self._note_ready(slot)
        return clears

    def map_ahead(self, slot: Slot, num_tokens: int) -> None:
        """Extend `slot` from memory that nobody was promised. All or nothing."""
        extra = self.lacking(slot, num_tokens) - slot.reservation.num_pages
        try:
            if extra > 0:
                self.pool.reserve(extra, into=slot.reservation)
            if self.extend(slot, num_tokens):
                # Cleared on this thread's stream; the requests' work may be on another.
                self.pool.driver.record_fence().wait()
        finally:
            self.withdraw(slot, self.lacking(slot, slot.promised_tokens))

    def withdraw(self, slot: Slot, num_pages: int) -> None:
        """Give the pool what is reserved for `slot` beyond `num_pages` pages."""
        self.pool.cancel(slot.reservation, max(0, slot.reservation.num_pages - num_pages))

    def _retract(self, slot: Slot, range_index: int, keep: int) -> None:
        """Undo an `extend` of one range."""
        self.pool.driver.record_fence().wait()  # the pages may be being cleared
        self.pool.restore(slot.reservation, self._cut(slot, range_index, keep))

    # -- sharing ---------------------------------------------------------------------------

    def alias(self, source: Slot, target: Slot, num_tokens: int) -> tuple[int, ...]:
        """Let `target`, which is empty, share pages full of the first tokens of `source`.

        Returns how many of each range: all that hold nothing but the first `num_tokens` tokens,
        or none if the budget of mappings is spent.
        """
        counts = self.geometry.whole_pages_per_range(num_tokens)
        try:
            with ExitStack() as undo:
                for index, count in enumerate(counts):
                    pages = source.pages[index][:count]
                    self._attach(target, index, pages)
                    self.pool.retain(pages)
                    self._add(target, index, pages)
                    undo.callback(self._drop, target, index, 0)
                undo.pop_all()
        except OutOfMappings:
            return (0,) * len(counts)
        if source.segment is not None:
            shared = (page for pages in target.pages for page in pages)
            if any(segment_of(page) == source.segment for page in shared):
                source.segment = None
        return counts

    def attach_file(self, slot: Slot, fd: int, offsets: Sequence[int]) -> tuple[int, ...]:
        """Let the whole pages of the tokens of `slot`, which has none yet, be pages of a file.

        The bytes of range `r` begin at `offsets[r]`. Returns how many pages of each range they are.
        All or nothing.
        """
        counts = self.geometry.whole_pages_per_range(slot.num_tokens)
        with ExitStack() as undo:
            for index, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
                if count:
                    pages = self.pool.attach_file(fd, offset, count)
                    try:
                        self._attach(slot, index, pages)
                    except BaseException:
                        self.pool.release(pages)
                        raise
                    self._add(slot, index, pages)
                    undo.callback(self._drop, slot, index, 0)
            undo.pop_all()
        self._note_ready(slot)
        return counts

    def _shared_tail(self, slot: Slot, targets: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Shared pages, (range, position), that growing to `targets` pages would write to.

        Pages before the one that the next token goes to are full. Behind it lies what a
        truncation left: it keeps whole tiles, and a fork may hold any of their pages.
        """
        boundary = self.geometry.whole_pages_per_range(slot.num_tokens)
        for index, pages in enumerate(slot.pages):
            for position in range(boundary[index], min(targets[index], len(pages))):
                if self.is_shared(pages[position]):
                    yield index, position

    def is_shared(self, page: Page) -> bool:
        """True of a page that several slots have, or a file."""
        return self.pool.references(page) > 1

    def _own(self, slot: Slot, range_index: int, position: int, undo: ExitStack) -> Page:
        """Replace a shared page by a copy; returns the shared one, whose reference is kept."""
        shared = slot.pages[range_index][position]
        named = self._names(slot, [(range_index, position, 1)])
        (page,) = self.pool.commit(slot.reservation, 1, named)
        try:
            self._replace(slot, range_index, position, page)
        except BaseException:
            self.pool.restore(slot.reservation, [page], UNKNOWN)
            raise
        self._put(slot, range_index, position, page)
        undo.callback(self._disown, slot, range_index, position, shared)
        return shared

    def _disown(self, slot: Slot, range_index: int, position: int, shared: Page) -> None:
        """Undo an `_own`."""
        page = slot.pages[range_index][position]
        self._exchange(slot, range_index, position, shared)
        self._put(slot, range_index, position, shared)
        self.pool.restore(slot.reservation, [page], slot.owner)

    # -- shrinking -------------------------------------------------------------------------

    def shrink(self, slot: Slot, num_tokens: int, keep: Sequence[int]) -> None:
        """Cut `slot` to `num_tokens` tokens and to the first `keep[r]` pages of each range.

        The tokens go first: if the driver refuses to take a page away (DriverError), the slot
        is left with pages to spare, and may be shrunk again.
        """
        slot.num_tokens = slot.ready_tokens = num_tokens
        try:
            if self._comes_to_rest(slot, keep):
                for index, count in enumerate(keep):
                    self._drop(slot, index, count)
        finally:
            self.ledger.settle(slot)  # last, since pages that went have no use to change
        self._note_ready(slot)

    def tighten(self, slot: Slot) -> None:
        """Unmap all behind the tokens of `slot`; what it was promised, it still is."""
        held = max(slot.num_tokens, slot.pinned_tokens)
        promised = self.geometry.pages_per_range(max(held, slot.promised_tokens))
        self.shrink(slot, slot.num_tokens, promised)
        needed = self.geometry.pages_per_range(held)
        try:
            self._comes_to_rest(slot, needed)
            for index, keep in enumerate(needed):
                cut = self._cut(slot, index, keep)
                shared = [page for page in cut if self.is_shared(page)]  # promised a copy of
                self.pool.release(shared, slot.owner)
                spare = [page for page in cut if page not in shared]
                self.pool.restore(slot.reservation, spare, slot.owner)
        finally:
            self._note_ready(slot)

    def _comes_to_rest(self, slot: Slot, keep: Sequence[int]) -> bool:
        """Whether `slot` has more pages than these. If so, no work that was launched still touches
        them; a parked slot knows its last."""
        if all(len(pages) <= count for pages, count in zip(slot.pages, keep, strict=True)):
            return False
        (slot.fence or self.pool.driver.record_fence()).wait()
        return True

    def clear_for(self, owner: Owner, slot: Slot, num_tokens: int) -> None:
        """Clear all that a parked `slot` has behind its tokens, if `owner`, who takes it over, must
        not see it. What is of no use for `num_tokens` tokens goes back, uncleared."""
        if self.pool.hides(slot.owner, owner):
            counts = zip(self.geometry.pages_per_range(num_tokens), slot.pages, strict=True)
            self.shrink(slot, slot.num_tokens, [min(count, len(pages)) for count, pages in counts])
            self._clear_behind(slot, slot.num_tokens)

    def _drop(self, slot: Slot, range_index: int, keep: int) -> None:
        self.pool.release(self._cut(slot, range_index, keep), slot.owner)

    def _cut(self, slot: Slot, range_index: int, keep: int) -> list[Page]:
        """Detach and return all but the first `keep` pages of a range."""
        leaving = slot.pages[range_index][keep:]
        if leaving:
            self._detach(slot, range_index, keep)
            self.ledger.detach(slot, range_index, keep, leaving)
            del slot.pages[range_index][keep:]
        return leaving

    def _add(self, slot: Slot, range_index: int, pages: Sequence[Page]) -> None:
        """List `pages`, which were attached, behind those of a range."""
        self.ledger.attach(slot, range_index, len(slot.pages[range_index]), pages)
        slot.pages[range_index].extend(pages)

    def _put(self, slot: Slot, range_index: int, position: int, page: Page) -> None:
        """List `page`, which is there now, in place of another."""
        self.ledger.detach(slot, range_index, position, [slot.pages[range_index][position]])
        self.ledger.attach(slot, range_index, position, [page])
        slot.pages[range_index][position] = page

    def _note_ready(self, slot: Slot) -> None:
        """Note how far `slot` may grow before it needs this class again."""
        counts = [len(pages) for pages in slot.pages]
        slot.ready_tokens = min(self.geometry.tokens_backed(counts), self.geometry.max_len)
        if any(self._shared_tail(slot, counts)):
            slot.ready_tokens = slot.num_tokens

    def _names(
        self, slot: Slot, stretches: Iterable[tuple[int, int, int]]
    ) -> Sequence[Page] | None:
        """The very pages that `slot` must have, if it does not take any: of each stretch, which is
        (range, first position, how many)."""
        return None

    # -- what a kind of memory supplies ------------------------------------------------------

    @abstractmethod
    def allocate(self, num_slots: int) -> None:
        """Set aside where the slots will be; called once, before all else. All or nothing."""

    @abstractmethod
    def copy(self, source: Slot, target: Slot, skip: Sequence[int]) -> None:
        """Copy what the tokens of `target` have in `source` behind the first `skip[r]` pages."""

    @abstractmethod
    def spans(self, slot: Slot, start: int, stop: int) -> list[list[torch.Tensor]]:
        """The bytes of tokens `start … stop`, uint8: of each stream of the token format, in pieces.

        The pieces of a stream, in order, are those tokens. Writing to one writes to the slot.
        """

    @abstractmethod
    def free(self) -> None:
        """Give the address space back. No slot has a page any more."""

    @abstractmethod
    def check(self, slots: Sequence[Slot]) -> None:
        """Compare the slots' pages with what the memory really shows."""

    @abstractmethod
    def _attach(self, slot: Slot, range_index: int, pages: Sequence[Page]) -> None:
        """Make `pages` follow those that back the range already. All or nothing."""

    @abstractmethod
    def _detach(self, slot: Slot, range_index: int, keep: int) -> None:
        """Take all but the first `keep` pages of the range away from it. All or nothing."""

    @abstractmethod
    def _exchange(self, slot: Slot, range_index: int, position: int, page: Page) -> None:
        """Put `page`, as it is, where another page of the range is. All or nothing."""

    @abstractmethod
    def _replace(self, slot: Slot, range_index: int, position: int, page: Page) -> None:
        """Exchange, and copy what the page there holds of the slot's tokens. All or nothing.

        It is the page that the next token goes to, or one behind it.
        """

    @abstractmethod
    def _clear_pages(self, slot: Slot, range_index: int, first: int) -> None:
        """Zero the pages of a range from position `first` on."""

    @abstractmethod
    def _clear_behind(self, slot: Slot, num_tokens: int) -> None:
        """Zero what the slot has behind its first `num_tokens` tokens."""
