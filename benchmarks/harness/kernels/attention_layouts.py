"""The layouts of slots that `vkv bench attention` compares."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...vmem.errors import InvalidConfig

if TYPE_CHECKING:
    import torch

    from ...allocator import SlotCache

DEFAULT = "1,1-split,all"


@dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """How the layers of a slot share its ranges; see `KVLayout`.

    Attributes:
        head_major: every KV head has a slot of its own, one layer a range: each head's tokens lie
            side by side, not each token's heads. No cache of vkv's engine is laid out so.
    """

    layers_per_range: int | None = None
    split_kv: bool = False
    head_major: bool = False

    def __str__(self) -> str:
        if self.head_major:
            return "head-major"
        layers = "all" if self.layers_per_range is None else self.layers_per_range
        return f"g={layers}, split K/V" if self.split_kv else f"g={layers}"


def slot_layouts(listed: Sequence[str]) -> tuple[SlotLayout, ...]:
    """Layouts by layers a range, such as "2" or "all", with "-split" for keys and values apart.

    Or "head-major". One named twice is there once. Raises InvalidConfig for other words, and for
    none.
    """
    if not listed:
        raise InvalidConfig(f"layers per range are missing; give some, such as {DEFAULT}")
    return tuple(dict.fromkeys(_layout(text) for text in listed))


class HeadMajor:
    """Slots of one KV head each, seen as slots of all: [slots, tokens, heads, dim], strided."""

    def __init__(self, cache: "SlotCache", num_heads: int) -> None:
        self._cache = cache
        self._num_heads = num_heads

    def layer(self, index: int) -> "tuple[torch.Tensor, torch.Tensor]":
        keys, values = self._cache.layer(index)
        return self._seen(keys), self._seen(values)

    def _seen(self, lanes: "torch.Tensor") -> "torch.Tensor":
        return lanes.squeeze(2).unflatten(0, (-1, self._num_heads)).transpose(1, 2)


def _layout(text: str) -> SlotLayout:
    if text == "head-major":
        return SlotLayout(layers_per_range=1, head_major=True)
    parts = re.fullmatch(r"(0*[1-9]\d*|all)(-split)?", text)
    if parts is None:
        raise InvalidConfig(
            f"layers per range are {text!r}; write a number or all, -split after it for keys and "
            f"values apart, or head-major, such as {DEFAULT}"
        )
    layers, split = parts.groups()
    return SlotLayout(
        layers_per_range=None if layers == "all" else int(layers), split_kv=split is not None
    )
