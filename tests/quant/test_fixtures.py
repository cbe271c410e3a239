"""Layers that auto-round and compressed-tensors wrote: the weights those libraries compute with.

The fixtures, and the script that made them, are in `fixtures/`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from vkv.quant.formats.table import parse_config, read_layer

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.safetensors"))


def test_no_format_is_missing() -> None:
    assert len(FIXTURES) == 14


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_what_others_wrote(path: Path) -> None:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = tensors.pop("expected")
    scheme = parse_config(config)
    assert scheme is not None
    weight = read_layer("a.b", tensors, scheme)
    assert weight.codes().unique().numel() > 8, "a fixture that says something"
    assert torch.equal(weight.dequantize(expected.dtype), expected)
