"""Thousands of equal prompts planted by tenants that share one engine: nobody is given, finds or
could see what is another's.

    python tests/attacks/tenants.py [--count 4000]
    python tests/attacks/tenants.py --cost    # what it takes to clear memory between them

By salts, adapters and names, and by every way that keys and values take: prefixes, donors, parked
slots, host memory, files, preemption, guesses, the paged baseline. Some minutes.
`tests/runtime/frontend/test_tenants_apart.py` is its short form.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import planted
import torch
import zoo
from transformers import LlamaConfig, LlamaForCausalLM
from vkv import LLM
from vkv.allocator.transfer import kv_dir

_CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "little memory": {"kv_memory": "192KiB", "max_parked": 4},
    "none parked": {"max_parked": 0},
    "host memory": {"kv_memory": "320KiB", "max_parked": 2, "swap_memory": "8MiB"},
    "files": {"kv_memory": "512KiB", "max_parked": 2, "kv_dir": True},
    "overlap": {"overlap": True},
    "guesses": {"speculative": "ngram"},
    "whole prompts": {"policy": "prefill_first"},
    "fair": {"scheduling_policy": "fair", "kv_memory": "384KiB"},
    "movable": {"movable": True, "kv_memory": "512KiB"},
    "chunks": {"max_batch_tokens": 16},
    "packed": {"pack_weights": True},
    "zeroed": {"sanitize": "zero", "kv_memory": "320KiB"},
    "paged": {"kv": "paged", "attention": "paged_sdpa"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=4000, help="requests in all")
    parser.add_argument("--cost", action="store_true", help="measure clearing instead")
    asked = parser.parse_args()
    if asked.cost:
        measure()
        return
    count = asked.count // len(_CASES)
    kv_dir._LEAST_TOKENS = 20
    with tempfile.TemporaryDirectory() as home:
        adapters = planted.save_adapters(Path(home))
        alone = planted.Alone(adapters)
        for seed, (label, options) in enumerate(_CASES.items()):
            if options.get("kv_dir"):
                options = {**options, "kv_dir": Path(home) / "kept"}
            start = time.perf_counter()
            options = zoo.with_defaults({"max_seqs": 8, **options})
            model = zoo.tiny_model("llama")
            with LLM(model, device="cpu", adapters=adapters, **options) as llm:
                found = planted.run(llm, alone, count=count, seed=seed)
            assert found.num_foreign_rows == 0, (label, found)
            sys.stdout.write(
                f"{label}: {found.num_requests} requests alike, {found.num_found} prompt tokens "
                f"found, nobody else's, {time.perf_counter() - start:.0f} s\n"
            )


def measure() -> None:
    """Prompts that map and take over most of their memory, of one tenant and of as many as there
    are prompts, with and without clearing: in turns, medians over `never`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    prompts = zoo.random_prompts([256] * 24, seed=3)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(5):
        for sanitize in ("never", "tenants", "zero"):
            options: dict[str, Any] = {"kv_memory": "96MiB", "max_seqs": 4, "max_len": 512}
            with LLM(model, device="cpu", sanitize=sanitize, **options) as llm:
                for label, num_tenants in (("one tenant", 1), ("each its own", 24)):
                    salted: list[Any] = [
                        {"prompt_token_ids": one, "cache_salt": f"s{number % num_tenants}"}
                        for number, one in enumerate(prompts)
                    ]
                    llm.generate(salted[:8], zoo.greedy(1), progress=False)
                    start = time.process_time()
                    llm.generate(salted, zoo.greedy(4), progress=False)
                    times.setdefault((label, sanitize), []).append(time.process_time() - start)
    for (label, sanitize), found in times.items():
        ratio = statistics.median(found) / statistics.median(times[label, "never"])
        sys.stdout.write(
            f"{label}, {sanitize}: {min(found):.3f} s at least, {ratio:.3f} of never\n"
        )


if __name__ == "__main__":
    main()
