"""Contiguous KV slots over virtual memory."""

from collections.abc import Sequence

import torch

from ..vmem import Page, VmemDriver
from ..vmem.errors import InvalidConfig
from .layout import KVLayout, TensorGeometry
from .page_pool import PagePool
from .slot import Slot
from .slot_cache import SlotCache


class KVCache(SlotCache):
    """Gives each request a contiguous slot and keeps its tokens backed.

    The address space of all slots is reserved at once; physical pages follow the tokens. Kernels
    see ordinary strided tensors, `layer(i)`, of which only the rows that were grown may be
    touched.

    Args:
        layout: geometry of a slot; its page size must be the driver's.
        pool: where the pages come from.
        num_slots: requests that can be open or parked at once.
        max_parked: parked slots kept; half of the slots by default.

    Raises InvalidConfig if the pool cannot hold a single row.

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
        parked = num_slots // 2 if max_parked is None else max_parked
        super().__init__(layout, pool, num_slots=num_slots, max_parked=parked)
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
                f"a pool of {pool.limit_pages} pages cannot hold one row of {layout.num_ranges}; "
                f"give it at least {layout.row_bytes} bytes, or smaller pages"
            )
        self.layout = layout
        self._driver = driver
        self._page_bytes = layout.page_bytes
        # One page more than the slots need: where a shared page is copied to before it is swapped.
        self._slots_bytes = layout.slot_bytes * num_slots
        self._address = driver.reserve(self._slots_bytes + self._page_bytes)
        self._scratch = self._address + self._slots_bytes
        self._views = [
            (
                self._view(layout.key_geometry(index)),
                self._view(layout.value_geometry(index)),
            )
            for index in range(len(layout.layers))
        ]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, [num_slots, max_len, num_kv_heads, head_dim], strided.

        Row `slot.index` is a slot; its first `slot.num_tokens` tokens may be touched, anything
        beyond faults.
        """
        return self._views[index]

    def locate(
        self, slots: Sequence[Slot], starts: Sequence[int], counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.tensor([slot.index for slot in slots])
        return rows.repeat_interleave(torch.tensor(counts)), flat_positions(starts, counts)

    def block_tables(self, slots: Sequence[Slot]) -> torch.Tensor | None:
        return None

    @property
    def virtual_bytes(self) -> int:
        return self._slots_bytes

    def _view(self, geometry: TensorGeometry) -> torch.Tensor:
        return self._driver.tensor(
            self._address + geometry.offset_bytes,
            (self.num_slots, self.layout.capacity_tokens, geometry.num_heads, geometry.head_dim),
            (geometry.slot_stride, geometry.token_stride, geometry.head_dim, 1),
            self.layout.dtype,
        )

    def _range_address(self, slot: Slot, range_index: int) -> int:
        offset = self.layout.ranges[range_index].offset
        return self._address + slot.index * self.layout.slot_bytes + offset

    def _bytes(self, address: int, size: int) -> torch.Tensor:
        return self._driver.tensor(address, (size,), (1,), torch.uint8)

    # -- how pages become part of a slot -----------------------------------------------------

    def _attach(self, slot: Slot, range_index: int, pages: Sequence[Page]) -> None:
        offset = len(slot.pages[range_index]) * self._page_bytes
        self._driver.map(self._range_address(slot, range_index) + offset, pages)

    def _detach(self, slot: Slot, range_index: int, keep: int) -> None:
        count = len(slot.pages[range_index]) - keep
        if count:
            address = self._range_address(slot, range_index) + keep * self._page_bytes
            self._driver.unmap(address, count * self._page_bytes)

    def _zero(self, slot: Slot, range_index: int, start: int, stop: int | None) -> None:
        end = len(slot.pages[range_index]) * self._page_bytes if stop is None else stop
        if end > start:
            self._bytes(self._range_address(slot, range_index) + start, end - start).zero_()

    def _copy(self, source: Slot, target: Slot, skip: Sequence[int], num_tokens: int) -> None:
        for index, geometry in enumerate(self.layout.ranges):
            start = skip[index] * self._page_bytes
            size = num_tokens * geometry.token_bytes - start
            if size > 0:
                self._bytes(self._range_address(target, index) + start, size).copy_(
                    self._bytes(self._range_address(source, index) + start, size)
                )

    def _replace(self, slot: Slot, range_index: int, page_index: int, used_bytes: int) -> None:
        address = self._range_address(slot, range_index) + page_index * self._page_bytes
        shared = slot.pages[range_index][page_index]
        (page,) = self.pool.commit(slot.reservation, 1)
        try:
            self._driver.map(self._scratch, [page])
            if self.pool.needs_zero([page]):
                self._bytes(self._scratch, self._page_bytes).zero_()
            if used_bytes:
                self._bytes(self._scratch, used_bytes).copy_(self._bytes(address, used_bytes))
            self._driver.record_fence().wait()
            self._driver.unmap(self._scratch, self._page_bytes)
            self._driver.unmap(address, self._page_bytes)
            try:
                self._driver.map(address, [page])
            except BaseException:
                self._driver.map(address, [shared])
                raise
        except BaseException:
            if self._driver.page_at(self._scratch) is not None:
                self._driver.unmap(self._scratch, self._page_bytes)
            self.pool.restore(slot.reservation, [page])
            raise
        slot.pages[range_index][page_index] = page
        self.pool.release([shared])

    def _used_bytes(self, slot: Slot, range_index: int, page_index: int) -> int:
        used = slot.num_tokens * self.layout.ranges[range_index].token_bytes
        return min(max(used - page_index * self._page_bytes, 0), self._page_bytes)

    def _free_address_space(self) -> None:
        self._views = []
        self._driver.free(self._address)

    def _check_backing(self, slots: Sequence[Slot]) -> None:
        expected = {
            self._range_address(slot, index) + position * self._page_bytes: page
            for slot in slots
            for index, pages in enumerate(slot.pages)
            for position, page in enumerate(pages)
        }
        mapped = self._driver.mapped(self._address, self._slots_bytes + self._page_bytes)
        assert mapped == expected, "the driver's page table differs from the slots' pages"


def flat_positions(starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """int64: `start, start + 1, …` for each sequence, one after the other."""
    lengths = torch.tensor(counts)
    before = lengths.cumsum(0) - lengths
    shift = (torch.tensor(starts) - before).repeat_interleave(lengths)
    return torch.arange(int(lengths.sum())) + shift
