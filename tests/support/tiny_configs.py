"""Configs of tiny models of any architecture, made by walking through the fields of its own.

`zoo` has hand-made ones of those that the tests hold; here are all others, for `tests/sweep.py`.
"""

from typing import Any

import zoo
from transformers import AutoConfig, PretrainedConfig
from virtual_zoo import VIRTUAL

WINDOW = 13
_MOST_LAYERS = 4
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# By the field's name, wherever it stands, if the config has it and it is a number.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "unpadded_vocab_size"), zoo.VOCAB_SIZE),
    "vocab_size_per_layer_input": zoo.VOCAB_SIZE,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("embedding_dim", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("hidden_size_global", "dim_model_base", "backbone_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dim_ff", "dff", "d_inner"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "mlp_dim"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("shared_intermediate_size", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size"), 24),
    "moe_shared_expert_intermediate_size": 24,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_query_groups"), 2),
    "swa_num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "attention_head_dim", "attention_head_size", "swa_head_dim"), 8),
    **dict.fromkeys(("dim_head", "d_head", "kv_channels", "global_head_dim", "d_kv"), 8),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_global_layers", "depth"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("model_max_length", "context_length", "max_target_positions"), 512),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("attention_window_size", "attention_chunk_size", "local_attention"), WINDOW),
    "local_attention_window_len": WINDOW,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "moe_num_experts": 4,
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("kv_lora_rank", "o_lora_rank", "router_hidden_size", "hc_lowrank"), 16),
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 10,
    "query_pre_attn_scalar": 8,
    "rotary_dim": 4,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    **dict.fromkeys(("index_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim", "laurel_rank"), 8),
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads"), 2),
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "index_topk": 6,
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "time_step_rank", "mamba_dt_rank"), 8),
    "mamba_d_ssm": 64,
    "first_k_dense_replace": 1,
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    "image_size": 28,
    "patch_size": 14,
}
_NOTHING = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id")
_ON = ("is_decoder", "use_cache")
_OFF = ("tie_word_embeddings",)

# What the walk cannot know, over what it finds.
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # where it must be a number
_INDEXED = {  # attention to blocks that an indexer picks
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 4,
}
_DOTS3 = {
    "num_key_value_heads": 4,
    "swa_num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "swa_kv_lora_rank": 16,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        kind: {**_ROPE, "mrope_section": [2, 1, 1]}
        for kind in ("sliding_attention", "full_attention")
    },
}
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_KNOWN: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [2, 3],
    },
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "cosmos3_edge": {"text_config": _SECTIONS},
    "cwm": _IDS,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "hidden_size": 32,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "emu3": {"text_config": _IDS},
    "gemma4": {"text_config": _IDS},
    "gemma4_unified": {"text_config": _IDS},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    **{
        name: {"text_config": _SECTIONS}
        for name in (
            "glm46v",
            "glm4v",
            "glm_ocr",
            "glmga",
            "paddleocr_vl",
            "qwen2_5_vl",
            "qwen2_vl",
        )
    },
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4}},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                **_ROPE,
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.5,
            }
        }
    },
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "mllama": {"text_config": _IDS},
    "modernbert-decoder": {**_IDS, "cls_token_id": 1, "sep_token_id": 2},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
}


def config_of(model_type: str) -> PretrainedConfig:
    """A tiny config of `model_type`. Raises whatever the architecture's own code raises."""
    if model_type in zoo.ARCHITECTURES | zoo.HYBRIDS:
        return zoo.tiny_config(model_type)
    default = AutoConfig.for_model(model_type)
    tiny = _tiny(default)
    known = {**VIRTUAL.get(model_type, {}), **_KNOWN.get(model_type, {})}
    for name, value in known.items():
        both = isinstance(value, dict) and isinstance(tiny.get(name), dict)
        tiny[name] = {**tiny[name], **value} if both else value
    return type(default)(**tiny)


def _tiny(default: PretrainedConfig) -> dict[str, Any]:
    """Fields of a tiny config of the same class."""
    fields = default.to_dict()
    tiny: dict[str, Any] = {}
    for name, value in fields.items():
        if name in default.sub_configs:
            sub = getattr(default, name)
            if isinstance(sub, PretrainedConfig):
                tiny[name] = _tiny(sub)
        elif name in _NOTHING:
            tiny[name] = None
        elif name in _ON or name in _OFF:
            tiny[name] = name in _ON
        elif "dropout" in name and isinstance(value, float):
            tiny[name] = 0.0
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            tiny[name] = _SIZES[name]
    if "kv_lora_rank" in fields:  # latent attention, whose rotary part alone has `head_dim`
        tiny |= {name: 4 for name in ("num_key_value_heads", "head_dim") if name in fields}
    rope = fields.get("rope_parameters") or {}
    if "mrope_section" in rope:  # halves of a head's rotary part, for time, height and width
        half = int(tiny.get("head_dim", 8) * rope.get("partial_rotary_factor", 1.0)) // 2
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        tiny["rope_parameters"] = {**rope, "mrope_section": sections}
    for name in _LAYERS:
        if name in fields and isinstance(fields[name], int):
            chosen = _chosen_layers(fields, fields[name])
            tiny |= {
                key: [value[i] for i in chosen]
                for key, value in fields.items()
                if isinstance(value, list) and len(value) == fields[name]
            }
            tiny[name] = len(chosen)
    return {"model_type": default.model_type, **tiny} if tiny else {}


def _chosen_layers(fields: dict[str, Any], num_layers: int) -> list[int]:
    """Indices of layers, of each kind one, and two at least."""
    names = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
    lists = [fields[n] for n in names if isinstance(fields.get(n), list)]
    kinds: dict[Any, int] = {}
    for index in range(num_layers):
        kinds.setdefault(tuple(str(kind[index]) for kind in lists if index < len(kind)), index)
    chosen = sorted(kinds.values())[:_MOST_LAYERS]
    rest = [i for i in range(num_layers) if i not in chosen]
    return sorted(chosen + rest[: max(2 - len(chosen), 0)])
