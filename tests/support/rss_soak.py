"""Resident memory over steps of every number of rows, beside what `stats()` accounts for.

    python tests/support/rss_soak.py float32|bfloat16 MAX_ROWS

Prints one line of JSON: bytes that the process grew by while keys and values stayed accounted for,
the bytes of pages and `working_bytes`. In a process of its own, since its heap is measured.
"""

import gc
import json
import sys

import torch
import zoo
from vkv import LLM, SamplingParams
from vkv.quant import trim_heap


def resident_bytes() -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def main(dtype: torch.dtype, max_rows: int) -> None:
    model = zoo.tiny_model(
        "llama",
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
    ).to(dtype)
    prompts = zoo.random_prompts(list(range(1, max_rows)))
    once = SamplingParams(max_tokens=2, seed=1)
    with LLM(
        model, pack_weights=True, max_batch_tokens=max_rows, max_seqs=8, prefix_reuse=False
    ) as llm:
        llm.generate(zoo.random_prompts([3, 5]), once)  # whatever is made once
        gc.collect()
        trim_heap()
        before = resident_bytes() - llm.stats().physical_bytes
        for prompt in prompts:
            llm.generate([prompt], once)
        stats = llm.stats()
        grown = resident_bytes() - stats.physical_bytes - before
        report = {"grown": grown, "pages": stats.physical_bytes, "working": stats.working_bytes}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), int(sys.argv[2]))
