"""What configs of 4-bit checkpoints say is honoured, known to be harmless, or refused by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from quantized import KINDS, config_of, random_weight, scheme_of, written
from vkv.quant import QuantError, UnsupportedQuantization
from vkv.quant.formats.table import parse_config, read_layer

ROTATION = {
    "config_groups": {
        "R1": {
            "type": "hadamard",
            "apply": [{"targets": ["Linear"], "location": "input"}],
        }
    }
}


def auto_round(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        **changes,
    }


def compressed(weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    config = config_of("compressed-tensors", 32)
    (first,) = config["config_groups"].values()
    return config | {
        "config_groups": {"group_0": {**first, **group, "weights": first["weights"] | weights}}
    }


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gptq", {"bits": 3}, "bits is 3"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin'"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format is True"),
        ("gptq", {"adapter": {"name": "lora", "rank": 8}}, r"quantization_config\.adapter is"),
        ("gptq", {"rotation": "hadamard"}, "rotation is 'hadamard'"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ("awq", {"version": "gemv"}, "'gemv'"),
        ("awq", {"backend": "llm-awq"}, "backend is 'llm-awq'"),
        ("awq", {"desc_act": True}, "desc_act is True"),
        ("compressed-tensors", {"format": "float-quantized"}, "float-quantized"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 4}}, "kv_cache_scheme"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8, "turn": 1}}, "turn is 1"),
        ("compressed-tensors", {"transform_config": ROTATION}, r"transform_config is .*hadamard"),
        ("compressed-tensors", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
    ]
    + [(kind, {"of_tomorrow": 1}, "of_tomorrow is 1, .*not understood") for kind in KINDS],
)
def test_kinds_without_a_reader_are_refused(kind: str, change: dict, message: str) -> None:
    with pytest.raises(UnsupportedQuantization, match=message):
        parse_config(config_of(kind, 32) | change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (auto_round(rotation_config={"type": "hadamard"}), "rotation_config is .*hadamard"),
        (auto_round(hadamard_config="random_hadamard"), "hadamard_config"),
        (auto_round(act_bits=8), "act_bits is 8"),
        (auto_round(super_bits=6), "super_bits is 6"),
        (auto_round(data_type="fp4"), "data_type is 'fp4'"),
        (auto_round(extra_config={"a.b": {"bits": 8}}), r"extra_config\.a\.b\.bits is 8, and 4"),
        (auto_round(extra_config={"a.b": {"group_size": 32}}), r"a\.b\.group_size is 32, and 128"),
        (compressed({"dynamic": True}), "weights.dynamic is True"),
        (compressed({"actorder": "of-tomorrow"}), "actorder is 'of-tomorrow'"),
        (compressed({"block_structure": [128, 128]}), "block_structure"),
        (compressed({"strategy": "block"}), "strategy is 'block'"),
        (compressed({"type": "float"}), "type 'float'"),
        (compressed({}, input_activations={"num_bits": 4}), r"input_activations\.num_bits is 4"),
        (compressed({}, output_activations={"num_bits": 4}), "output_activations"),
    ],
    ids=str,
)
def test_other_schemes_are_refused(config: dict, message: str) -> None:
    with pytest.raises(UnsupportedQuantization, match=message):
        parse_config(config)


@pytest.mark.parametrize(
    "config",
    [
        config_of("compressed-tensors", 32) | {"transform_config": {}, "sparsity_config": {}},
        config_of("compressed-tensors", 32) | {"transform_config": {"config_groups": {}}},
        config_of("compressed-tensors", 32) | {"sparsity_config": {"format": "dense"}},
        config_of("gptq", 32) | {"dynamic": {}, "adapter": None, "meta": {"quantizer": ["a:1"]}},
        config_of("gptq", 32) | {"dynamic": {"-:.*vision.*": {}}},
        config_of("awq", 32) | {"sym": True, "desc_act": False, "damp_percent": 0.1},
        auto_round(rotation_config=None, act_bits=16, act_group_size=32, transform_config={}),
        auto_round(extra_config={"lm_head": {"bits": 16, "data_type": "float"}}),
    ],
    ids=str,
)
def test_what_says_nothing_is_no_hindrance(config: dict) -> None:
    assert parse_config(config) is not None


def test_layers_of_two_group_sizes_are_refused() -> None:
    config = config_of("compressed-tensors", 32)
    config["config_groups"]["other"] = config_of("compressed-tensors", 64)["config_groups"][
        "group_0"
    ]
    with pytest.raises(UnsupportedQuantization, match=r"group_0 and \.other differ"):
        parse_config(config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [None, 0, -2, "128", True])
def test_a_group_size_that_is_none(kind: str, size: object) -> None:
    with pytest.raises(QuantError, match=r"group_size is (missing|.*), and is a number of columns"):
        parse_config(config_of(kind, size))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_configs_groups_are_compared_with_the_tensors(kind: str) -> None:
    """960 columns with 8 scales look like groups of 120."""
    weight = random_weight(8, 960, 120)
    stated = replace(scheme_of(kind, weight), group_size=64)
    with pytest.raises(QuantError, match=r"has 8 groups for 960 .* groups of 64 make 15"):
        read_layer("a.b", written(kind, weight), stated)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptqs_last_group_may_be_short(symmetric: bool, act_order: bool) -> None:
    """Groups of 128 over 960 columns: seven, and one of 64."""
    fine = random_weight(8, 960, 64, symmetric=symmetric, act_order=act_order)
    coarse = torch.arange(15) // 2 * 2  # of two groups of 64, the first one's scale and zero
    zeros = None if fine.zeros is None else fine.zeros[:, coarse]
    weight = replace(fine, scales=fine.scales[:, coarse], zeros=zeros)
    if weight.permutation is not None:
        order = weight.permutation.clone()
        order[:896] = order[:896].unflatten(0, (7, 128)).sort(dim=1).values.flatten()
        weight = replace(weight, permutation=order)
    tensors = written("gptq", weight)
    for name in ("scales", "qzeros"):
        tensors[name] = tensors[name][::2].contiguous()
    tensors["g_idx"] //= 2
    found = read_layer("a.b", tensors, replace(scheme_of("gptq", weight), group_size=128))
    assert torch.equal(found.dequantize(), weight.dequantize())
    assert found.group_size == 64


@pytest.mark.parametrize("kind", ["awq", "compressed-tensors"])
def test_other_formats_have_no_short_group(kind: str) -> None:
    weight = random_weight(8, 960, 120)
    with pytest.raises(QuantError, match=r"960 input features, .* groups of 128 do not divide"):
        read_layer("a.b", written(kind, weight), replace(scheme_of(kind, weight), group_size=128))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_points_of_symmetric_weights(kind: str) -> None:
    weight = random_weight(8, 64, 32, symmetric=False)
    with pytest.raises(QuantError, match=r"holds zero points, and the config says .* symmetric"):
        read_layer("a.b", written(kind, weight), replace(scheme_of(kind, weight), symmetric=True))


def test_zero_points_that_are_missing() -> None:
    weight = random_weight(8, 64, 32)
    scheme = replace(scheme_of("compressed-tensors", weight), symmetric=False)
    with pytest.raises(QuantError, match="weight_zero_point is missing, and the config has"):
        read_layer("a.b", written("compressed-tensors", weight), scheme)


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_an_order_that_config_and_tensors_do_not_share(kind: str) -> None:
    weight = random_weight(8, 64, 32, act_order=True)
    tensors, scheme = written(kind, weight), scheme_of(kind, weight)
    with pytest.raises(QuantError, match="says that none are reordered"):
        read_layer("a.b", tensors, replace(scheme, act_order=False))
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    with pytest.raises(QuantError, match=r"g_idx is missing, .* columns are reordered"):
        read_layer("a.b", without, scheme)
