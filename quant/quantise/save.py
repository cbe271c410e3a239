"""Writing a quantised model as a checkpoint folder that transformers, vLLM and vkv load."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedTokenizerBase

from ...vmem import linux
from ...vmem.errors import QuantError
from ..formats.scheme import FormatName, Scheme
from ..formats.table import parse_config, write_layer
from ..names import published_roles
from ..weight import Int4Weight
from .model import QuantizedModel
from .rounding import Rounding

FORMATS: tuple[FormatName, ...] = get_args(FormatName)
REPORT = "quantization_report.json"
# Which formats have a zero point of their own for every group; the others are symmetric here.
ASYMMETRIC: frozenset[FormatName] = frozenset({"awq"})


def save_quantized(
    result: QuantizedModel,
    out: str | Path,
    *,
    format: FormatName,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: dict[str, Any] | None = None,
) -> None:
    """Write config, weights, tokenizer and a report of the errors into a new folder.

    The folder appears when all of it is written. `report` is added to the report.

    Raises QuantError if the folder is there already or cannot be made, or if the format cannot say
    what was left dense.
    """
    home = Path(out)
    refuse_occupied(home)
    config = quantization_config(
        format, result.rounding, result.dense, result.head, routers=result.routers
    )
    scheme = parse_config(config)
    assert scheme is not None, "we read what we write"
    state = _state(result, scheme)
    partial = home.with_name(f"{home.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    result.model.save_pretrained(partial, state_dict=state)
    path = partial / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["quantization_config"] = config
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    lines = {
        "format": format,
        "method": result.method,
        "group_size": result.rounding.group_size,
        "symmetric": result.rounding.symmetric,
        "clip": result.rounding.clip,
        **(report or {}),
        "dense": [*result.dense, *result.routers],
        "layers": [asdict(error) for error in result.errors],
    }
    (partial / REPORT).write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    if home.exists():
        home.rmdir()
    partial.rename(home)


def _state(result: QuantizedModel, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint, by the model's names and those of its experts' linears."""
    state = dict(result.model.state_dict())
    names = {name: name for name in result.weights}
    for home, fused in result.experts.items():
        for own in fused.tensor_names():
            del state[f"{home}.{own}"]
        for role, published in published_roles(result.model, fused, home).items():
            for expert in range(fused.num_experts):
                name = f"{home}.{expert}.{published}"
                names[f"{home}.{expert}.{role}"] = name
                if (bias := fused.bias(role, expert)) is not None:
                    state[f"{name}.bias"] = bias.contiguous()
    for name, weight in result.weights.items():
        state.pop(f"{name}.weight", None)
        for suffix, tensor in write_layer(weight, scheme).items():
            state[f"{names[name]}.{suffix}"] = tensor
    return state


def refuse_occupied(out: Path) -> None:
    """Raise QuantError if there is something at `out` already, or it cannot be made."""
    if not linux.can_write(out.absolute().parent):
        raise QuantError(f"{out} cannot be written to; name a folder elsewhere")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantError(f"{out} exists and is not empty; name a new folder")


def quantization_config(
    format: FormatName,
    rounding: Rounding,
    dense: tuple[str, ...],
    head: str | None,
    *,
    routers: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What goes into config.json for others to read the weights by.

    `dense`, `routers` and `head` name what is not quantised, as in `Plan`. Raises QuantError for
    what the format cannot express.
    """
    group, symmetric = rounding.group_size, rounding.symmetric
    ignore = [*dense, *routers, *([head] if head else [])]
    if format == "gptq":
        if dense:
            raise QuantError(
                f"GPTQ's config has no list of dense layers, and {len(dense)} would stay dense, "
                f"among them {dense[0]}; use the format compressed-tensors or awq, or a group "
                "size that divides their input features"
            )
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": group,
            "sym": symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "lm_head": False,
            "quantizer": "vkv",
            **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in routers}} if routers else {}),
        }
    if format == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ignore or None,
        }
    return _compressed_tensors(rounding, ignore)


def _compressed_tensors(rounding: Rounding, ignore: list[str]) -> dict[str, Any]:
    group = rounding.group_size
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": rounding.symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def total_bytes(weights: dict[str, Int4Weight]) -> int:
    """Bytes of all the weights, scales and zeros."""
    return sum(weight.num_bytes for weight in weights.values())
