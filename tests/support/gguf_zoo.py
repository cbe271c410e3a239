"""Tiny models as GGUF files, written with the `gguf` package under llama.cpp's names."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import zoo
from transformers import PreTrainedModel

# llama.cpp's architecture, and that of transformers.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
}
_GEMMA: dict[str, Any] = {  # what its files leave out is as in the published 270M and 1B
    "num_hidden_layers": 6,
    "sliding_window": 13,
    "layer_types": None,
    "query_pre_attn_scalar": 256,
    "rope_parameters": None,
}
_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,  # as llama.cpp does, whatever a file says
}


def make(
    architecture: str,
    path: Path,
    kind: str,
    *,
    rope: dict[str, Any] | None = None,
    rope_factors: torch.Tensor | None = None,
    split: int = 0,
    **fields: Any,
) -> PreTrainedModel:
    """Write a model whose matrices are in `kind`; returns it with the weights that the file has.

    With `rope`, the model has these parameters, which a file has as factors only. With `split`,
    parts have so many tensors each, and are called as llama.cpp calls them.
    """
    options = dict(_SIZES)
    if architecture == "qwen3moe":
        options |= _EXPERTS
    if architecture == "gemma3":
        options |= _GEMMA
    if rope is not None:
        options["rope_parameters"] = rope
    model = zoo.tiny_model(ARCHITECTURES[architecture], **options)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    _write_config(writer, model.config, architecture, fields)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        for stem, part in _parts(name, parameter.data):
            _write(writer, names, stem, part, model.config, architecture, kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _parts(name: str, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a file has of a parameter; views, for fused experts."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = weight.chunk(2, dim=1)
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", weight)]
    return [(name, weight)]


def _write(
    writer: Any,
    names: Any,
    name: str,
    weight: torch.Tensor,
    config: Any,
    architecture: str,
    kind: str,
) -> None:
    """One tensor; what the file rounds is rounded in `weight` too."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    values = weight.float().numpy()
    order = np.arange(len(values))
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        order = order.reshape(heads, 2, -1).swapaxes(1, 2).flatten()
    if architecture == "gemma3" and "norm" in name:
        writer.add_tensor(found, values + 1)
        return
    if weight.ndim < 2 or kind == "F32":
        writer.add_tensor(found, np.ascontiguousarray(values[order]))
        return
    quant = gguf.GGMLQuantizationType[kind]
    data = gguf.quantize(np.ascontiguousarray(values[order]), quant)
    writer.add_tensor(found, data, raw_dtype=quant)
    rounded = torch.from_numpy(gguf.dequantize(data, quant)[np.argsort(order)])
    weight.copy_(rounded)


def _write_config(writer: Any, config: Any, architecture: str, fields: dict[str, Any]) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if "tokenizer.ggml.model" not in fields:
        writer.add_tokenizer_model("none")
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
