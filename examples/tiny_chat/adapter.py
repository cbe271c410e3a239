"""A LoRA adapter of random weights for the built-in model, as PEFT writes one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from . import model_path

_TARGETS = ("q_proj", "v_proj")


def save_random_adapter(folder: str | Path, *, rank: int = 8, seed: int = 0) -> Path:
    """Write the adapter into `folder`, which is made; returns it. It says nothing sensible."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path()))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(_TARGETS):
            key = f"base_model.model.{name}.lora_"
            down = torch.randn(rank, module.in_features, generator=generator)
            up = torch.randn(module.out_features, rank, generator=generator)
            tensors[f"{key}A.weight"] = down / module.in_features**0.5
            tensors[f"{key}B.weight"] = up / rank
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(_TARGETS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
