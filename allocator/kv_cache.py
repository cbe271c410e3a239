"""Contiguous KV slots over virtual memory."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from ..vmem import Page, VmemDriver
from ..vmem.errors import InvalidConfig
from .backing import Backing
from .layout import KVLayout, TensorGeometry
from .page_pool import PagePool
from .slot import Slot
from .slot_cache import SlotCache


class KVCache(SlotCache):
    """Gives each request a contiguous slot and keeps its tokens backed.

    The address space of all slots is reserved at once; physical pages follow the tokens. Kernels
    see ordinary strided tensors, `layer(i)`, of which only the tokens that were grown may be
    touched.

    Args:
        layout: geometry of a slot; its page size must be the driver's.
        pool: where the pages come from; may be shared with other caches of the same driver.
        num_slots: requests that can be open or parked at once.
        max_parked: parked slots kept; half of the slots by default.

    Raises InvalidConfig if the pool cannot hold one page of every range.

    Example:
        >>> driver = open_driver("cpu", page_bytes=64 * 1024)
        >>> layer = LayerGeometry(num_kv_heads=2, key_dim=64, value_dim=64)
        >>> layout = KVLayout((layer,) * 4, torch.float32, max_len=4096, page_bytes=64 * 1024)
        >>> with KVCache(layout, PagePool(driver, 1 << 30), num_slots=8) as cache:
        ...     slot = cache.open()
        ...     cache.grow(slot, 100)
        ...     keys, values = cache.layer(0)
        ...     keys[slot.index, :100].shape
        torch.Size([100, 2, 64])
    """

    def __init__(
        self, layout: KVLayout, pool: PagePool, *, num_slots: int, max_parked: int | None = None
    ) -> None:
        self._slots = VirtualSlots(layout, pool)
        super().__init__(self._slots, num_slots=num_slots, max_parked=max_parked)
        self.layout = layout

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, [num_slots, tokens, num_kv_heads, head_dim], strided.

        Index `slot.index` is a slot; its first `slot.num_tokens` tokens may be touched, and read
        up to the next multiple of the layout's `over_read_tokens`. Beyond, it may fault. `tokens`
        is `max_len`, rounded up to that.
        """
        self._owner.check()
        return self._slots.views[index]

    def locate(
        self, slots: Sequence[Slot], starts: Sequence[int], counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._owner.check()
        rows = torch.tensor([slot.index for slot in slots], dtype=torch.int64)
        return flat_rows(rows, counts), flat_positions(starts, counts)

    def block_tables(self, slots: Sequence[Slot]) -> torch.Tensor | None:
        self._owner.check()
        return None

    @property
    def virtual_bytes(self) -> int:
        return self._slots.num_bytes


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
        if self.pool.needs_zero([page]):
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


def flat_rows(rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """int64: each row as often as its sequence has tokens."""
    return rows.repeat_interleave(torch.tensor(counts, dtype=torch.int64))


def flat_positions(starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """int64: `start, start + 1, …` for each sequence, one after the other."""
    lengths = torch.tensor(counts, dtype=torch.int64)
    before = lengths.cumsum(0) - lengths
    shift = flat_rows(torch.tensor(starts, dtype=torch.int64) - before, counts)
    return torch.arange(int(lengths.sum())) + shift
