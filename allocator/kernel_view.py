"""What kernels, models and schedulers see of a cache: tensors, and where in them tokens are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from .layout import PageGeometry
from .slot import Slot


class KernelView(ABC):
    """The geometry of a cache and its memory as tensors, whoever manages the slots."""

    def __init__(self, geometry: PageGeometry) -> None:
        self._geometry = geometry

    @property
    def geometry(self) -> PageGeometry:
        """The arithmetic of its slots, which other processes may have, too."""
        return self._geometry

    @property
    def max_len(self) -> int:
        """Tokens that a slot can hold."""
        return self._geometry.max_len

    @property
    def growth_tokens(self) -> int:
        """Tokens that one page of every range covers."""
        return self._geometry.growth_tokens

    def num_pages(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one slot need."""
        return sum(self._geometry.pages_per_range(num_tokens))

    def num_whole_pages(self, num_tokens: int) -> int:
        """Pages that hold nothing but the first `num_tokens` tokens: what a fork shares."""
        return sum(self._geometry.whole_pages_per_range(num_tokens))

    @property
    @abstractmethod
    def virtual_bytes(self) -> int:
        """Address space that the cache reserves."""

    @abstractmethod
    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer over the whole cache.

        Contiguous: [slots, tokens, kv_heads, head_dim]. Paged: [blocks, tokens, …] of a block.
        """

    @abstractmethod
    def locate(
        self, slots: Sequence[Slot], starts: Sequence[int], counts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where tokens `start … start + count` of each slot lie: (slot or block, position), int64.

        Flat over all slots, in order; indices into the first two dimensions of `layer`.
        """

    @abstractmethod
    def block_tables(self, slots: Sequence[Slot]) -> torch.Tensor | None:
        """int32 [num_slots, max_blocks] of a paged cache, None of a contiguous one."""
