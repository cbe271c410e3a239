"""Small checkpoints in 8 bits and in others' types: a random model, rounded as each format does."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vkv.quant import Int4Weight
from vkv.quant.formats.table import parse_config, read_layer, renamed

Tensors = dict[str, torch.Tensor]
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}


def words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 4 n] as int32 [N, n]."""
    return codes.contiguous().view(torch.int32)


def rounded(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, int8 [N, K], and scales, float16 [N, groups]."""
    groups = weight.float().unflatten(1, (-1, size))
    scales = (groups.abs().amax(-1) / 127).clamp(min=1e-6).half()
    values = (groups / scales.float().unsqueeze(-1)).round().clamp(-127, 127)
    return values.flatten(1).to(torch.int8), scales


def gptq(weight: torch.Tensor) -> Tensors:
    values, scales = rounded(weight, 8)
    codes = (values.int() + 128).to(torch.uint8)
    zeros = torch.full(scales.T.shape, 127, dtype=torch.uint8)  # less one
    return {"qweight": words(codes).T.contiguous(), "qzeros": words(zeros), "scales": scales.T}


def packed(weight: torch.Tensor) -> Tensors:
    values, scales = rounded(weight, 8)
    codes = (values.int() + 128).to(torch.uint8)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": words(codes), "weight_scale": scales, "weight_shape": shape}


def int_quantized(weight: torch.Tensor) -> Tensors:
    values, scales = rounded(weight, weight.shape[1])
    return {"weight": values, "weight_scale": scales, "input_scale": torch.tensor([0.02])}


def fp8(weight: torch.Tensor) -> Tensors:
    scales = weight.float().abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scales).to(torch.float8_e4m3fn), "weight_scale": scales}


def fp8_blocks(weight: torch.Tensor) -> Tensors:
    """In blocks of 12 rows and 20 columns, which do not fill the last ones."""
    rows, columns = (-(-size // side) for size, side in zip(weight.shape, (12, 20), strict=True))
    scales = (torch.arange(rows * columns).view(rows, columns) + 20.0) / 20000
    spread = scales.repeat_interleave(12, 0).repeat_interleave(20, 1)
    values = weight / spread[: weight.shape[0], : weight.shape[1]]
    return {"weight": values.to(torch.float8_e4m3fn), "weight_scale": scales}


def fp8_inverse(weight: torch.Tensor) -> Tensors:
    """As `fp8_blocks`, under the names of `quant_method: "fp8"`."""
    tensors = fp8_blocks(weight)
    return {"weight": tensors["weight"], "weight_scale_inv": tensors["weight_scale"]}


def llm_int8(weight: torch.Tensor) -> Tensors:
    largest = weight.float().abs().amax(1)
    values = (weight * 127 / largest.unsqueeze(1)).round().to(torch.int8)
    return {"weight": values, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}


def nf4(weight: torch.Tensor) -> Tensors:
    """With absmax itself in codes; the map is a plain one, which the file says."""
    numbers = torch.linspace(-1, 1, 16)
    blocks = weight.float().view(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax.unsqueeze(1) + 1) * 7.5).round().to(torch.uint8).flatten()
    offset, nested_numbers = float(absmax.mean()), torch.linspace(-1, 1, 256)
    outer = (absmax - offset).abs().max().view(1)
    inner = (((absmax - offset) / outer + 1) * 127.5).round().to(torch.uint8)
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    return {
        "weight": ((codes[::2] << 4) | codes[1::2]).unsqueeze(1),
        "weight.absmax": inner,
        "weight.quant_map": numbers,
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": nested_numbers,
        "weight.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def compressed(kind: str, weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **group}},
    }


KINDS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Tensors]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 8, "group_size": 8, "sym": True}, gptq),
    "w8a16": (compressed("pack-quantized", {"strategy": "group", "group_size": 8}), packed),
    "w8a8": (
        compressed("int-quantized", {"strategy": "channel"}, input_activations=_ACTIVATIONS),
        int_quantized,
    ),
    "fp8": (compressed("float-quantized", {"strategy": "channel", "type": "float"}), fp8),
    "fp8-blocks": (
        compressed(
            "float-quantized",
            {"strategy": "block", "type": "float", "block_structure": [12, 20]},
        ),
        fp8_blocks,
    ),
    "fp8-inverse": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [12, 20],
        },
        fp8_inverse,
    ),
    "llm-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4),
}
_FUSED = ("experts.gate_up_proj", "experts.down_proj")
_LINEAR = re.compile(r"layers\..*_proj\.weight$")
DENSE = ("fp8", "fp8-blocks", "fp8-inverse", "nf4")  # that have no integers for codes


def _take_apart(held: Tensors) -> None:
    """Tensors of all experts, [experts, out, in], by expert."""
    for name in [name for name in held if name.endswith(_FUSED)]:
        home, _, part = name.rpartition(".")
        names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        for expert, stacked in enumerate(held.pop(name)):
            for own, rows in zip(names, stacked.chunk(len(names)), strict=True):
                held[f"{home}.{expert}.{own}.weight"] = rows.contiguous()


def _put(dense: Tensors, name: str, weight: torch.Tensor) -> None:
    """A weight in its place, which of an expert is a part of its tensor."""
    found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
    if found is None or name in dense:
        dense[name] = weight
        return
    home, expert, part = found.groups()
    if part == "down_proj":
        dense[f"{home}.down_proj"][int(expert)] = weight
    else:
        stacked = dense[f"{home}.gate_up_proj"][int(expert)]
        stacked.chunk(2)[part == "up_proj"].copy_(weight)


def write_folders(source: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    """Two checkpoints of the model in `source`: rounded, and with the weights that is read as."""
    config, write = KINDS[kind]
    scheme = parse_config(config)
    assert scheme is not None
    held = load_file(source / "model.safetensors")
    dense = dict(held)
    _take_apart(held)
    for name in [name for name in held if _LINEAR.search(name)]:
        layer, tensors = name.removesuffix(".weight"), write(held.pop(name))
        held |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in tensors.items()}
        by_name = {renamed(f".{part}", scheme.format)[1:]: t for part, t in tensors.items()}
        weight = read_layer(layer, by_name, scheme)
        _put(dense, name, weight.dequantize() if isinstance(weight, Int4Weight) else weight)
    paths = folder / kind, folder / f"{kind}-dense"
    for path, tensors in zip(paths, (held, dense), strict=True):
        path.mkdir(parents=True)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        described = json.loads((source / "config.json").read_text())
        if path == paths[0]:
            described["quantization_config"] = config
        (path / "config.json").write_text(json.dumps(described))
    return paths
