"""The paged baseline: blocks of one flat pool, reached through block tables.

It shares every line of the slots' life with the contiguous cache, so that a comparison measures
paging and nothing else. As in PagedAttention, the pool is allocated whole at the start, and a
request's blocks lie anywhere in it: the free list is shuffled.

Source: PagedAttention, arXiv:2309.06180, section 4.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..vmem import Fence, Page
from ..vmem.errors import InvalidConfig, InvalidOperation
from .backing import Backing
from .kv_cache import flat_positions, flat_rows
from .layout import LayerGeometry, TokenFormat, split_format
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
    def range_widths(self) -> tuple[int, ...]:
        """Bytes of one token in the one range."""
        return (self.token_bytes,)

    @property
    def growth_tokens(self) -> int:
        return self.block_tokens

    @property
    def token_format(self) -> TokenFormat:
        return split_format(self.layers, self.dtype)

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


class PagedKVCache(SlotCache):
    """A paged KV cache with the interface of `KVCache`.

    Args:
        layout: geometry of the blocks.
        limit_bytes: size of the pool, allocated at once.
        num_slots: requests that can be open or parked at once.
        max_parked: parked slots kept; half of the slots by default.
        device: where the pool is.
        sanitize: as of `PagePool`.
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
        pool = BlockPool(layout.page_bytes, limit_bytes, sanitize)
        self._blocks = ScatteredBlocks(layout, pool, torch.device(device), seed)
        super().__init__(self._blocks, num_slots=num_slots, max_parked=max_parked)
        self.layout = layout

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, [num_blocks, block_tokens, num_kv_heads, head_dim]."""
        self._owner.check()
        return self._blocks.views[index]

    def locate(
        self, slots: Sequence[Slot], starts: Sequence[int], counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._owner.check()
        return self._blocks.locate(slots, starts, counts)

    def block_tables(self, slots: Sequence[Slot]) -> torch.Tensor | None:
        self._owner.check()
        width = max((len(slot.pages[0]) for slot in slots), default=0)
        tables = self._blocks.tables[[slot.index for slot in slots], :width]
        if self._blocks.device.type == "cuda":  # or the copy would wait for all that was launched
            tables = tables.pin_memory()
        return tables.to(self._blocks.device, non_blocking=True)

    @property
    def virtual_bytes(self) -> int:
        return self.pool.limit_pages * self.layout.page_bytes


class _NoFence:
    def wait(self) -> None:
        """Blocks are never unmapped, so nothing needs waiting for."""


class BlockSource:
    """Numbers the blocks of a preallocated pool; the paged cache's stand-in for a driver."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.counters: Counter[str] = Counter()
        self._numbers = itertools.count()

    @property
    def num_mappings(self) -> int:
        return 0

    def create(self, num_pages: int) -> list[Page]:
        return [Page(number) for number in itertools.islice(self._numbers, num_pages)]

    def create_in(self, pages: Sequence[Page]) -> None:
        raise InvalidOperation("blocks are numbered as they come and have no segments")

    def attach_file(self, fd: int, offset: int, num_pages: int) -> list[Page]:
        raise InvalidOperation("blocks are no pages of a file; read the file into them instead")

    def release(self, pages: Sequence[Page]) -> None:
        raise InvalidOperation("blocks are allocated at once and never given back one by one")

    def record_fence(self) -> Fence:
        return _NoFence()


class BlockPool(PagePool):
    """The free list of a preallocated pool: full from the start, and nothing leaves it."""

    def __init__(self, page_bytes: int, limit_bytes: int, sanitize: Sanitize) -> None:
        num_blocks = limit_bytes // page_bytes
        super().__init__(
            BlockSource(page_bytes), limit_bytes, low_watermark=num_blocks, sanitize=sanitize
        )
        self.refill()

    def trim(self, keep: int = 0) -> int:
        """Returns 0: no part of the pool can go back to the system."""
        return 0


class ScatteredBlocks(Backing):
    """Blocks anywhere in one tensor a layer; a page is part of a slot by being in its table."""

    def __init__(
        self, layout: PagedLayout, pool: PagePool, device: torch.device, seed: int
    ) -> None:
        super().__init__(layout, pool)
        self.device = device
        self.views: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.tables = torch.empty(0, dtype=torch.int32)
        self._layout = layout
        self._block_tokens = layout.block_tokens
        # Page `p` of the pool is block `_shuffled[p]`: whatever order pages are handed out in,
        # the blocks of a request are scattered.
        generator = torch.Generator().manual_seed(seed)
        self._shuffled = torch.randperm(pool.limit_pages, generator=generator, dtype=torch.int32)

    def allocate(self, num_slots: int) -> None:
        layout = self._layout
        self.tables = torch.zeros(num_slots, layout.num_pages(layout.max_len), dtype=torch.int32)
        self.views = [
            (self._view(g.num_kv_heads, g.key_dim), self._view(g.num_kv_heads, g.value_dim))
            for g in layout.layers
        ]

    def _view(self, num_heads: int, head_dim: int) -> torch.Tensor:
        shape = self.pool.limit_pages, self._block_tokens, num_heads, head_dim
        return torch.zeros(shape, dtype=self._layout.dtype, device=self.device)

    def locate(
        self, slots: Sequence[Slot], starts: Sequence[int], counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = flat_positions(starts, counts)
        rows = flat_rows(torch.tensor([slot.index for slot in slots], dtype=torch.int64), counts)
        blocks = self.tables[rows, positions // self._block_tokens]
        return blocks.long(), positions % self._block_tokens

    # -- how a page becomes part of a slot ---------------------------------------------------

    def _attach(self, slot: Slot, range_index: int, pages: Sequence[Page]) -> None:
        start = len(slot.pages[0])
        self.tables[slot.index, start : start + len(pages)] = self._shuffled[list(pages)]

    def _detach(self, slot: Slot, range_index: int, keep: int) -> None:
        self.tables[slot.index, keep:] = 0

    def _exchange(self, slot: Slot, range_index: int, position: int, page: Page) -> None:
        self.tables[slot.index, position] = self._shuffled[page]

    def _replace(self, slot: Slot, range_index: int, position: int, page: Page) -> None:
        old, new = int(self.tables[slot.index, position]), int(self._shuffled[page])
        used = max(0, slot.num_tokens - position * self._block_tokens)
        for tensor in self._tensors():
            tensor[new, :used] = tensor[old, :used]
            if self.pool.needs_zero([page], slot.owner):
                tensor[new, used:] = 0
        self._exchange(slot, range_index, position, page)

    # -- contents ----------------------------------------------------------------------------

    def _tensors(self) -> Iterator[torch.Tensor]:
        return itertools.chain.from_iterable(self.views)

    def copy(self, source: Slot, target: Slot, skip: Sequence[int]) -> None:
        start = skip[0] * self._block_tokens
        span = [start], [target.num_tokens - start]
        origin, goal = self.locate([source], *span), self.locate([target], *span)
        for tensor in self._tensors():
            tensor[goal] = tensor[origin]

    def spans(self, slot: Slot, start: int, stop: int) -> list[list[torch.Tensor]]:
        size = self._block_tokens
        blocks = [
            (int(self.tables[slot.index, position]), position * size)
            for position in range(start // size, -(-stop // size))
        ]
        return [
            [
                tensor[block, max(0, start - first) : stop - first].flatten().view(torch.uint8)
                for block, first in blocks
            ]
            for tensor in self._tensors()
        ]

    def _clear_pages(self, slot: Slot, range_index: int, first: int) -> None:
        self._clear_behind(slot, first * self._block_tokens)

    def _clear_behind(self, slot: Slot, num_tokens: int) -> None:
        backed = len(slot.pages[0]) * self._block_tokens
        where = self.locate([slot], [num_tokens], [backed - num_tokens])
        for tensor in self._tensors():
            tensor[where] = 0

    # -- end and proof -----------------------------------------------------------------------

    def free(self) -> None:
        self.views = []

    def check(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            listed = self.tables[slot.index, : slot.num_pages]
            expected = self._shuffled[slot.pages[0]]
            assert torch.equal(listed, expected), f"{slot} has another block table"
            assert len(set(slot.pages[0])) == slot.num_pages, f"{slot} lists a block twice"
