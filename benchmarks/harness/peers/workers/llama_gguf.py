"""A model file for llama.cpp, from a checkpoint folder, with the `gguf` package."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, path: Path, weights: str, *, has_words: bool = False) -> None:
    """A Llama checkpoint as llama.cpp reads it, in "bf16" or "q4_0".

    It has no vocabulary, or one of as many made-up words.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise RuntimeError(f"only Llama checkpoints are converted, not {config['model_type']}")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(path.with_suffix(".part")), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if has_words:
        _add_words(writer, config["vocab_size"])
    else:
        writer.add_tokenizer_model("none")
    for name, halves in _bfloat16_tensors(folder):
        new = _gguf_name(name)
        if ".attn_q." in new or ".attn_k." in new:  # rotary halves side by side, pair by pair
            count = heads if ".attn_q." in new else kv_heads
            halves = halves.reshape(count, 2, head_dim // 2, -1).swapaxes(1, 2)
            halves = np.ascontiguousarray(halves.reshape(count * head_dim, -1))
        if "norm" in new:
            writer.add_tensor(new, _as_float32(halves))
        elif weights == "bf16":
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(new, halves.view(np.uint8), raw_dtype=kind)
        else:
            kind = _quantized_kind(new)
            writer.add_tensor(new, gguf.quantize(_as_float32(halves), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(path.with_suffix(".part"), path)


def bytes_of(path: Path, name: str) -> int:
    """What a tensor of a file takes in it."""
    return sum(int(one.n_bytes) for one in gguf.GGUFReader(path).tensors if one.name == name)


def _add_words(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """A vocabulary of SentencePiece's kind: what its server cannot do without."""
    kinds = gguf.TokenType
    special = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    special += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    words = [(f"\u2581w{number}", kinds.NORMAL) for number in range(len(special), vocab_size)]
    names, types = zip(*special, *words, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _quantized_kind(name: str) -> gguf.GGMLQuantizationType:
    """As llama.cpp's own Q4_0 files, whose Q6_K for the largest tensors gguf cannot write."""
    if name.startswith("blk."):
        return gguf.GGMLQuantizationType.Q4_0
    return gguf.GGMLQuantizationType.Q8_0


def _as_float32(halves: np.ndarray) -> np.ndarray:
    """bfloat16, as raw 16-bit values, in float32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)  # model.layers.N.rest
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def _bfloat16_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and raw 16-bit values: numpy has no bfloat16, and needs none to move it."""
    for file in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(file, dtype=np.uint8, mode="r")
        header_bytes = int(raw[:8].view(np.uint64)[0])
        header = json.loads(raw[8 : 8 + header_bytes].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise RuntimeError(f"{name} is {entry['dtype']}; llama.cpp is given bfloat16 only")
            first, last = (8 + header_bytes + offset for offset in entry["data_offsets"])
            yield name, np.array(raw[first:last]).view(np.uint16).reshape(entry["shape"])
