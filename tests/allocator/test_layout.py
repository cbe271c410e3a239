"""The layout's arithmetic against its definition: a map of which byte belongs to which token."""

import numpy as np
import pytest
import torch
from allocator_model import KINDS, MAX_LEN, FlakyHostDriver, make_cache, one_thread
from hypothesis import given
from hypothesis import strategies as st
from vkv.allocator import KVCache, KVLayout, LayerGeometry, PagedKVCache, PagedLayout, PagePool
from vkv.vmem.errors import InvalidConfig

__all__ = ["one_thread"]  # a fixture

PAGE = 256  # small, so that whole slots can be drawn byte by byte

layer_geometries = st.builds(
    LayerGeometry,
    num_kv_heads=st.integers(1, 3),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    window=st.sampled_from([None, None, 4, 8]),
)
layouts = st.builds(
    KVLayout,
    layers=st.lists(layer_geometries, min_size=1, max_size=5).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    max_len=st.integers(1, 40),
    page_bytes=st.just(PAGE),
    layers_per_range=st.none() | st.integers(1, 6),
    split_kv=st.booleans(),
    over_read_tokens=st.sampled_from([1, 1, 4, 16]),
)


def draw_slot(layout):
    """Of each byte of a slot, which token it belongs to (-1: none), and of which tensor.

    Up to the end of the last range, that is: a slot's stride may be far larger.
    """
    owner = np.full(range_bytes(layout, layout.num_ranges - 1).stop, -1)
    tensor = np.full(len(owner), -1)
    assert len(owner) <= layout.slot_bytes
    for layer in range(len(layout.layers)):
        for index, geometry in enumerate(
            (layout.key_geometry(layer), layout.value_geometry(layer))
        ):
            size = geometry.num_heads * geometry.head_dim * layout.itemsize
            for token in range(layout.capacity_tokens):
                start = geometry.offset_bytes + token * geometry.token_stride * layout.itemsize
                assert start + size <= len(owner)
                assert (owner[start : start + size] == -1).all(), "two tensors overlap"
                owner[start : start + size] = token
                tensor[start : start + size] = 2 * layer + index
    return owner, tensor


def range_bytes(layout, index):
    """Offsets of the bytes of a range, up to the next one."""
    geometry = layout.ranges[index]
    if index + 1 < layout.num_ranges:
        return slice(geometry.offset, layout.ranges[index + 1].offset)
    size = layout.capacity_tokens * geometry.token_bytes
    return slice(geometry.offset, geometry.offset + -(-size // PAGE) * PAGE)


@given(layouts)
def test_every_tensor_has_its_own_bytes_inside_the_slot(layout):
    owner, tensor = draw_slot(layout)
    per_token = layout.token_bytes
    assert per_token == sum(
        g.num_kv_heads * (g.key_dim + g.value_dim) * layout.itemsize for g in layout.layers
    )
    for token in (0, layout.capacity_tokens - 1):
        assert (owner == token).sum() == per_token
    for index, geometry in enumerate(layout.ranges):
        inside = tensor[range_bytes(layout, index)]
        layers = {value // 2 for value in inside[inside >= 0].tolist()}
        assert layers == set(geometry.layers)
        assert {layout.layers[layer].window for layer in layers} == {geometry.window}
        if layout.split_kv:  # keys alone or values alone
            assert len({value % 2 for value in inside[inside >= 0].tolist()}) == 1


@given(layouts)
def test_groups_of_layers_are_as_large_as_asked_and_of_one_window(layout):
    groups = {r.layers for r in layout.ranges}
    assert sorted(layer for group in groups for layer in group) == list(range(len(layout.layers)))
    size = layout.layers_per_range or len(layout.layers)
    for window in {layer.window for layer in layout.layers}:
        members = [i for i, layer in enumerate(layout.layers) if layer.window == window]
        of_window = [group for group in groups if layout.layers[group[0]].window == window]
        assert len(of_window) == -(-len(members) // size)
        assert all(len(group) <= size for group in of_window)
    assert layout.num_ranges == len(groups) * (2 if layout.split_kv else 1)


@given(layouts, st.data())
def test_pages_are_those_that_hold_the_tokens(layout, data):
    owner, _ = draw_slot(layout)
    num_tokens = data.draw(st.integers(0, layout.max_len))
    tile = layout.over_read_tokens
    readable = -(-num_tokens // tile) * tile
    expected, whole = [], []
    for index in range(layout.num_ranges):
        pages = owner[range_bytes(layout, index)].reshape(-1, PAGE)
        used = ((pages >= 0) & (pages < readable)).any(axis=1)
        expected.append(int(used.sum()))
        assert used[: expected[-1]].all(), "pages are used from the start on"
        whole.append(int(((pages >= 0) & (pages < num_tokens)).all(axis=1).sum()))
    assert layout.pages_per_range(num_tokens) == tuple(expected)
    assert layout.whole_pages_per_range(num_tokens) == tuple(whole)
    assert layout.num_pages(num_tokens) == sum(expected)
    assert all(w <= p for w, p in zip(whole, expected, strict=True))


@given(layouts, st.data())
def test_tokens_backed_is_the_most_that_the_pages_hold(layout, data):
    num_tokens = data.draw(st.integers(0, layout.max_len))
    most = layout.pages_per_range(layout.max_len)
    pages = [data.draw(st.integers(0, count)) for count in most]
    backed = layout.tokens_backed(pages)
    assert backed % layout.over_read_tokens == 0
    assert layout.tokens_backed(layout.pages_per_range(num_tokens)) >= num_tokens
    needed = layout.pages_per_range(min(backed, layout.capacity_tokens))
    assert all(n <= p for n, p in zip(needed, pages, strict=True))
    if backed < layout.capacity_tokens:
        more = layout.pages_per_range(backed + 1)
        assert any(m > p for m, p in zip(more, pages, strict=True))


@given(layouts)
def test_slots_are_whole_pages_and_whole_groups_of_tokens(layout):
    assert layout.slot_bytes % PAGE == 0
    for geometry in layout.ranges:
        assert geometry.offset % PAGE == 0
        assert layout.slot_bytes % (256 * geometry.token_bytes) == 0
    assert layout.capacity_tokens >= layout.max_len
    assert layout.capacity_tokens % layout.over_read_tokens == 0
    assert layout.row_bytes == layout.num_ranges * PAGE
    for num_tokens in (1, layout.row_tokens):
        if layout.row_tokens > 1 and layout.over_read_tokens == 1:
            assert layout.num_pages(min(num_tokens, layout.max_len)) == layout.num_ranges


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_cache_shows_tensors_of_that_geometry(kind):
    with FlakyHostDriver() as driver, make_cache(kind, driver) as cache:
        layout = cache.layout
        for layer, given_layer in enumerate(layout.layers):
            for view, geometry, dim in zip(
                cache.layer(layer),
                (layout.key_geometry(layer), layout.value_geometry(layer)),
                (given_layer.key_dim, given_layer.value_dim),
                strict=True,
            ):
                assert view.shape == (5, layout.capacity_tokens, given_layer.num_kv_heads, dim)
                strides = (geometry.slot_stride, geometry.token_stride, dim, 1)
                assert view.stride() == strides
        assert cache.virtual_bytes == 5 * layout.slot_bytes == driver.reserved_bytes


def test_windows_and_knobs_of_a_model_with_both_kinds_of_layers():
    full = LayerGeometry(num_kv_heads=2, key_dim=8, value_dim=4)
    local = LayerGeometry(num_kv_heads=2, key_dim=8, value_dim=4, window=8)
    layers = (full, local, full, local, full)
    one = KVLayout(layers, torch.float32, 32, PAGE)
    assert [(r.layers, r.window) for r in one.ranges] == [((0, 2, 4), None), ((1, 3), 8)]
    assert [r.token_bytes for r in one.ranges] == [3 * 96, 2 * 96]
    two = KVLayout(layers, torch.float32, 32, PAGE, layers_per_range=2, split_kv=True)
    assert [r.layers for r in two.ranges] == [(0, 2), (0, 2), (4,), (4,), (1, 3), (1, 3)]
    assert [r.token_bytes for r in two.ranges] == [128, 64, 64, 32, 128, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 0}, "max_len is 0"),
        ({"page_bytes": 0}, "page_bytes is 0"),
        ({"over_read_tokens": 0}, "over_read_tokens is 0"),
        ({"layers": ()}, "at least one layer"),
        ({"layers_per_range": 0}, "use 1 to 1, or None"),
    ],
)
def test_impossible_layouts_are_refused(options, message):
    layer = LayerGeometry(num_kv_heads=1, key_dim=8, value_dim=8)
    given_options = {"layers": (layer,), "dtype": torch.float32, "max_len": 9, "page_bytes": PAGE}
    with pytest.raises(InvalidConfig, match=message):
        KVLayout(**{**given_options, **options})


@pytest.mark.parametrize("name", ["num_kv_heads", "key_dim", "value_dim", "window"])
def test_impossible_layers_are_refused(name):
    with pytest.raises(InvalidConfig, match=f"{name} of a layer is 0"):
        LayerGeometry(**{"num_kv_heads": 1, "key_dim": 8, "value_dim": 8, name: 0})


def test_impossible_caches_are_refused_and_reserve_nothing():
    layer = LayerGeometry(num_kv_heads=2, key_dim=16, value_dim=16)
    layout = KVLayout((layer, layer), torch.float32, MAX_LEN, 4096, layers_per_range=1)
    with FlakyHostDriver() as driver:
        pool = PagePool(driver, 8 * 4096)
        for options, message in [
            ({"num_slots": 0}, "num_slots is 0"),
            ({"num_slots": 2, "max_parked": 3}, "use 0 to num_slots"),
            ({"num_slots": 2, "max_parked": -1}, "max_parked is -1"),
        ]:
            with pytest.raises(InvalidConfig, match=message):
                KVCache(layout, pool, **options)
        with pytest.raises(InvalidConfig, match="cannot hold one row of 2"):
            KVCache(layout, PagePool(driver, 4096), num_slots=2)
        other = KVLayout((layer,), torch.float32, MAX_LEN, 8192)
        with pytest.raises(InvalidConfig, match="use one page size"):
            KVCache(other, pool, num_slots=2)
        odd = KVLayout((layer,), torch.complex64, MAX_LEN, 4096)
        with pytest.raises(InvalidConfig, match="complex64"):
            KVCache(odd, pool, num_slots=2)
        assert driver.reserved_bytes == 0
        with pytest.raises(InvalidConfig, match="holds no page"):
            PagePool(driver, 4095)
        with pytest.raises(InvalidConfig, match="sanitize is 'always'"):
            PagePool(driver, 4096, sanitize="always")  # pyright: ignore[reportArgumentType]
        with pytest.raises(InvalidConfig, match="low_watermark is -1"):
            PagePool(driver, 4096, low_watermark=-1)
    paged = PagedLayout((layer,), torch.float32, MAX_LEN)
    with pytest.raises(InvalidConfig, match="holds no page"):
        PagedKVCache(paged, 100, num_slots=2)
    with pytest.raises(InvalidConfig, match="must all be at least 1"):
        PagedLayout((layer,), torch.float32, MAX_LEN, block_tokens=0)
    pool = PagedKVCache(paged, 1 << 20, num_slots=2).pool
    layout = KVLayout((layer,), torch.float32, MAX_LEN, paged.page_bytes)
    with pytest.raises(InvalidConfig, match="not from a VmemDriver"):
        KVCache(layout, pool, num_slots=1)


@pytest.mark.parametrize("num_tokens", range(40))
def test_paged_layouts_count_blocks(num_tokens):
    layer = LayerGeometry(num_kv_heads=2, key_dim=3, value_dim=5)
    layout = PagedLayout((layer, layer), torch.bfloat16, 64, block_tokens=7)
    assert layout.token_bytes == 2 * 2 * 8 * 2
    assert layout.page_bytes == 7 * layout.token_bytes
    owner = np.arange(layout.num_pages(64) * 7)  # token of each place
    blocks = owner.reshape(-1, 7)
    assert layout.pages_per_range(num_tokens) == (int((blocks < num_tokens).any(axis=1).sum()),)
    assert layout.whole_pages_per_range(num_tokens) == (
        int((blocks < num_tokens).all(axis=1).sum()),
    )
    assert layout.tokens_backed(layout.pages_per_range(num_tokens)) >= num_tokens
