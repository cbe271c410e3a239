"""Small 4-bit checkpoints: a random model, rounded to nearest, written as each format stores it."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vkv.quant import Int4Weight, Scheme
from vkv.quant.formats.table import parse_config, write_layer

_FUSED = ("experts.gate_up_proj", "experts.down_proj")
_LINEARS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
KINDS = ("awq", "compressed-tensors", "gptq", "gptq_v2")


def config_of(
    kind: str, group_size: int, *, symmetric: bool = True, act_order: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint."""
    if kind == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "version": "gemm",
            "group_size": group_size,
            "zero_point": not symmetric,
        }
    if kind == "compressed-tensors":
        weights = {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": group_size,
            "symmetric": symmetric,
            "actorder": "group" if act_order else None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    return {
        "quant_method": "gptq",
        "bits": 4,
        "checkpoint_format": kind,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": act_order,
    }


def scheme_of(kind: str, weight: Int4Weight) -> Scheme:
    """How a checkpoint of that kind says that this weight is stored."""
    scheme = parse_config(
        config_of(
            kind,
            weight.group_size,
            symmetric=weight.zeros is None,
            act_order=weight.permutation is not None,
        )
    )
    assert scheme is not None
    return scheme


def written(kind: str, weight: Int4Weight) -> dict[str, torch.Tensor]:
    """The tensors of a layer with this weight."""
    return write_layer(weight, scheme_of(kind, weight))


def random_weight(
    out_features: int,
    in_features: int,
    group_size: int,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    seed: int = 0,
) -> Int4Weight:
    """Codes, scales, zeros and an order drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    zeros = torch.randint(1, 16, (out_features, groups), generator=generator, dtype=torch.uint8)
    order = torch.randperm(in_features, generator=generator)
    order = order.unflatten(0, (groups, -1)).sort(dim=1).values.flatten()  # as argsort leaves it
    return Int4Weight.from_codes(
        torch.randint(0, 16, (out_features, in_features), generator=generator),
        torch.rand(out_features, groups, generator=generator).half() / 16 + 0.01,
        None if symmetric else zeros,
        permutation=order if act_order and groups > 1 else None,
    )


def round_to_nearest(weight: torch.Tensor, group_size: int, *, symmetric: bool) -> Int4Weight:
    """The simplest quantiser there is: [N, K], each group by its extremes."""
    groups = weight.float().unflatten(1, (-1, group_size))
    if symmetric:
        scales = groups.abs().amax(-1) / 7
        zeros = torch.full_like(scales, 8)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(1, 15)
    scales = scales.clamp(min=1e-6).half().float()
    codes = (groups / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return Int4Weight.from_codes(
        codes.clamp(0, 15).flatten(1).to(torch.uint8),
        scales.half(),
        None if symmetric else zeros.to(torch.uint8),
    )


def permuted(weight: torch.Tensor, group_size: int, *, symmetric: bool) -> Int4Weight:
    """Rounded to nearest in groups of columns dealt at random, as act-order leaves them."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    order = order.unflatten(0, (-1, group_size)).sort(dim=1).values.flatten()
    plain = round_to_nearest(weight[:, order], group_size, symmetric=symmetric)
    return Int4Weight(
        packed=plain.packed,
        scales=plain.scales,
        zeros=plain.zeros,
        group_size=group_size,
        permutation=order,
    )


def quantize_folder(
    source: Path,
    folder: Path,
    kind: str,
    *,
    group_size: int = 16,
    symmetric: bool = True,
    act_order: bool = False,
) -> tuple[Path, Path]:
    """Two checkpoints of the model in `source`: quantised, and with dequantised weights.

    The linears of its layers are quantised, which is what quantisers do; the rest is kept.
    """
    tensors = load_file(source / "model.safetensors")
    quantized, dense = dict(tensors), dict(tensors)
    quantise = permuted if act_order else round_to_nearest
    for name in tensors:
        if "layers." in name and "vision" not in name and name.endswith(_LINEARS):
            weight = quantise(tensors[name], group_size, symmetric=symmetric)
            layer = name.removesuffix(".weight")
            del quantized[name]
            for part, tensor in written(kind, weight).items():
                quantized[f"{layer}.{part}"] = tensor
            dense[name] = weight.dequantize(tensors[name].dtype)
        elif name.endswith(_FUSED) and f"{name}_bias" not in tensors:  # those are GPT-OSS's
            del quantized[name]
            quantized |= _taken_apart(name, dense[name], kind, group_size, symmetric)
    config = json.loads((source / "config.json").read_text())
    paths = (folder / kind, folder / f"{kind}-dense")
    for path, held in zip(paths, (quantized, dense), strict=True):
        path.mkdir(parents=True)
        save_file(held, path / "model.safetensors", metadata={"format": "pt"})
        for extra in source.glob("*"):
            if extra.name not in ("config.json", "model.safetensors") and extra.is_file():
                (path / extra.name).write_bytes(extra.read_bytes())
        described = config_of(kind, group_size, symmetric=symmetric, act_order=act_order)
        added = {"quantization_config": described} if path == paths[0] else {}
        (path / "config.json").write_text(json.dumps(config | added))
    return paths


def _taken_apart(
    name: str, stacked: torch.Tensor, kind: str, group_size: int, symmetric: bool
) -> dict[str, torch.Tensor]:
    """A tensor of all experts, [experts, out, in], by expert; its numbers are then the same."""
    held: dict[str, torch.Tensor] = {}
    home, _, part = name.rpartition(".")
    names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    for expert in range(len(stacked)):
        for own, rows in zip(names, stacked[expert].chunk(len(names)), strict=True):
            weight = round_to_nearest(rows, group_size, symmetric=symmetric)
            rows.copy_(weight.dequantize(rows.dtype))
            for suffix, tensor in written(kind, weight).items():
                held[f"{home}.{expert}.{own}.{suffix}"] = tensor
    return held


def gpt_oss_folders(
    source: Path, folder: Path, kind: str, style: str, *, group_size: int = 8
) -> tuple[Path, Path]:
    """As `quantize_folder`, of a GPT-OSS in `source`, with experts' layers named by `style`.

    In it {expert} and {part} stand for theirs. Gate and up are two layers in styles that name the
    expert first, and one otherwise.
    """
    int4, same = quantize_folder(source, folder, kind, group_size=group_size)
    held, dense = (load_file(path / "model.safetensors") for path in (int4, same))
    for name in [name for name in held if name.endswith("experts.gate_up_proj")]:
        home = name.removesuffix(".gate_up_proj")
        for part in ("gate_up_proj", "down_proj"):
            weights, biases = held.pop(f"{home}.{part}"), held.pop(f"{home}.{part}_bias")
            for expert, (stacked, bias) in enumerate(zip(weights, biases, strict=True)):
                weight = round_to_nearest(stacked.T, group_size, symmetric=True)
                dense[f"{home}.{part}"][expert] = weight.dequantize(stacked.dtype).T
                for own, rows in _rows_of(part, split=style.endswith("{part}")).items():
                    layer = f"{home}.{style.format(expert=expert, part=own)}"
                    some = Int4Weight.from_codes(weight.codes()[rows], weight.scales[rows], None)
                    for suffix, tensor in written(kind, some).items():
                        held[f"{layer}.{suffix}"] = tensor
                    held[f"{layer}.bias"] = bias[rows].contiguous()
    for path, tensors in ((int4, held), (same, dense)):
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return int4, same


def _rows_of(part: str, *, split: bool) -> dict[str, slice]:
    """The rows of a part of an expert by the names they are published under."""
    if part == "down_proj":
        return {"down_proj" if split else "down": slice(None)}
    if split:
        return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    return {"gate_up": slice(None)}


def move_to_blobs(folder: Path) -> None:
    """Make a model's folder one of the hub's cache: links to files that are called by a digest."""
    blobs = folder.with_name(f"{folder.name}-blobs")
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = file.rename(blobs / f"{number:064x}")
        file.symlink_to(os.path.relpath(blob, folder))


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(tokens: int, features: int, seed: int = 1) -> torch.Tensor:
    """Inputs like a layer's: few directions hold most of their size."""
    mixing = matrix(features // 4, features, seed=seed)
    return matrix(tokens, features // 4, seed=seed + 1) @ mixing + 0.1 * matrix(
        tokens, features, seed=seed + 2
    )
