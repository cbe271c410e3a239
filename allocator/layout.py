"""Where every token of every layer lies: arithmetic only, no memory.

A *slot* is the virtual stretch of one request. It is made of *ranges*; a range holds, token
after token, the keys and values of a group of `layers_per_range` layers:

    slot:   | range 0                  | range 1                  | …
    range:  | token 0 | token 1 | token 2 | …            (each `token_bytes` long)
    token:  | K of layer a | V of layer a | K of layer b | V of layer b | …

With `split_kv` the keys and the values of a group get a range each. Layers that attend through
a sliding window never share a range with layers of another window, so that the tokens behind
a window can be told apart from tokens still needed.

A page is mapped at page-aligned offsets of a range. The tokens that one page of every range
covers are its *growth step*: the granularity at which a request's memory grows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from ..vmem.errors import InvalidConfig

_TOKEN_ALIGNMENT = 256  # tokens; lets kernels view a slot as whole pages of up to 256 tokens


class PageGeometry(Protocol):
    """Tokens to pages: all that the life of a slot needs to know of a layout."""

    @property
    def max_len(self) -> int: ...
    @property
    def num_ranges(self) -> int: ...
    @property
    def range_widths(self) -> tuple[int, ...]: ...
    @property
    def growth_tokens(self) -> int: ...
    @property
    def token_format(self) -> "TokenFormat": ...
    def pages_per_range(self, num_tokens: int) -> tuple[int, ...]: ...
    def whole_pages_per_range(self, num_tokens: int) -> tuple[int, ...]: ...
    def tokens_backed(self, pages: Sequence[int]) -> int: ...


@dataclass(frozen=True, kw_only=True)
class LayerGeometry:
    """Shape of one layer's keys and values.

    Attributes:
        num_kv_heads: heads of keys and values.
        key_dim: elements of one head's key.
        value_dim: elements of one head's value.
        window: tokens a query sees, itself included; None for all.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "key_dim", "value_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfig(f"{name} of a layer is {value}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RangeGeometry:
    """One range of a slot: `offset` and `token_bytes` in bytes, and the layers in it."""

    offset: int
    token_bytes: int
    layers: tuple[int, ...]
    window: int | None


@dataclass(frozen=True, kw_only=True)
class TensorGeometry:
    """A strided view of one layer's keys or values over all slots, in elements.

    The view is [num_slots, capacity_tokens, num_kv_heads, head_dim].
    """

    offset_bytes: int  # from the first slot's address
    slot_stride: int
    token_stride: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class TokenFormat:
    """What the bytes of a token's keys and values are, wherever they lie.

    Slots whose caches have equal formats may exchange tokens; their page sizes may differ.

    Attributes:
        dtype: of keys and values.
        streams: what each stretch of bytes that tokens lie in, one behind the other, has of a
            token: (layer, "key" or "value", heads, elements of a head), in order.
    """

    dtype: str
    streams: tuple[tuple[tuple[int, str, int, int], ...], ...]

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Bytes of a token in each stream."""
        itemsize = getattr(torch, self.dtype).itemsize
        return tuple(
            sum(heads * dim for _, _, heads, dim in parts) * itemsize for parts in self.streams
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of a token."""
        return sum(self.widths)


def _part(layers: Sequence[LayerGeometry], index: int, kind: str) -> tuple[int, str, int, int]:
    """What a stream has of one layer's keys or values."""
    layer = layers[index]
    return index, kind, layer.num_kv_heads, layer.key_dim if kind == "key" else layer.value_dim


def split_format(layers: Sequence[LayerGeometry], dtype: torch.dtype) -> TokenFormat:
    """The format of memory that keeps every layer's keys and values in tensors of their own."""
    parts = [(_part(layers, i, kind),) for i in range(len(layers)) for kind in ("key", "value")]
    return TokenFormat(str(dtype).removeprefix("torch."), tuple(parts))


@dataclass(frozen=True)
class KVLayout:
    """The geometry of a cache: tokens to bytes, pages and strides. One class, since nothing else
    computes an offset.

    Args:
        layers: geometry of each layer, in the model's order.
        dtype: of keys and values.
        max_len: tokens that a slot can hold.
        page_bytes: size of a physical page.
        layers_per_range: `g`, layers that share a range; None for all (of one window).
            Large: few pages a request. 1: plain strides, many pages.
        split_kv: keys and values in ranges of their own.
        over_read_tokens: the attention kernel's tile; backing is rounded up to it.
    """

    layers: tuple[LayerGeometry, ...]
    dtype: torch.dtype
    max_len: int
    page_bytes: int
    layers_per_range: int | None = None
    split_kv: bool = False
    over_read_tokens: int = 1

    def __post_init__(self) -> None:
        for name in ("max_len", "page_bytes", "over_read_tokens"):
            if getattr(self, name) < 1:
                raise InvalidConfig(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.layers:
            raise InvalidConfig("a layout needs at least one layer")
        if self.layers_per_range is not None and self.layers_per_range < 1:
            raise InvalidConfig(
                f"layers_per_range is {self.layers_per_range}; use 1 to {len(self.layers)}, "
                "or None for all"
            )

    # -- tokens to bytes and pages -----------------------------------------------------------

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return sum(r.token_bytes for r in self.ranges)

    @cached_property
    def growth_bytes(self) -> int:
        """Bytes of one page of every range: the most that a request can waste."""
        return len(self.ranges) * self.page_bytes

    @property
    def growth_tokens(self) -> int:
        """Tokens that fit into one page of every range."""
        return max(1, self.page_bytes // self._widest_token_bytes)

    @property
    def num_ranges(self) -> int:
        return len(self.ranges)

    @property
    def range_widths(self) -> tuple[int, ...]:
        """Bytes of one token in each range."""
        return tuple(r.token_bytes for r in self.ranges)

    def pages_per_range(self, num_tokens: int) -> tuple[int, ...]:
        """Pages of each range that back the first `num_tokens` tokens, over-read included."""
        backed = -(-num_tokens // self.over_read_tokens) * self.over_read_tokens
        return tuple([-(-backed * r.token_bytes // self.page_bytes) for r in self.ranges])

    def num_pages(self, num_tokens: int) -> int:
        """Pages of all ranges that back the first `num_tokens` tokens."""
        return sum(self.pages_per_range(num_tokens))

    def whole_pages_per_range(self, num_tokens: int) -> tuple[int, ...]:
        """Pages of each range that hold nothing but the first `num_tokens` tokens."""
        return tuple(num_tokens * r.token_bytes // self.page_bytes for r in self.ranges)

    def tokens_backed(self, pages: Sequence[int]) -> int:
        """Tokens that the first `pages[r]` pages of every range `r` back, over-read included."""
        tokens = min(
            count * self.page_bytes // r.token_bytes
            for count, r in zip(pages, self.ranges, strict=True)
        )
        return tokens // self.over_read_tokens * self.over_read_tokens

    # -- addresses ---------------------------------------------------------------------------

    @cached_property
    def ranges(self) -> tuple[RangeGeometry, ...]:
        """The ranges of a slot, in address order."""
        ranges: list[RangeGeometry] = []
        offset = 0
        for group in self._groups:
            sizes = [_key_value_bytes(self.layers[layer], self.itemsize) for layer in group]
            keys, values = sum(key for key, _ in sizes), sum(value for _, value in sizes)
            for token_bytes in (keys, values) if self.split_kv else (keys + values,):
                window = self.layers[group[0]].window
                ranges.append(
                    RangeGeometry(
                        offset=offset, token_bytes=token_bytes, layers=group, window=window
                    )
                )
                offset += self._range_bytes(token_bytes)
        return tuple(ranges)

    @cached_property
    def slot_bytes(self) -> int:
        """Distance between slots: whole pages, and whole tokens of every range."""
        last = self.ranges[-1]
        used = last.offset + self._range_bytes(last.token_bytes)
        unit = math.lcm(self.page_bytes, *(_TOKEN_ALIGNMENT * r.token_bytes for r in self.ranges))
        return -(-used // unit) * unit

    @property
    def token_format(self) -> TokenFormat:
        """What a token's bytes are in each range."""
        return self._token_format

    @cached_property
    def _token_format(self) -> TokenFormat:
        kinds = (("key",), ("value",)) if self.split_kv else (("key", "value"),)
        streams = tuple(
            tuple(_part(self.layers, layer, kind) for layer in group for kind in together)
            for group in self._groups
            for together in kinds
        )
        return TokenFormat(str(self.dtype).removeprefix("torch."), streams)

    def key_geometry(self, layer: int) -> TensorGeometry:
        """The strided view of a layer's keys over all slots."""
        return self._tensor_geometry(layer, is_value=False)

    def value_geometry(self, layer: int) -> TensorGeometry:
        """The strided view of a layer's values over all slots."""
        return self._tensor_geometry(layer, is_value=True)

    def _tensor_geometry(self, layer: int, *, is_value: bool) -> TensorGeometry:
        group_index = next(i for i, group in enumerate(self._groups) if layer in group)
        group = self._groups[group_index]
        earlier = group[: group.index(layer)]
        before = [_key_value_bytes(self.layers[other], self.itemsize) for other in earlier]
        if self.split_kv:
            home = self.ranges[2 * group_index + is_value]
            inside = sum(sizes[is_value] for sizes in before)
        else:
            home = self.ranges[group_index]
            inside = sum(key + value for key, value in before)
            keys, _ = _key_value_bytes(self.layers[layer], self.itemsize)
            inside += keys if is_value else 0
        geometry = self.layers[layer]
        return TensorGeometry(
            offset_bytes=home.offset + inside,
            slot_stride=self.slot_bytes // self.itemsize,
            token_stride=home.token_bytes // self.itemsize,
            num_heads=geometry.num_kv_heads,
            head_dim=geometry.value_dim if is_value else geometry.key_dim,
        )

    @property
    def capacity_tokens(self) -> int:
        """Tokens a slot's views span: `max_len`, rounded up to the over-read tile."""
        return -(-self.max_len // self.over_read_tokens) * self.over_read_tokens

    @cached_property
    def _groups(self) -> tuple[tuple[int, ...], ...]:
        by_window: dict[int | None, list[int]] = {}
        for index, layer in enumerate(self.layers):
            by_window.setdefault(layer.window, []).append(index)
        size = self.layers_per_range or len(self.layers)
        return tuple(
            tuple(members[start : start + size])
            for members in by_window.values()
            for start in range(0, len(members), size)
        )

    @cached_property
    def _widest_token_bytes(self) -> int:
        return max(r.token_bytes for r in self.ranges)

    def _range_bytes(self, token_bytes: int) -> int:
        return -(-self.capacity_tokens * token_bytes // self.page_bytes) * self.page_bytes


def _key_value_bytes(layer: LayerGeometry, itemsize: int) -> tuple[int, int]:
    """Bytes of a token's keys and values in one layer."""
    heads = layer.num_kv_heads * itemsize
    return heads * layer.key_dim, heads * layer.value_dim
