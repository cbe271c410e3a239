"""Two hundred seeded and greedy requests by every way there is to compute them: all tokens equal.

    python tests/attacks/repeatability.py [--count 200]

A few minutes. `tests/runtime/engine/test_repeatable.py` is its short form.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import repeatable
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="requests for each model")
    count = parser.parse_args().count
    cases = [(name, torch.bfloat16, bits) for name in repeatable.MODELS for bits in (False, True)]
    cases += [(name, torch.float32, False) for name in repeatable.MODELS]
    for name, dtype, in_4_bits in cases:
        start = time.perf_counter()
        repeatable.check(name, dtype, in_4_bits=in_4_bits, count=count)
        bits = "4 bits" if in_4_bits else str(dtype).removeprefix("torch.")
        sys.stdout.write(
            f"{name}, {bits}: {count} requests alike, {time.perf_counter() - start:.0f} s\n"
        )


if __name__ == "__main__":
    main()
