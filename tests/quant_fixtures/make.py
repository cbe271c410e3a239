"""Writes the fixtures beside it: one linear layer, as auto-round and compressed-tensors store it.

A tool for development alone, in an environment of its own:

    pip install auto-round==0.16.1 compressed-tensors==0.20.0
    python tests/quant_fixtures/make.py

Each file has the stored tensors, the checkpoint's quantization_config as metadata, and `expected`,
the weight that the writing library itself computes with.
"""

import copy
import json
import os
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parents[1] / "examples" / "tiny_chat" / "model"
LAYER = "model.layers.0.self_attn.k_proj"
FORMATS = ("auto_gptq", "auto_awq", "auto_round", "auto_round:auto_awq", "llm_compressor")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=1536,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).half()


def rounded_by_auto_round(model: LlamaForCausalLM, fmt: str, symmetric: bool, out: Path) -> Path:
    """The folder that auto-round writes in `fmt`; "fake" holds the weights it computes with."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rounder = AutoRound(
        copy.deepcopy(model),
        tokenizer,
        bits=4,
        group_size=32,
        sym=symmetric,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
    )
    rounder.quantize_and_save(str(out), format=fmt)
    return next(path.parent for path in out.rglob("model.safetensors"))


def auto_round_fixtures() -> None:
    model = tiny_model()
    for symmetric in (True, False):
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)  # where auto-round leaves files of its own
            fake = rounded_by_auto_round(model, "fake", symmetric, Path(scratch) / "fake")
            expected = load_file(fake / "model.safetensors")[f"{LAYER}.weight"]
            for fmt in FORMATS:
                folder = rounded_by_auto_round(
                    model, fmt, symmetric, Path(scratch) / fmt.replace(":", "-")
                )
                config = json.loads((folder / "config.json").read_text())["quantization_config"]
                stored = load_file(folder / "model.safetensors")
                tensors = {
                    name.removeprefix(f"{LAYER}."): tensor
                    for name, tensor in stored.items()
                    if name.startswith(f"{LAYER}.")
                }
                name = f"{fmt.replace(':', '-')}-{'sym' if symmetric else 'asym'}"
                write(name, tensors, expected, config)


def compressed_tensors_fixtures() -> None:
    """Random weights, scales and zeros, whole rows to a scale included."""
    torch.manual_seed(0)
    weight = torch.randn(32, 64).half()
    for symmetric in (True, False):
        for group_size in (32, None):
            groups = 1 if group_size is None else 64 // group_size
            args = QuantizationArgs(
                num_bits=4,
                type="int",
                symmetric=symmetric,
                strategy="channel" if group_size is None else "group",
                group_size=group_size,
            )
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            state = {
                "weight": weight,
                "weight_scale": torch.rand(32, groups).half() / 4 + 0.1,
                "weight_zero_point": torch.zeros(32, groups, dtype=torch.int8)
                if symmetric
                else torch.randint(-8, 8, (32, groups), dtype=torch.int8),
            }
            stored = PackedQuantizationCompressor.compress(state, scheme)
            expected = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
            config = {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "ignore": [],
                "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
            }
            size = "rows" if group_size is None else "groups"
            kind = "sym" if symmetric else "asym"
            write(f"compressed_tensors-{size}-{kind}", stored, expected, config)


def write(name: str, tensors: dict, expected: torch.Tensor, config: dict) -> None:
    save_file(
        {**tensors, "expected": expected.contiguous()},
        HERE / f"{name}.safetensors",
        metadata={"quantization_config": json.dumps(config)},
    )


if __name__ == "__main__":
    auto_round_fixtures()
    compressed_tensors_fixtures()
