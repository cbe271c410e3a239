"""Contiguous KV slots over virtual memory."""

from collections.abc import Sequence

import torch

from .layout import KVLayout
from .movable_slots import MovableSlots
from .page_pool import PagePool
from .slot import Slot
from .slot_cache import SlotCache
from .virtual_slots import VirtualSlots


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
        movable: give every slot pages that can be handed to the cache of another process (`loans`).
            On the host each slot with pages then takes a file descriptor, and pages that a slot
            gives back serve no other without being made anew.

    Raises InvalidConfig if the pool cannot hold one page of every range, or if `movable` slots are
    more than the process may have files.

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
        self,
        layout: KVLayout,
        pool: PagePool,
        *,
        num_slots: int,
        max_parked: int | None = None,
        movable: bool = False,
    ) -> None:
        self._slots = (MovableSlots if movable else VirtualSlots)(layout, pool)
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


def flat_rows(rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """int64: each row as often as its sequence has tokens."""
    return rows.repeat_interleave(torch.tensor(counts, dtype=torch.int64))


def flat_positions(starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """int64: `start, start + 1, …` for each sequence, one after the other."""
    lengths = torch.tensor(counts, dtype=torch.int64)
    before = lengths.cumsum(0) - lengths
    shift = flat_rows(torch.tensor(starts, dtype=torch.int64) - before, counts)
    return torch.arange(int(lengths.sum())) + shift
