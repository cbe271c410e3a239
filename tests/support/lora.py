"""LoRA adapters as PEFT's `save_pretrained` writes them, and models with such weights merged in."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def linears(model: PreTrainedModel, endings: Sequence[str]) -> dict[str, nn.Module]:
    """The linear modules whose names end so."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.split(".")[-1] in endings
    }


def shape(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs."""
    weight: Any = module.weight
    return tuple(weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape)


def save_adapter(
    folder: Path,
    model: PreTrainedModel,
    *,
    rank: int = 8,
    seed: int = 0,
    endings: Sequence[str] = ALL,
    gain: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """An adapter of random weights, strong enough to change every token; `config` as PEFT has it.

    Ranks are those of `rank_pattern`, by the endings of names, where it has one.
    """
    generator = torch.Generator().manual_seed(seed)
    said: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.1,
        "target_modules": list(endings),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "base_model_name_or_path": "a-base-model",
        "megatron_core": "megatron.core",
        "loftq_config": {},
        **config,
    }
    tensors = {}
    for name, module in linears(model, endings).items():
        layers = said["layers_to_transform"]
        if layers and int(name.split(".")[-3]) not in layers:
            continue
        own = said["rank_pattern"].get(name.split(".")[-1], rank)
        outputs, inputs = shape(module)
        down = torch.randn(own, inputs, generator=generator) / inputs**0.5
        up = gain * torch.randn(outputs, own, generator=generator) / own
        key = f"base_model.model.{name}.lora_"
        tensors[f"{key}A.weight"], tensors[f"{key}B.weight"] = down.to(dtype), up.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@torch.no_grad()
def merge(model: PreTrainedModel, folder: Path, scales: Mapping[str, float] | None = None) -> None:
    """Add scale · B A to the model's weights. `scales` by the endings of names, where it is not
    alpha / r of the config."""
    said = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    for key, down in tensors.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        scale = (scales or {}).get(name.split(".")[-1], said["lora_alpha"] / said["r"])
        delta = scale * tensors[key.replace("lora_A", "lora_B")].double() @ down.double()
        weight: Any = modules[name].weight
        weight += (delta.T if isinstance(modules[name], Conv1D) else delta).to(weight.dtype)


def adapt(model: PreTrainedModel, folder: Path) -> None:
    """Have the model's linears add scale · B (A x) to what they give, in the order of PEFT."""
    said = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    scale = said["lora_alpha"] / said["r"]
    for key, down in tensors.items():
        if ".lora_A." in key:
            up = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            modules[name].register_forward_hook(_adds(down, up, scale))


def _adds(down: torch.Tensor, up: torch.Tensor, scale: float) -> Any:
    def add(module: nn.Module, inputs: Any, result: torch.Tensor) -> torch.Tensor:
        return result + nn.functional.linear(nn.functional.linear(inputs[0], down), up) * scale

    return add


def change(folder: Path, shapes: Mapping[str, Sequence[int] | None]) -> None:
    """Put tensors of ones into an adapter's file; None takes one out."""
    path = folder / "adapter_model.safetensors"
    found = load_file(path)
    for name, size in shapes.items():
        found.pop(name, None)
        if size is not None:
            found[name] = torch.ones(*size)
    save_file(found, path)
