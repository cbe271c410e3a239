"""Sequences moved between three engines at random steps, 1,000 times: all streams equal.

    python tests/attacks/migrations.py [--migrations 1000] [--faults]

Models that attend in full and in windows, a hybrid, and the paged baseline; every policy; copies
in stages and at once, beside the steps and between them. With `--faults` messages are lost, doubled
and late, engines rest, clients go away, and one engine of each run dies. Some minutes.
`tests/runtime/engine/test_migration.py` and `test_migration_faults.py` are its short form.
"""

import argparse
import itertools
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import migrating
import torch
import zoo
from vkv.allocator.transfer import Copier
from vkv.runtime.engine.messages import Abort
from vkv.runtime.engine.migration.carriers import CopyCarrier
from vkv.runtime.engine.migration.handshake import Stages

_CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "llama", {}),
    ("whole prompts", "llama", {"policy": "prefill_first"}),
    ("short steps", "llama", {"max_batch_tokens": 24}),
    ("by priority", "llama", {"scheduling_policy": "priority"}),
    ("fair", "llama", {"scheduling_policy": "fair"}),
    ("little memory", "llama", {"kv_memory": 24 * 4096}),
    ("swapped", "llama", {"kv_memory": 24 * 4096, "swap_memory": 8 << 20}),
    ("none parked", "llama", {"max_parked": 0}),
    ("zeroed", "llama", {"sanitize": "zero", "split_kv": True}),
    ("overlap", "llama", {"overlap": True}),
    ("paged", "llama", {"kv": "paged", "attention": "paged_sdpa"}),
    ("windows", "mistral", {}),
    ("hybrid", "qwen3_next", {}),
]
_STAGES = [
    Stages(small_tokens=4, spare_tokens=8),
    Stages(most=0),
    Stages(most=3, small_tokens=0, spare_tokens=4),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--migrations", type=int, default=1000, help="that moved something, in all")
    parser.add_argument("--faults", action="store_true", help="with everything that can go wrong")
    given = parser.parse_args()
    specs = migrating.specs(migrating.prompts(), max_tokens=40)
    alone: dict[str, migrating.Streams] = {}
    num_moved, num_stayed, start = 0, 0, time.perf_counter()
    reasons: Counter[str] = Counter()
    for seed in itertools.count():
        for label, model_type, options in _CASES:
            model = zoo.tiny_model(model_type)
            if model_type not in alone:
                alone[model_type] = migrating.undisturbed(model, specs)
            copier = Copier(torch.device("cpu")) if seed % 2 else None
            draw = random.Random(seed)
            with migrating.rig(
                model,
                3,
                stages=_STAGES[seed % len(_STAGES)],
                carrier=CopyCarrier(copier),
                channel=migrating.at_random(draw, 0.2 if given.faults else 0.0),
                **options,
            ) as rig:
                rig.add(specs)
                gone = _drive(rig, draw, faults=given.faults)
                counts = rig.migrations.arbiter.counts
            if copier is not None:
                copier.stop()
            _compare(rig.streams, alone[model_type], gone, f"{label}, seed {seed}")
            num_moved += counts.moved
            num_stayed += counts.stayed
            reasons.update(map(_kind, rig.reasons))
            sys.stdout.write(
                f"{label}: {num_moved} moved, {num_stayed} stayed, "
                f"{time.perf_counter() - start:.0f} s\n"
            )
            sys.stdout.flush()
            if num_moved >= given.migrations:
                _tell(reasons)
                return


def _kind(why: str) -> str:
    """A reason without what it is of."""
    why = re.sub(r"\('(\d+)', (\d+)\)|<?Request\([^)]*\)>?|request '\d+'", "it", why)
    return re.sub(r"\d+", "…", why)


def _tell(reasons: Counter[str]) -> None:
    """Why sequences stayed, the most frequent reason first."""
    sys.stdout.write(f"{reasons.total()} stayed or were lost:\n")
    for why, count in reasons.most_common():
        sys.stdout.write(f"  {count:5}  {why}\n")


def _drive(rig: migrating.Rig, draw: random.Random, *, faults: bool) -> set[str]:
    """Turn to the end; returns the requests whose clients went away."""
    gone: set[str] = set()
    resting: list[str] = []
    dies_at = draw.randrange(5, 60) if faults else None
    while rig.unfinished:
        rig.move_some(draw, 0.25)
        if faults and draw.random() < 0.1:
            resting = draw.sample(rig.migrations.instances, draw.randint(0, 1))
        if faults and draw.random() < 0.02:
            request_id = draw.choice(rig.unfinished)[0]
            gone.add(request_id)
            rig.migrations.tell(Abort(request_id))
        if rig.num_turns == dies_at:
            rig.migrations.died(draw.choice(rig.migrations.instances))
        rig.turn(resting)
    rig.finish()
    return gone


def _compare(
    got: migrating.Streams, expected: migrating.Streams, gone: set[str], label: str
) -> None:
    for key, stream in got.items():
        wanted = expected[key]
        if key[0] in gone:
            assert wanted.token_ids[: len(stream.token_ids)] == stream.token_ids, (label, key)
            continue
        assert stream.token_ids == wanted.token_ids, (label, key)
        assert stream.ends == wanted.ends, (label, key)


if __name__ == "__main__":
    main()
