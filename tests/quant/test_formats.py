"""Readers and writers of 4-bit layers: bit for bit, and against the formats' own arithmetic."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import KINDS, config_of, random_weight, scheme_of, written
from vkv.quant import Int4Weight, QuantError, Scheme, concatenate, pack, unpack
from vkv.quant.formats.table import parse_config, read_layer
from vkv.quant.weight import split


@st.composite
def weights(draw: st.DrawFn) -> Int4Weight:
    group_size = draw(st.sampled_from([8, 32, 64, 128]))
    groups = draw(st.integers(1, 4))
    return random_weight(
        8 * draw(st.integers(1, 5)),
        groups * group_size,
        group_size,
        symmetric=draw(st.booleans()),
        act_order=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def same(one: Int4Weight, other: Int4Weight) -> None:
    assert one.group_size == other.group_size
    assert one.scales.dtype == other.scales.dtype
    for name in ("packed", "scales", "zeros", "permutation"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or torch.equal(mine, theirs), name


@given(st.data())
def test_pack_and_unpack(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 5)), 2 * data.draw(st.integers(1, 40)))
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 1]
    assert torch.equal(unpack(packed), codes)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(weight=weights())
def test_what_is_written_is_read_back(kind: str, weight: Int4Weight) -> None:
    if kind == "awq" and weight.permutation is not None:
        with pytest.raises(QuantError, match="permutation"):
            written(kind, weight)
        weight = replace(weight, permutation=None)
    same(read_layer("a.b", written(kind, weight), scheme_of(kind, weight)), weight)


def elementwise(kind: str, tensors: dict[str, torch.Tensor], row: int, column: int) -> float:
    """One element of a stored layer [N, K], by the words of the formats' own documentation."""

    def nibble(words: torch.Tensor, index: tuple[int, int], place: int) -> int:
        return (int(words[index]) >> (4 * place)) & 0xF

    if kind == "compressed-tensors":
        group_size = tensors["weight_shape"][1].item() // tensors["weight_scale"].shape[1]
        group = column // int(group_size)
        if "weight_g_idx" in tensors:
            group = int(tensors["weight_g_idx"][column])
        code = nibble(tensors["weight_packed"], (row, column // 8), column % 8) - 8
        zero = 0
        if "weight_zero_point" in tensors:
            zero = nibble(tensors["weight_zero_point"], (row // 8, group), row % 8) - 8
        return (code - zero) * float(tensors["weight_scale"][row, group])
    if kind == "awq":
        place = [0, 2, 4, 6, 1, 3, 5, 7].index(row % 8)
        group = column // (tensors["qweight"].shape[0] // tensors["scales"].shape[0])
        code = nibble(tensors["qweight"], (column, row // 8), place)
        zero = nibble(tensors["qzeros"], (group, row // 8), place)
    else:
        group = int(tensors["g_idx"][column])
        code = nibble(tensors["qweight"], (column // 8, row), column % 8)
        zero = nibble(tensors["qzeros"], (group, row // 8), row % 8) + (kind == "gptq")
    return (code - zero) * float(tensors["scales"][group, row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_dequantised_element_by_element(kind: str, symmetric: bool, act_order: bool) -> None:
    """Stored words are drawn at random and read twice: by the reader, and one by one."""
    weight = random_weight(16, 64, 16, symmetric=symmetric, act_order=act_order and kind != "awq")
    tensors = written(kind, weight)
    for name, tensor in tensors.items():
        if name in ("qweight", "weight_packed"):
            tensors[name] = torch.randint_like(tensor, -(2**31), 2**31 - 1)
    found = read_layer("a.b", tensors, scheme_of(kind, weight)).dequantize(torch.float64)
    for row in range(16):
        for column in range(64):
            assert found[row, column].item() == elementwise(kind, tensors, row, column)


def test_dequantised_values_are_rounded_once() -> None:
    weight = random_weight(8, 64, 32, symmetric=False)
    exact = weight.dequantize(torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(weight.dequantize(dtype), exact.to(dtype))


def test_the_first_version_of_gptq_wraps_a_zero_of_zero() -> None:
    weight = random_weight(8, 32, 32, symmetric=False)
    weight = replace(weight, zeros=torch.zeros_like(weight.scales, dtype=torch.uint8))
    tensors = written("gptq", weight)
    assert tensors["qzeros"].item() == -1  # fifteen in every nibble
    same(read_layer("a.b", tensors, scheme_of("gptq", weight)), weight)


def test_gptq_without_the_index_of_groups() -> None:
    weight = random_weight(8, 64, 32)
    tensors = written("gptq", weight)
    del tensors["g_idx"]
    same(read_layer("a.b", tensors, scheme_of("gptq", weight)), weight)


def test_one_scale_for_a_whole_tensor() -> None:
    weight = random_weight(8, 64, 64)
    tensors = written("compressed-tensors", weight)
    tensors["weight_scale"] = torch.tensor([0.5])
    found = read_layer("a.b", tensors, scheme_of("compressed-tensors", weight))
    assert torch.equal(found.scales, torch.full((8, 1), 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_names_the_tensor(kind: str) -> None:
    weight = random_weight(32, 64, 16, symmetric=False)
    tensors = written(kind, weight)
    for name, tensor in tensors.items():
        if name == "g_idx":
            damaged = tensors | {name: torch.zeros_like(tensor)}
        elif name == "weight_shape":
            damaged = tensors | {name: tensor + 8}
        else:
            damaged = tensors | {name: tensor[: len(tensor) // 2 + 1]}
        with pytest.raises(QuantError, match=r"tensor layer\.7\.\w+ "):  # it, or its contradiction
            read_layer("layer.7", damaged, scheme_of(kind, weight))
        wrong_type = tensors | {name: tensor.bool()}
        with pytest.raises(QuantError, match=rf"tensor layer\.7\.{name} is bool"):
            read_layer("layer.7", wrong_type, scheme_of(kind, weight))


def test_scales_that_are_no_numbers() -> None:
    weight = random_weight(8, 32, 32)
    tensors = written("gptq", weight)
    tensors["scales"][0, 3] = float("nan")
    with pytest.raises(QuantError, match=r"tensor a\.scales holds values that are not finite"):
        read_layer("a", tensors, scheme_of("gptq", weight))


@pytest.mark.parametrize("kind", KINDS)
def test_configs_are_understood(kind: str) -> None:
    scheme = parse_config(config_of(kind, 32, symmetric=False, act_order=kind != "awq"))
    assert scheme is not None
    assert (scheme.group_size, scheme.symmetric) == (32, False)
    assert scheme.act_order is (None if kind == "awq" else True)
    assert scheme.zero_offset == (1 if kind == "gptq" else 0)


def test_auto_round_stores_gptq() -> None:
    config = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 128,
        "packing_format": "auto_round:auto_gptq",
    }
    assert parse_config(config) == Scheme(format="gptq", zero_offset=1, group_size=128)


def test_other_methods_are_left_to_others() -> None:
    assert parse_config({"quant_method": "hqq"}) is None


@given(data=st.data())
@settings(max_examples=30)
def test_concatenated_and_split(data: st.DataObject) -> None:
    act_order = data.draw(st.booleans())
    parts = [
        random_weight(
            8 * data.draw(st.integers(1, 4)),
            64,
            16,
            symmetric=data.draw(st.booleans()),
            act_order=act_order,
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    parts = [replace(part, permutation=parts[0].permutation) for part in parts]
    whole = concatenate(parts)
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    again = split(whole, [part.out_features for part in parts])
    for one, other in zip(again, parts, strict=True):
        assert torch.equal(one.dequantize(), other.dequantize())


def test_weights_of_other_groups_are_not_joined() -> None:
    with pytest.raises(QuantError, match="cannot be one"):
        concatenate([random_weight(8, 64, 16), random_weight(8, 64, 32)])


@pytest.mark.parametrize(
    "change",
    [
        {"packed": torch.zeros(8, 32, dtype=torch.int32)},
        {"scales": torch.zeros(8, 3)},
        {"zeros": torch.zeros(8, 4, dtype=torch.int32)},
        {"group_size": 24},
        {"permutation": torch.arange(63)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_parts_that_contradict_each_other(change: dict) -> None:
    with pytest.raises(QuantError):
        replace(random_weight(8, 64, 16), **change)
