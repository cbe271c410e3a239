"""The models that are soaked: one, a fine-tune of it, adapters, and the same in 4 bits."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ...quant.quantise.model import quantize_model
from ...quant.quantise.rounding import Rounding
from ...quant.quantise.save import save_quantized
from ...runtime.blocks.zoo import BlockZoo
from .tiny import VOCAB_SIZE, letter_tokenizer, sharpen

MAX_LEN = 8192
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": None,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
BASE, TUNED, INT4 = "base", "tuned", "int4"


@dataclass(frozen=True)
class Models:
    """Where all of them are.

    Attributes:
        base, tuned, int4: folders of a model, of a fine-tune of it, and of the same in 4 bits.
        zoo: of the first two.
        adapters: folders, by name.
    """

    base: Path
    tuned: Path
    int4: Path
    zoo: Path
    adapters: Mapping[str, Path]


def save_models(home: Path, *, seed: int) -> Models:
    """All of them, in folders of `home`."""
    made = Models(
        base=home / BASE,
        tuned=home / TUNED,
        int4=home / INT4,
        zoo=home / "zoo",
        adapters={name: home / name for name in ("adapter-a", "adapter-b")},
    )
    model = _model(seed)
    _save(model, made.base)
    for number, (name, folder) in enumerate(made.adapters.items(), 1):
        _save_adapter(model, folder, rank=4 * number, seed=seed + number, base=name)
    tuned = _model(seed)
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if re.search(r"layers\.2\.|lm_head", name) and weight.ndim > 1:
                weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    _save(tuned, made.tuned)
    zoo = BlockZoo.create(made.zoo)
    zoo.add(made.base, BASE)
    zoo.add(made.tuned, TUNED)
    rounded = quantize_model(
        _model(seed), rounding=Rounding(group_size=32, symmetric=True, clip=False)
    )
    save_quantized(rounded, made.int4, format="gptq")
    letter_tokenizer().save_pretrained(made.int4)
    return made


def _model(seed: int) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_SIZES)).eval()
    sharpen(model, seed=seed)
    return model


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)


def _save_adapter(model: PreTrainedModel, folder: Path, *, rank: int, seed: int, base: str) -> None:
    """Random weights, strong enough to change most tokens, as PEFT's `save_pretrained` writes."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(_TARGETS):
            key = f"base_model.model.{name}.lora_"
            down = torch.randn(rank, module.in_features, generator=generator)
            up = torch.randn(module.out_features, rank, generator=generator)
            tensors[f"{key}A.weight"] = down / module.in_features**0.5
            tensors[f"{key}B.weight"] = up / rank
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(_TARGETS),
        "base_model_name_or_path": base,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
