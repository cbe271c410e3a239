"""Slots over virtual memory: side by side in one reservation, with pages mapped behind them."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from ..vmem import Page, VmemDriver
from ..vmem.errors import InvalidConfig
from .backing import Backing
from .layout import KVLayout, TensorGeometry
from .page_pool import PagePool
from .slot import Slot


class VirtualSlots(Backing):
    """Slots side by side in one reservation; a page is part of one by being mapped there."""

    def __init__(self, layout: KVLayout, pool: PagePool) -> None:
        super().__init__(layout, pool)
        driver = pool.driver
        if not isinstance(driver, VmemDriver):
            raise InvalidConfig(f"the pool's pages come from {driver!r}, not from a VmemDriver")
        if driver.page_bytes != layout.page_bytes:
            raise InvalidConfig(
                f"the layout's pages are {layout.page_bytes} bytes, the driver's "
                f"{driver.page_bytes}; use one page size"
            )
        if pool.limit_pages < layout.num_ranges:
            raise InvalidConfig(
                f"a pool of {pool.limit_pages} pages cannot hold one of each of "
                f"{layout.num_ranges} ranges; give it at least {layout.growth_bytes} bytes, or "
                "smaller pages"
            )
        self._layout = layout
        self._driver = driver
        self._page_bytes = layout.page_bytes
        self._address = 0
        self.num_bytes = 0
        self.views: list[tuple[torch.Tensor, torch.Tensor]] = []

    def allocate(self, num_slots: int) -> None:
        layout = self._layout
        self.num_bytes = layout.slot_bytes * num_slots
        self._address = self._driver.reserve(self.num_bytes)
        with ExitStack() as undo:
            undo.callback(self.free)
            self.views = [
                (
                    self._view(layout.key_geometry(index), num_slots),
                    self._view(layout.value_geometry(index), num_slots),
                )
                for index in range(len(layout.layers))
            ]
            undo.pop_all()

    def _view(self, geometry: TensorGeometry, num_slots: int) -> torch.Tensor:
        return self._driver.tensor(
            self._address + geometry.offset_bytes,
            (num_slots, self._layout.capacity_tokens, geometry.num_heads, geometry.head_dim),
            (geometry.slot_stride, geometry.token_stride, geometry.head_dim, 1),
            self._layout.dtype,
        )

    def _range_address(self, slot: Slot, range_index: int) -> int:
        offset = self._layout.ranges[range_index].offset
        return self._address + slot.index * self._layout.slot_bytes + offset

    def _bytes(self, slot: Slot, range_index: int, start: int, stop: int) -> torch.Tensor:
        """Bytes `start … stop` of a range."""
        address = self._range_address(slot, range_index) + start
        return self._driver.tensor(address, (max(0, stop - start),), (1,), torch.uint8)

    # -- how a page becomes part of a slot ---------------------------------------------------

    def _attach(self, slot: Slot, range_index: int, pages: Sequence[Page]) -> None:
        offset = len(slot.pages[range_index]) * self._page_bytes
        self._driver.map(self._range_address(slot, range_index) + offset, pages)

    def _detach(self, slot: Slot, range_index: int, keep: int) -> None:
        address = self._range_address(slot, range_index) + keep * self._page_bytes
        count = len(slot.pages[range_index]) - keep
        self._driver.unmap(address, count * self._page_bytes)

    def _exchange(self, slot: Slot, range_index: int, position: int, page: Page) -> None:
        address = self._range_address(slot, range_index) + position * self._page_bytes
        self._driver.record_fence().wait()
        self._driver.exchange(address, page)

    def _replace(self, slot: Slot, range_index: int, position: int, page: Page) -> None:
        start = position * self._page_bytes
        used = slot.num_tokens * self._layout.ranges[range_index].token_bytes  # no page beyond
        content = self._bytes(slot, range_index, start, used).clone()
        self._exchange(slot, range_index, position, page)
        if self.pool.needs_zero([page], slot.owner):
            self._bytes(slot, range_index, start, start + self._page_bytes).zero_()
        self._bytes(slot, range_index, start, used).copy_(content)

    # -- contents ----------------------------------------------------------------------------

    def copy(self, source: Slot, target: Slot, skip: Sequence[int]) -> None:
        for index, geometry in enumerate(self._layout.ranges):
            span = skip[index] * self._page_bytes, target.num_tokens * geometry.token_bytes
            self._bytes(target, index, *span).copy_(self._bytes(source, index, *span))

    def spans(self, slot: Slot, start: int, stop: int) -> list[list[torch.Tensor]]:
        return [
            [self._bytes(slot, index, start * geometry.token_bytes, stop * geometry.token_bytes)]
            for index, geometry in enumerate(self._layout.ranges)
        ]

    def _clear_pages(self, slot: Slot, range_index: int, first: int) -> None:
        end = len(slot.pages[range_index]) * self._page_bytes
        self._bytes(slot, range_index, first * self._page_bytes, end).zero_()

    def _clear_behind(self, slot: Slot, num_tokens: int) -> None:
        for index, geometry in enumerate(self._layout.ranges):
            end = len(slot.pages[index]) * self._page_bytes
            self._bytes(slot, index, num_tokens * geometry.token_bytes, end).zero_()

    # -- end and proof -----------------------------------------------------------------------

    def free(self) -> None:
        self.views = []
        self._driver.free(self._address)

    def check(self, slots: Sequence[Slot]) -> None:
        expected = {
            self._range_address(slot, index) + position * self._page_bytes: page
            for slot in slots
            for index, pages in enumerate(slot.pages)
            for position, page in enumerate(pages)
        }
        mapped = self._driver.mapped(self._address, self.num_bytes)
        assert mapped == expected, "the driver's page table differs from the slots' pages"
