"""OpenVINO GenAI's continuous batching, in an environment of its own.

Its model is made here, once a run, of the same safetensors. Dense weights run in the benchmark's
type, with keys and values in it too. In 4 bits it runs as it does by default: keys and values in 8
bits, and activations rounded to 8 bits ahead of each product, in groups of 32.
"""

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol import Clock, System, expect, serve

_BLOCK_TOKENS = 32  # of its cache on a CPU
_NEEDED = ("openvino_genai", "optimum.intel", "nncf", "openvino_tokenizers")
_REMEDY = "pip install openvino-genai optimum-intel nncf"
_PRECISIONS = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}


def load(options: dict[str, Any]) -> System:
    _check_packages()
    import openvino_genai as genai

    weights = options.get("weights", "dense")
    folder = _converted(Path(options["model"]), Path(options["scratch"]), weights)
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = options["max_seqs"]
    scheduler.num_kv_blocks = (
        math.ceil(options["total_tokens"] / _BLOCK_TOKENS) + options["max_seqs"]
    )
    scheduler.enable_prefix_caching = False  # the same prompts come again
    pipeline = genai.ContinuousBatchingPipeline(
        str(folder), scheduler, "CPU", _properties(options, weights)
    )

    config = json.loads((Path(options["model"]) / "config.json").read_text())
    no_token = config["vocab_size"]

    def generate(
        prompts: Sequence[Sequence[int]], output_lens: Sequence[int], clock: Clock
    ) -> list[list[int]]:
        handles = [
            pipeline.add_request(number, _tensor(prompt), _config(genai, length, no_token))
            for number, (prompt, length) in enumerate(zip(prompts, output_lens, strict=True))
        ]
        tokens: list[list[int]] = [[] for _ in prompts]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            came = []
            for number, handle in enumerate(handles):
                if handle.can_read():
                    new = [t for out in handle.read().values() for t in out.generated_ids]
                    tokens[number] += new
                    came += [number] * len(new)
            clock.step(came)
        expect(sum(map(len, tokens)), sum(output_lens))
        return tokens

    weight_bytes = (folder / "openvino_model.bin").stat().st_size
    return System(generate, weight_bytes, weight_bytes - _looked_up_bytes(config, options, weights))


def _looked_up_bytes(config: dict[str, Any], options: dict[str, Any], weights: str) -> int:
    """Bytes of the embedding, of which a step reads some rows; none if the output layer is it."""
    if config.get("tie_word_embeddings"):
        return 0
    item_bytes = 1 if weights == "int4" else 4 if options["dtype"] == "float32" else 2
    return config["vocab_size"] * config["hidden_size"] * item_bytes


def _check_packages() -> None:
    for name in _NEEDED:
        try:
            importlib.import_module(name.partition(".")[0])
        except ImportError as error:
            raise RuntimeError(f"{error}; into the peer's environment: {_REMEDY}") from error


def _converted(model: Path, scratch: Path, weights: str) -> Path:
    """The folder with the model as OpenVINO reads it, made if there is none yet."""
    out = scratch / f"openvino-{weights}"
    if not out.exists():
        script = Path(__file__).with_name("openvino_model.py")
        command = [sys.executable, str(script), str(model), str(out), weights]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise RuntimeError(
                f"Optimum Intel does not convert {model}: {said}; its packages have "
                f"to fit one another, as with {_REMEDY}"
            )
    return out


def _properties(options: dict[str, Any], weights: str) -> dict[str, Any]:
    precision = _PRECISIONS[options["dtype"]]
    own = {"KV_CACHE_PRECISION": precision}
    if weights == "int4":
        own = {"KV_CACHE_PRECISION": "u8", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}
    threads = {"INFERENCE_NUM_THREADS": options["threads"]}
    return {"INFERENCE_PRECISION_HINT": precision, **threads, **own}


def _tensor(prompt: Sequence[int]) -> Any:
    import numpy as np
    from openvino import Tensor

    return Tensor(np.array([prompt], dtype=np.int64))


def _config(genai: Any, length: int, no_token: int) -> Any:
    """Greedy, and as long as is asked. It needs an end token, if only to ignore it."""
    config = genai.GenerationConfig()
    config.set_eos_token_id(no_token)
    config.do_sample, config.ignore_eos = False, True
    config.max_new_tokens = length
    return config


if __name__ == "__main__":
    serve(load)
