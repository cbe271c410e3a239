"""The paged baseline: blocks of one flat pool, reached through block tables.

It shares every line of the slots' life with the contiguous cache, so that a comparison measures
paging and nothing else. As in PagedAttention, the pool is allocated whole at the start and a
request's blocks lie anywhere in it: the free list is shuffled.

Source: PagedAttention, arXiv:2309.06180, section 4.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..vmem import Fence, Page
from ..vmem.errors import InvalidConfig, OutOfPages
from .kv_cache import flat_positions
from .layout import LayerGeometry
from .page_pool import PagePool, Sanitize
from .slot import Slot
from .slot_cache import SlotCache


@dataclass(frozen=True)
class PagedLayout:
    """Geometry of a paged cache: one range of blocks, each of `block_tokens` tokens."""

    layers: tuple[LayerGeometry, ...]
    dtype: torch.dtype
    max_len: int
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.max_len < 1 or not self.layers:
            raise InvalidConfig(
                f"block_tokens {self.block_tokens}, max_len {self.max_len} and "
                f"{len(self.layers)} layers must all be at least 1"
            )

    @property
    def num_ranges(self) -> int:
        return 1

    @property
    def row_tokens(self) -> int:
        return self.block_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        heads = sum(g.num_kv_heads * (g.key_dim + g.value_dim) for g in self.layers)
        return heads * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.block_tokens * self.token_bytes

    def pages_per_range(self, num_tokens: int) -> tuple[int, ...]:
        return (-(-num_tokens // self.block_tokens),)

    def whole_pages_per_range(self, num_tokens: int) -> tuple[int, ...]:
        return (num_tokens // self.block_tokens,)

    def tokens_backed(self, pages: Sequence[int]) -> int:
        return pages[0] * self.block_tokens

    def num_pages(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return self.pages_per_range(num_tokens)[0]


class _NoFence:
    def wait(self) -> None:
        """Blocks are never unmapped, so nothing needs waiting for."""


class BlockSource:
    """Numbers the blocks of a preallocated pool; the paged cache's stand-in for a driver."""

    def __init__(self, layout: PagedLayout, num_blocks: int) -> None:
        self.page_bytes = layout.page_bytes
        self.counters: Counter[str] = Counter()
        self._unused = list(range(num_blocks - 1, -1, -1))

    @property
    def num_mappings(self) -> int:
        return 0

    def create(self, num_pages: int) -> list[Page]:
        if num_pages > len(self._unused):
            raise OutOfPages(f"{num_pages} blocks asked, {len(self._unused)} left")
        return [Page(self._unused.pop()) for _ in range(num_pages)]

    def release(self, pages: Sequence[Page]) -> None:
        self._unused.extend(pages)

    def record_fence(self) -> Fence:
        return _NoFence()


class PagedKVCache(SlotCache):
    """A paged KV cache with the interface of `KVCache`.

    Args:
        layout: geometry of the blocks.
        limit_bytes: size of the pool, allocated at once.
        num_slots, max_parked: as in `KVCache`.
        device: where the pool is.
        sanitize: "zero" clears a recycled block before its next owner sees it.
        seed: of the shuffle of the blocks.
    """

    def __init__(
        self,
        layout: PagedLayout,
        limit_bytes: int,
        *,
        num_slots: int,
        max_parked: int | None = None,
        device: torch.device | str = "cpu",
        sanitize: Sanitize = "never",
        seed: int = 0,
    ) -> None:
        num_blocks = limit_bytes // layout.page_bytes
        pool = PagePool(BlockSource(layout, num_blocks), limit_bytes, sanitize=sanitize)
        parked = num_slots // 2 if max_parked is None else max_parked
        super().__init__(layout, pool, num_slots=num_slots, max_parked=parked)
        self.layout = layout
        self._views = [
            tuple(
                torch.zeros(
                    num_blocks,
                    layout.block_tokens,
                    geometry.num_kv_heads,
                    head_dim,
                    dtype=layout.dtype,
                    device=device,
                )
                for head_dim in (geometry.key_dim, geometry.value_dim)
            )
            for geometry in layout.layers
        ]
        self._pool_bytes = num_blocks * layout.page_bytes
        # Page `p` of the pool is block `_blocks[p]`: whatever order pages are handed out in,
        # the blocks of a request are scattered.
        self._blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        self._device = torch.device(device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, [num_blocks, block_tokens, num_kv_heads, head_dim]."""
        keys, values = self._views[index]
        return keys, values

    def locate(
        self, slots: Sequence[Slot], starts: Sequence[int], counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = flat_positions(starts, counts)
        block = self.layout.block_tokens
        pages = [
            slot.pages[0][position // block]
            for slot, start, count in zip(slots, starts, counts, strict=True)
            for position in range(start, start + count)
        ]
        return self._blocks[pages], positions % block

    def block_tables(self, slots: Sequence[Slot]) -> torch.Tensor | None:
        width = max(len(slot.pages[0]) for slot in slots)
        tables = torch.zeros(len(slots), width, dtype=torch.int32)
        for row, slot in enumerate(slots):
            tables[row, : len(slot.pages[0])] = self._blocks[slot.pages[0]]
        return tables.to(self._device)

    @property
    def virtual_bytes(self) -> int:
        return self._pool_bytes

    # -- how blocks become part of a slot: by being listed ------------------------------------

    def _attach(self, slot: Slot, range_index: int, pages: Sequence[Page]) -> None:
        pass

    def _detach(self, slot: Slot, range_index: int, keep: int) -> None:
        pass

    def _zero(self, slot: Slot, range_index: int, start: int, stop: int | None) -> None:
        first = -(-start // self.layout.page_bytes)
        blocks = self._blocks[slot.pages[0][first:]]
        inside = start % self.layout.page_bytes // self.layout.token_bytes
        for tensor in (t for views in self._views for t in views):
            tensor[blocks] = 0
            if inside:
                tensor[self._blocks[slot.pages[0][first - 1]], inside:] = 0

    def _copy(self, source: Slot, target: Slot, skip: Sequence[int], num_tokens: int) -> None:
        count = -(-num_tokens // self.layout.block_tokens)
        origin = self._blocks[source.pages[0][skip[0] : count]]
        goal = self._blocks[target.pages[0][skip[0] : count]]
        for tensor in (t for views in self._views for t in views):
            tensor[goal] = tensor[origin]
        if self.pool.sanitize == "zero":
            self._zero(target, 0, num_tokens * self.layout.token_bytes, None)

    def _replace(self, slot: Slot, range_index: int, page_index: int, used_bytes: int) -> None:
        (page,) = self.pool.commit(slot.reservation, 1)
        shared = slot.pages[0][page_index]
        for tensor in (t for views in self._views for t in views):
            tensor[self._blocks[page]] = tensor[self._blocks[shared]]
        slot.pages[0][page_index] = page
        if self.pool.sanitize == "zero":
            self._zero(slot, 0, page_index * self.layout.page_bytes + used_bytes, None)
        self.pool.release([shared])

    def _used_bytes(self, slot: Slot, range_index: int, page_index: int) -> int:
        used = slot.num_tokens * self.layout.token_bytes - page_index * self.layout.page_bytes
        return min(max(used, 0), self.layout.page_bytes)

    def _free_address_space(self) -> None:
        self._views = []

    def _check_backing(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            assert len(set(slot.pages[0])) == len(slot.pages[0]), f"{slot} lists a block twice"
