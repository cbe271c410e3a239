"""llama.cpp through llama-cpp-python's low-level API, in an environment of its own.

Its model file is written here, from the same safetensors, with the `gguf` package: in bfloat16, or
with linear layers in Q4_0 and embeddings and output layer in Q8_0. All sequences decode together in
one batch; a prompt is cut into batches of at most 2,048 tokens.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_cpp import llama_cpp as llama
from protocol import Clock, System, expect, serve

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
_BATCH = 2048


def load(options: dict[str, Any]) -> System:
    folder = Path(options["model"])
    weights = options.get("weights", "bf16")
    path = Path(options["scratch"]) / f"model-{weights}.gguf"
    if not path.exists():
        write_gguf(folder, path, weights)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    context_options = llama.llama_context_default_params()
    context_options.n_ctx = options["total_tokens"]
    context_options.n_batch = _BATCH
    context_options.n_seq_max = options["max_seqs"]
    context_options.n_threads = context_options.n_threads_batch = options["threads"]
    context_options.kv_unified = True
    context = llama.llama_init_from_model(model, context_options)
    if not context:
        raise RuntimeError("llama.cpp makes no context of this size")
    config = json.loads((folder / "config.json").read_text())
    vocab_size = config["vocab_size"]

    def generate(
        prompts: Sequence[Sequence[int]], output_lens: Sequence[int], clock: Clock
    ) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        sequences = _Sequences(context, vocab_size, prompts, output_lens, clock)
        sequences.prefill()
        while sequences.live:
            sequences.decode()
        expect(sum(sequences.done), sum(output_lens))

    weight_bytes = llama.llama_model_size(model)
    block = 34 / 32 if weights == "q4_0" else 2  # bytes an element of the embedding
    looked_up = (
        0 if config.get("tie_word_embeddings") else vocab_size * config["hidden_size"] * block
    )
    return System(generate, weight_bytes, weight_bytes - int(looked_up))


class _Sequences:
    """Requests that are prefilled in turn and then decode together."""

    def __init__(
        self,
        context: Any,
        vocab_size: int,
        prompts: Sequence[Sequence[int]],
        output_lens: Sequence[int],
        clock: Clock,
    ) -> None:
        self.context = context
        self.clock = clock
        self.vocab_size = vocab_size
        self.prompts = prompts
        self.output_lens = output_lens
        self.done = [0] * len(prompts)
        self.last = [0] * len(prompts)

    @property
    def live(self) -> list[int]:
        return [i for i, done in enumerate(self.done) if done < self.output_lens[i]]

    def prefill(self) -> None:
        """All prompts, flat over the sequences, in batches of at most `_BATCH` tokens."""
        flat = [
            (token, position, index, position == len(prompt) - 1)
            for index, prompt in enumerate(self.prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(flat), _BATCH):
            self._run(flat[start : start + _BATCH])

    def decode(self) -> None:
        self._run(
            [(self.last[i], len(self.prompts[i]) + self.done[i] - 1, i, True) for i in self.live]
        )

    def _run(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for row, (token, position, sequence, wanted) in enumerate(tokens):
                batch.token[row] = token
                batch.pos[row] = position
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = wanted
            if status := llama.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode returned {status}")
            self.clock.step(sequence for _, _, sequence, wanted in tokens if wanted)
            for row, (_, _, sequence, wanted) in enumerate(tokens):
                if wanted:
                    found = llama.llama_get_logits_ith(self.context, row)
                    logits = np.ctypeslib.as_array(found, (self.vocab_size,))
                    self.last[sequence] = int(logits.argmax())
                    self.done[sequence] += 1
        finally:
            llama.llama_batch_free(batch)


def write_gguf(folder: Path, path: Path, weights: str) -> None:
    """A Llama checkpoint as llama.cpp reads it, in "bf16" or "q4_0"; it has no vocabulary."""
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


if __name__ == "__main__":
    serve(load)
