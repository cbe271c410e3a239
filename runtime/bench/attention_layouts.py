"""The layouts of slots that `vkv bench attention` compares."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...vmem.errors import InvalidConfig

DEFAULT = "1,1-split,all"


@dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """How the layers of a slot share its ranges; see `KVLayout`."""

    layers_per_range: int | None = None
    split_kv: bool = False

    def __str__(self) -> str:
        layers = "all" if self.layers_per_range is None else self.layers_per_range
        return f"g={layers}, split K/V" if self.split_kv else f"g={layers}"


def slot_layouts(listed: Sequence[str]) -> tuple[SlotLayout, ...]:
    """Layouts by layers a range, such as "2" or "all", with "-split" for keys and values apart.

    One named twice is there once. Raises InvalidConfig for other words, and for none.
    """
    if not listed:
        raise InvalidConfig(f"layers per range are missing; give some, such as {DEFAULT}")
    return tuple(dict.fromkeys(_layout(text) for text in listed))


def _layout(text: str) -> SlotLayout:
    parts = re.fullmatch(r"(0*[1-9]\d*|all)(-split)?", text)
    if parts is None:
        raise InvalidConfig(
            f"layers per range are {text!r}; write a number or all, -split after it for keys and "
            f"values apart, such as {DEFAULT}"
        )
    layers, split = parts.groups()
    return SlotLayout(
        layers_per_range=None if layers == "all" else int(layers), split_kv=split is not None
    )
