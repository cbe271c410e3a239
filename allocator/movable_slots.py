"""Slots whose pages can be handed to the cache of another process.

Each slot's pages lie in a *segment* of their own, at the place that they have in the slot. So a
segment shows whoever is given it nothing but what the slot holds, and all pages of a range take one
mapping. Once other slots share pages of a segment, it gets no more: the slot goes on in another.

A page changes hands with all others of its segment, if the slot alone has them. So others first get
copies of what they share, if that is little; if it is much, the slot's are copied instead. Where
pages are allocations of their own (GPUs), each goes by itself, with a descriptor of its own: those
for which there are too few are copied.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import groupby
from typing import NamedTuple

import torch

from ..vmem import (
    SEGMENT_PAGES,
    Page,
    PageRun,
    Segment,
    adjacent_runs,
    linux,
    page_in,
    segment_of,
)
from ..vmem.errors import InvalidConfig, InvalidOperation, Shortage, TransferError
from .layout import KVLayout
from .page_pool import UNKNOWN, PagePool
from .parcel import Parcel, Stretch
from .slot import Loan, Slot
from .virtual_slots import VirtualSlots

_RANGE_PAGES = 1 << 20  # places of a range in a segment
_OTHER_FILES = 64  # that a process has open, about


class _Share(NamedTuple):
    """Where a slot has a page that others have, too."""

    slot: Slot
    range_index: int
    position: int


class Lent(NamedTuple):
    """A parcel on the side that lends it.

    Attributes:
        parcel: what is said of it.
        descriptors: what goes with it; the caller's to close.
        copied: the bytes that are to be copied, in the order of the parcel's stretches.
        num_parted_bytes: that were copied here, for slots that shared pages which are lent now.
    """

    parcel: Parcel
    descriptors: list[int]
    copied: list[torch.Tensor]
    num_parted_bytes: int = 0


class MovableSlots(VirtualSlots):
    """`VirtualSlots` that lend pages and borrow them. Not for use from several threads at once."""

    def __init__(self, layout: KVLayout, pool: PagePool) -> None:
        super().__init__(layout, pool)
        self.has_segments = self._driver.has_segments
        self.memory_name = self._driver.memory_name

    def allocate(self, num_slots: int) -> None:
        if self.has_segments:
            if num_slots + _OTHER_FILES > linux.max_open_files():
                raise InvalidConfig(
                    f"{num_slots} movable slots take a file each, and the process may open "
                    f"{linux.max_open_files()}; raise that limit (ulimit -n) or have fewer slots"
                )
            most = max(self._layout.pages_per_range(self._layout.max_len))
            if most >= _RANGE_PAGES or self._layout.num_ranges * _RANGE_PAGES > SEGMENT_PAGES:
                raise InvalidConfig(
                    f"{self._layout.num_ranges} ranges of {most} pages are too many for a segment; "
                    f"use larger pages, so that a range has {_RANGE_PAGES} at most"
                )
        super().allocate(num_slots)

    def _names(
        self, slot: Slot, stretches: Iterable[tuple[int, int, int]]
    ) -> Sequence[Page] | None:
        if not self.has_segments:
            return None
        if slot.segment is None:
            slot.segment = self._driver.open_segment()
        return [
            page_in(slot.segment, _place(index, position))
            for index, start, count in stretches
            for position in range(start, start + count)
        ]

    # -- lending -----------------------------------------------------------------------------

    def lend(self, slot: Slot, num_tokens: int, others: Iterable[Slot]) -> Lent:
        """Let another process have the pages of the first `num_tokens` tokens of a pinned slot.

        What lies behind its tokens is unmapped or cleared. From then on the slot grows elsewhere.
        `others` are all slots that may share pages with it.
        """
        self.tighten(slot)
        bundles = self._bundles(slot)
        if self.has_segments:
            self.pool.trim_segments({Segment(b) for b in bundles if b is not None})
        num_parted_bytes = self._part(slot, bundles, others)
        sole = {p for b, pages in bundles.items() if self._is_sole(b, pages) for p in pages}
        self._clear_tails(slot, sole)
        counts = self._layout.pages_per_range(num_tokens)
        lent = [p for pages, n in zip(slot.pages, counts, strict=True) for p in pages[:n]]
        lent = [page for page in lent if page in sole]
        if not self.has_segments:
            lent = lent[: _most_descriptors()]
        staying = sole.difference(lent)
        descriptors, runs = self._driver.lend(lent, staying=[*staying])
        with ExitStack() as undo:
            for descriptor in descriptors:
                undo.callback(os.close, descriptor)
            home, homes = slot.segment, _homes(lent, runs)
            stays = any(segment_of(page) == home for page in staying)
            token_format = self._layout.token_format
            parcel = Parcel(
                page_bytes=self._page_bytes,
                dtype=token_format.dtype,
                streams=token_format.streams,
                num_tokens=num_tokens,
                num_descriptors=len(descriptors),
                stretches=tuple(self._stretches(slot, counts, {*lent}, runs)),
                growing=None if stays else next((i for i, s in homes.items() if s == home), None),
                memory=self.memory_name,
            )
            lent_slot = Lent(parcel, descriptors, self._copied(slot, parcel), num_parted_bytes)
            undo.pop_all()
        slot.loan, slot.segment = Loan(lent, home), None
        return lent_slot

    def _bundles(self, slot: Slot) -> dict[int | None, list[Page]]:
        """The pages of a slot by what they are handed over with."""
        bundles: dict[int | None, list[Page]] = {}
        for pages in slot.pages:
            for page in pages:
                bundles.setdefault(self._driver.bundle_of(page), []).append(page)
        return bundles

    def _is_sole(self, bundle: int | None, pages: Sequence[Page]) -> bool:
        """Whether a slot that has these pages of a bundle has all of it, and alone."""
        if bundle is None or self._driver.bundle_size(bundle) != len(pages):
            return False
        return all(self.pool.references(page) == 1 for page in pages)

    def _part(
        self, slot: Slot, bundles: dict[int | None, list[Page]], others: Iterable[Slot]
    ) -> int:
        """Give `others` copies of what they share with `slot`, where that is less than what would
        have to be copied of the slot for their sake. Returns the bytes that were copied.

        If memory is short they go on sharing.
        """
        mixed = {bundle for bundle, pages in bundles.items() if not self._is_sole(bundle, pages)}
        if not self.has_segments or not mixed - {None}:
            return 0
        shares: dict[Segment, dict[Page, list[_Share]]] = {}
        for other in others:
            for index, pages in enumerate(other.pages):
                for position, page in enumerate(pages):
                    segment = segment_of(page)
                    if segment is not None and segment in mixed and other is not slot:
                        share = _Share(other, index, position)
                        shares.setdefault(segment, {}).setdefault(page, []).append(share)
        num_pages = 0
        for segment, shared in shares.items():
            if len(shared) < len(bundles[segment]):
                with suppress(Shortage):
                    self._copy_apart(segment, shared)
                    num_pages += len(shared)
        return num_pages * self._page_bytes

    def _copy_apart(self, segment: Segment, shared: dict[Page, list[_Share]]) -> None:
        """Have slots go on with copies of these pages of a segment, in another one."""
        home = self._driver.open_segment()
        names = [page_in(home, page - segment) for page in shared]
        reservation = self.pool.reserve(len(shared))
        with ExitStack() as undo:
            undo.callback(self.pool.cancel, reservation)
            copies = self.pool.commit(reservation, len(shared), names)
            undo.callback(self.pool.release, copies)  # slots have references of their own
            for page, copy in zip(shared, copies, strict=True):
                self._driver.copy_page(page, copy)
            for (page, places), copy in zip(shared.items(), copies, strict=True):
                for slot, index, position in places:
                    self._exchange(slot, index, position, copy)
                    self.pool.retain([copy])
                    self._put(slot, index, position, copy)
                    self.pool.release([page])

    def _clear_tails(self, slot: Slot, pages: set[Page]) -> None:
        """Clear what earlier owners left behind the slot's tokens in those of its `pages`."""
        held = max(slot.num_tokens, slot.pinned_tokens)
        first = self._layout.whole_pages_per_range(held)
        for index, geometry in enumerate(self._layout.ranges):
            end = held * geometry.token_bytes
            for position in range(first[index], len(slot.pages[index])):
                if slot.pages[index][position] in pages:
                    start, stop = (p * self._page_bytes for p in (position, position + 1))
                    self._bytes(slot, index, max(start, end), stop).zero_()
        self._driver.record_fence().wait()

    def _stretches(
        self, slot: Slot, counts: Sequence[int], sole: set[Page], runs: Sequence[PageRun]
    ) -> Iterator[Stretch]:
        """The first `counts[r]` pages of every range, those of `sole` (which go) as they lie in
        `runs`."""
        lent = iter(runs)
        for index, count in enumerate(counts):
            position = 0
            for first, num_pages in self._runs(slot.pages[index][:count], sole):
                run = next(lent) if first in sole else PageRun(-1, 0, num_pages)
                assert run.num_pages == num_pages, "the driver has other runs"
                descriptor = run.descriptor if first in sole else None
                yield Stretch(index, position, num_pages, descriptor, run.place)
                position += num_pages

    def _runs(self, pages: Sequence[Page], sole: set[Page]) -> Iterator[tuple[Page, int]]:
        """Pages that lie in one piece behind a descriptor, or behind none: (first, how many)."""
        for is_lent, group in groupby(pages, key=sole.__contains__):
            members = list(group)
            if not is_lent:
                yield members[0], len(members)
            elif self.has_segments:
                yield from ((Page(first), count) for first, count in adjacent_runs(members))
            else:
                yield from ((page, 1) for page in members)

    def _copied(self, slot: Slot, parcel: Parcel) -> list[torch.Tensor]:
        """The bytes of what is not lent."""
        widths = self._layout.range_widths
        return [
            self._bytes(slot, s.range_index, *parcel.bytes_of(s, widths[s.range_index]))
            for s in parcel.stretches
            if s.descriptor is None
        ]

    # -- borrowing ---------------------------------------------------------------------------

    def borrow(self, slot: Slot, parcel: Parcel, descriptors: Sequence[int]) -> list[torch.Tensor]:
        """Map the pages of a parcel behind `slot`, which has none, in place of reserved ones.

        Returns the bytes that are to be copied, in the order of the parcel's stretches. All or
        nothing.
        """
        token_format = self._layout.token_format
        parcel.check(self.memory_name, self._page_bytes, token_format, len(descriptors))
        self._check_places(parcel)
        promised = max(slot.promised_tokens, parcel.num_tokens)
        coming = Counter({s.range_index: 0 for s in parcel.stretches})
        for stretch in parcel.stretches:
            coming[stretch.range_index] += stretch.num_pages
        targets = self._layout.pages_per_range(promised)
        beyond = sum(max(0, count - targets[index]) for index, count in coming.items())
        if beyond:
            self.pool.reserve(beyond, into=slot.reservation)
        try:
            self._take_in(slot, parcel, descriptors)
        finally:
            self.withdraw(slot, self.lacking(slot, slot.promised_tokens))
        return self._copied(slot, parcel)

    def _check_places(self, parcel: Parcel) -> None:
        """A page must lie where the slot will look for no other."""
        full = self._layout.pages_per_range(self._layout.max_len)
        for stretch in parcel.stretches:
            place = _place(stretch.range_index, stretch.position) if self.has_segments else 0
            if stretch.descriptor is not None and stretch.place != place:
                raise TransferError(f"{stretch} is not at its place, {place}")
            if stretch.position + stretch.num_pages > full[stretch.range_index]:
                raise InvalidOperation(f"{stretch} does not fit into a slot; copy the tokens")

    def _take_in(self, slot: Slot, parcel: Parcel, descriptors: Sequence[int]) -> None:
        runs = [
            PageRun(s.descriptor, s.place, s.num_pages)
            for s in parcel.stretches
            if s.descriptor is not None
        ]
        lent = self._driver.borrow(descriptors, runs)
        try:
            self.pool.admit(slot.reservation, lent)
        except BaseException:
            self._driver.release(lent)
            raise
        homes = _homes(lent, runs)
        with ExitStack() as undo:
            undo.callback(self._turn_out, slot, lent)
            slot.num_tokens = parcel.num_tokens  # first, or the use of every page changes once more
            self.ledger.settle(slot)
            coming = iter(lent)
            for stretch in parcel.stretches:
                if stretch.descriptor is None:
                    self._add_own(slot, stretch)
                else:
                    pages = [next(coming) for _ in range(stretch.num_pages)]
                    self._attach(slot, stretch.range_index, pages)
                    self._add(slot, stretch.range_index, pages)
            self.extend(slot, parcel.num_tokens)  # over-read may be wider here
            undo.pop_all()
        self._note_ready(slot)
        slot.loan = Loan(lent, None if parcel.growing is None else homes.get(parcel.growing))

    def _add_own(self, slot: Slot, stretch: Stretch) -> None:
        """Pages for bytes that are to be copied."""
        index, count = stretch.range_index, stretch.num_pages
        named = self._names(slot, [(index, stretch.position, count)])
        pages = self.pool.commit(slot.reservation, count, named)
        try:
            self._attach(slot, index, pages)
        except BaseException:
            self.pool.restore(slot.reservation, pages)
            raise
        self._add(slot, index, pages)
        if self.pool.needs_zero(pages, slot.owner):
            self._clear_pages(slot, index, stretch.position)

    def _turn_out(self, slot: Slot, lent: Sequence[Page]) -> None:
        """Undo what `_take_in` has done so far."""
        slot.num_tokens = slot.ready_tokens = 0
        self.ledger.settle(slot)
        attached = {page for pages in slot.pages for page in pages}
        self.pool.dismiss(slot.reservation, [page for page in lent if page not in attached])
        self._driver.record_fence().wait()
        for index in range(len(slot.pages)):
            cut = self._cut(slot, index, 0)
            borrowed = set(lent).intersection(cut)
            self.pool.dismiss(slot.reservation, [page for page in cut if page in borrowed])
            ours = [page for page in cut if page not in borrowed]
            self.pool.restore(slot.reservation, ours, UNKNOWN)

    # -- the end of a loan -------------------------------------------------------------------

    def keep(self, slot: Slot) -> None:
        """Own what was borrowed, and go on where it lies."""
        loan, slot.loan = slot.loan, None
        if loan is not None:
            held = {page for pages in slot.pages for page in pages}  # some may be given back
            self._driver.own([page for page in loan.pages if page in held])
            self.pool.own(loan.pages)
            slot.segment = slot.segment if loan.segment is None else loan.segment

    def take_back(self, slot: Slot) -> None:
        """Be the only one again who has what was lent."""
        loan, slot.loan = slot.loan, None
        if loan is not None and loan.segment is not None:
            slot.segment = loan.segment

    def leave(self, slot: Slot) -> None:
        """Let whoever borrowed pages own them. They are to be unmapped next."""
        loan, slot.loan = slot.loan, None
        if loan is not None:
            self._driver.disown(loan.pages)
            self.pool.disown(loan.pages)


def _most_descriptors() -> int:
    """How many can be on their way at once: as many more are open here or there, and the kernel
    counts them for each user."""
    return max(0, linux.max_open_files() // 2 - _OTHER_FILES)


def _place(range_index: int, position: int) -> int:
    """Where a page of a slot lies in its segment."""
    return range_index * _RANGE_PAGES + position


def _homes(pages: Sequence[Page], runs: Iterable[PageRun]) -> dict[int, Segment]:
    """Which segment lies behind each descriptor, where there are segments."""
    homes: dict[int, Segment] = {}
    start = 0
    for run in runs:
        if (segment := segment_of(pages[start])) is not None:
            homes[run.descriptor] = segment
        start += run.num_pages
    return homes
