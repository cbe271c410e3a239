"""Requests moved to memory, to files and back at random steps, 2,000 times: all tokens equal.

    python tests/attacks/moves.py [--moves 2000]

Models that attend in full and in windows, a hybrid, and the paged baseline; every policy; copies
beside the steps and at once; with files that outlive each run. Some ten minutes.
`tests/runtime/engine/test_swapping.py` and `test_kv_dir.py` are its short form.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import moved
import zoo
from vkv.allocator.transfer import kv_dir

_SWAP = 16 << 20
_CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "llama", {}),
    ("whole prompts", "llama", {"policy": "prefill_first"}),
    ("by priority", "llama", {"scheduling_policy": "priority"}),
    ("fair", "llama", {"scheduling_policy": "fair"}),
    ("little memory", "llama", {"kv_memory": 32 * 4096}),
    ("none parked", "llama", {"max_parked": 0}),
    ("zeroed", "llama", {"sanitize": "zero", "split_kv": True}),
    ("overlap", "llama", {"overlap": True}),
    ("paged", "llama", {"kv": "paged", "attention": "paged_sdpa"}),
    ("windows", "mistral", {}),
    ("hybrid", "qwen3_next", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=2000, help="forced moves in all")
    wanted = parser.parse_args().moves
    kv_dir._LEAST_TOKENS = 20
    prompts = zoo.random_prompts([30, 5, 44, 18, 9, 27, 33, 61, 12, 40, 7, 22])
    prompts += [[*prompts[7][:48], 3 + number] for number in range(4)]
    specs = moved.specs(prompts, max_tokens=32)
    alone: dict[str, Any] = {}
    num_forced, num_fetched, start = 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in itertools.count():
            for label, model_type, options in _CASES:
                model = zoo.tiny_model(model_type)
                if model_type not in alone:
                    alone[model_type] = moved.run(model, specs, max_seqs=16).tokens
                files = {} if model_type == "qwen3_next" else {"kv_dir": folder}
                outcome = moved.run(
                    model,
                    specs,
                    num_moves=80,
                    seed=seed,
                    asynchronous=bool(seed % 2),
                    max_seqs=16,
                    swap_memory=_SWAP,
                    **(files if seed % 3 else {}),
                    **options,
                )
                wrong = [k for k, ids in outcome.tokens.items() if ids != alone[model_type][k]]
                assert not wrong, f"{label}, seed {seed}: other tokens in {wrong}"
                assert outcome.swap is not None
                num_forced += outcome.num_forced
                num_fetched += outcome.swap.fetched.num_moves
                sys.stdout.write(
                    f"{label}: {num_forced} moves, {num_fetched} copied back, "
                    f"{time.perf_counter() - start:.0f} s\n"
                )
                sys.stdout.flush()
                if num_forced >= wanted:
                    return


if __name__ == "__main__":
    main()
