"""The problems of `vkv bench attention`: how many sequences, how long, how many heads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...vmem.errors import InvalidConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One problem: `batch` sequences of `context` tokens, of which the last `queries` are asked."""

    batch: int
    context: int
    queries: int = 1
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 64

    def __str__(self) -> str:
        kind = "decode" if self.queries == 1 else f"chunk of {self.queries}"
        heads = f"{self.num_heads}:{self.num_kv_heads}x{self.head_dim}"
        return f"{kind}, {self.batch} x {self.context:,}, {heads}"

    def kv_bytes(self, dtype: "torch.dtype") -> int:
        """Keys and values of a layer."""
        return 2 * self.batch * self.context * self.num_kv_heads * self.head_dim * dtype.itemsize

    @property
    def flops(self) -> int:
        """Of both products of a layer, causally; two operations a multiply-add."""
        keys_seen = self.queries * self.context - self.queries * (self.queries - 1) // 2
        return 4 * self.batch * self.num_heads * self.head_dim * keys_seen


def default_shapes(batches: Sequence[int], contexts: Sequence[int], chunk: int) -> list[Shape]:
    """Decodes of each batch and context, one of each other head counts, and prompt chunks."""
    small = Shape(batch=1, context=1)
    shapes = _decodes(small, batches, contexts)
    middle = sorted(contexts)[len(contexts) // 2]
    for heads, kv_heads, dim in ((32, 8, 128), (32, 4, 128), (8, 8, 64)):
        shapes.append(
            Shape(batch=1, context=middle, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
        )
    return shapes + _chunks(small, contexts, chunk)


def shapes_of_heads(
    heads: str, batches: Sequence[int], contexts: Sequence[int], chunk: int
) -> list[Shape]:
    """Decodes of each batch and context, and prompt chunks if `chunk` is not 0.

    Args:
        heads: query heads, KV heads and their size, such as "32:8x128".
    """
    parts = re.fullmatch(r"(\d+):(\d+)x(\d+)", heads)
    if parts is None:
        raise InvalidConfig(f"heads are {heads!r}; write query heads:KV heads x size: 32:8x128")
    num_heads, num_kv_heads, head_dim = map(int, parts.groups())
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise InvalidConfig(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    one = Shape(
        batch=1, context=1, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    return _decodes(one, batches, contexts) + (_chunks(one, contexts, chunk) if chunk else [])


def _decodes(one: Shape, batches: Sequence[int], contexts: Sequence[int]) -> list[Shape]:
    return [replace(one, batch=b, context=c) for c in contexts for b in batches]


def _chunks(one: Shape, contexts: Sequence[int], chunk: int) -> list[Shape]:
    return [replace(one, context=c, queries=chunk) for c in contexts if c >= chunk]
