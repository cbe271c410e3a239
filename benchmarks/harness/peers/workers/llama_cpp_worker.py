"""llama.cpp through llama-cpp-python's low-level API, in an environment of its own.

Its model file is written here, from the same safetensors, with the `gguf` package: in bfloat16, or
with linear layers in Q4_0 and embeddings and output layer in Q8_0; llama.cpp itself makes Q4_K_M of
the first. All sequences decode together in one batch; a prompt is cut into batches of at most 2,048
tokens.
"""

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as llama
from llama_gguf import bytes_of, write_gguf
from protocol import Clock, System, expect, serve

_BATCH = 2048


def load(options: dict[str, Any]) -> System:
    folder, weights = Path(options["model"]), options.get("weights", "bf16")
    llama.llama_backend_init()
    path = _model_file(folder, Path(options["scratch"]), weights)
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
    ) -> list[list[int]]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        sequences = _Sequences(context, vocab_size, prompts, output_lens, clock)
        sequences.prefill()
        while sequences.live:
            sequences.decode()
        expect(sum(sequences.done), sum(output_lens))
        return sequences.outputs

    weight_bytes = llama.llama_model_size(model)
    looked_up = 0 if config.get("tie_word_embeddings") else bytes_of(path, "token_embd.weight")
    return System(generate, weight_bytes, weight_bytes - looked_up)


def _model_file(folder: Path, scratch: Path, weights: str) -> Path:
    """The model in these weights, made if it is not there."""
    path = scratch / f"model-{weights}.gguf"
    if path.exists():
        return path
    if weights != "q4_k_m":
        write_gguf(folder, path, weights)
        return path
    how, part = llama.llama_model_quantize_default_params(), path.with_suffix(".part")
    how.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_K_M
    whole = _model_file(folder, scratch, "bf16")
    if status := llama.llama_model_quantize(bytes(whole), bytes(part), ctypes.byref(how)):
        raise RuntimeError(f"llama.cpp makes no Q4_K_M of {whole}: {status}")
    part.rename(path)
    return path


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
        self.outputs: list[list[int]] = [[] for _ in prompts]

    @property
    def done(self) -> list[int]:
        return [len(tokens) for tokens in self.outputs]

    @property
    def live(self) -> list[int]:
        return [i for i, count in enumerate(self.done) if count < self.output_lens[i]]

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
            [
                (self.outputs[i][-1], len(self.prompts[i]) + len(self.outputs[i]) - 1, i, True)
                for i in self.live
            ]
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
                    self.outputs[sequence].append(int(logits.argmax()))
        finally:
            llama.llama_batch_free(batch)


if __name__ == "__main__":
    serve(load)
