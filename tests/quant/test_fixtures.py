"""Layers that others wrote: the weights which those libraries themselves compute with.

The fixtures, and the scripts that made them, are in `fixtures/`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from vkv.quant import Int4Weight
from vkv.quant.formats.table import parse_config, read_layer, renamed

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.safetensors"))


def stored_in(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
        return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_no_format_is_missing() -> None:
    assert len(FIXTURES) == 29


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_what_others_wrote(path: Path) -> None:
    config, tensors = stored_in(path)
    expected = tensors.pop("expected")
    scheme = parse_config(config)
    assert scheme is not None
    assert scheme.bits == (8 if "8bit" in path.stem or "int8" in path.stem else 4)
    by_name = {renamed(f".{name}", scheme.format)[1:]: tensor for name, tensor in tensors.items()}
    weight = read_layer("a.b", by_name, scheme)
    assert expected.unique().numel() > 8, "a fixture that says something"
    if isinstance(weight, Int4Weight):
        assert weight.codes().unique().numel() > (8 if scheme.bits == 4 else 100)
        found = weight.dequantize(expected.dtype)
    else:
        found = weight.to(expected.dtype)
    if path.stem == "bitsandbytes-int8":  # it multiplies by a rounded 1/127
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)
    else:
        assert torch.equal(found, expected)
