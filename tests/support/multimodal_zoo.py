"""Tiny random models of text beside images or sound; only their text is asked for."""

from typing import Any

import torch
import zoo
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

_IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
}
_QWEN3_IMAGES: dict[str, Any] = {
    **_QWEN_IMAGES,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
_QWEN_IDS: dict[str, Any] = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_QWEN_TEXT: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# By `model_type`: that of the text's part and what sets it apart; what the whole model has beside.
_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llava": (
        "llama",
        {},
        {"vision_config": {**_IMAGES, "model_type": "clip_vision_model"}, "image_token_index": 90},
    ),
    "llava_onevision": (
        "qwen2",
        {},
        {
            "vision_config": {**_IMAGES, "model_type": "siglip_vision_model"},
            "image_token_index": 90,
        },
    ),
    "mistral3": (
        "mistral",
        {"sliding_window": None},
        {
            "vision_config": {**_IMAGES, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": 90,
        },
    ),
    "internvl": (
        "qwen2",
        {},
        {
            "vision_config": {
                **_IMAGES,
                "model_type": "internvl_vision",
                "image_size": [28, 28],
                "patch_size": [14, 14],
            },
            "image_token_id": 90,
        },
    ),
    "smolvlm": ("llama", {}, {"vision_config": _IMAGES, "image_token_id": 90, "scale_factor": 2}),
    "qwen2_vl": (
        "qwen2_vl_text",
        _QWEN_TEXT,
        {
            "vision_config": {
                "embed_dim": 32,
                "hidden_size": 32,
                "depth": 2,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 14,
            },
            **_QWEN_IDS,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl_text",
        _QWEN_TEXT,
        {"vision_config": {**_QWEN_IMAGES, "fullatt_block_indexes": [1]}, **_QWEN_IDS},
    ),
    "qwen3_vl": (
        "qwen3_vl_text",
        _QWEN_TEXT,
        {"vision_config": _QWEN3_IMAGES, **_QWEN_IDS},
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe_text",
        {**_QWEN_TEXT, **_EXPERTS},
        {"vision_config": _QWEN3_IMAGES, **_QWEN_IDS},
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {**_QWEN_TEXT, **_HYBRID},
        {"vision_config": {**_QWEN_IMAGES, "num_position_embeddings": 16}, **_QWEN_IDS},
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {**_QWEN_TEXT, **_HYBRID, **_EXPERTS, "shared_expert_intermediate_size": 24},
        {"vision_config": {**_QWEN_IMAGES, "num_position_embeddings": 16}, **_QWEN_IDS},
    ),
    "voxtral": (
        "llama",
        {},
        {
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_mel_bins": 16,
                "max_source_positions": 20,
            },
            "audio_token_id": 90,
        },
    ),
    "paligemma": (
        "gemma",
        {},
        {
            "vision_config": {**_IMAGES, "model_type": "siglip_vision_model"},
            "image_token_index": 90,
            "projection_dim": 32,
            "hidden_size": 32,
        },
    ),
    "mllama": (
        "mllama_text_model",
        {"cross_attention_layers": [1], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
            }
        },
    ),
}
_REFUSED = {"paligemma", "mllama"}
NAMES = tuple(name for name in _CASES if name not in _REFUSED)
NUM_TEXT_TOKENS = 90  # of the vocabulary; those behind stand for images and sounds


def tiny_multimodal(model_type: str) -> PreTrainedModel:
    """The whole model, sharp in its text as those of `zoo` are."""
    text_type, text, rest = _CASES[model_type]
    own = zoo.tiny_config(text_type, **text).to_dict()
    config = AutoConfig.for_model(model_type, text_config=own, **rest)
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, attn_implementation="eager")
    zoo.sharpen(model)
    return model.eval()


def text_prompts(lengths: list[int]) -> list[list[int]]:
    """Random prompts without images and sounds."""
    return [[t % NUM_TEXT_TOKENS for t in prompt] for prompt in zoo.random_prompts(lengths)]
