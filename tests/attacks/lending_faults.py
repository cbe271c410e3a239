"""Instances that lend each other memory are killed, stopped and told to leave: no wrong token.

    python tests/attacks/lending_faults.py [--runs 200] [--seed 0] [--minutes 600] [--instances 5]
                                           [--only FAULT …]

In each run one or two requests that are longer than an instance's memory, and short neighbours, run
on a cluster. At a random moment whoever lends or borrows, or both, is killed, stopped for good,
stopped for a while, or told to leave; or a lender gets requests of its own that need the memory.
Each stream must end whole, with the tokens of one engine with a large pool; with an error only
where those that are left have no room. After each run instances must hold no page, and nothing of
those that ended may be left. What died is replaced.
`tests/runtime/cluster/test_lending_faults.py` is its short form.
"""

import argparse
import faulthandler
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import lending_attack
from vkv import LLM


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="at most")
    parser.add_argument("--instances", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=lending_attack.FAULTS)
    given = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)  # says where it is
    draw, faults = random.Random(given.seed), given.only or lending_attack.FAULTS
    ends_s = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory(prefix="vkv-lending-") as name:
        folder = Path(name)
        lending_attack.save_model(folder)
        with LLM(folder, **lending_attack.OPTIONS) as llm:
            pool = lending_attack.items(llm)
        with lending_attack.attacked(folder, pool, seed=given.seed, size=given.instances) as attack:
            left: list[str] = []
            while len(attack.runs) < given.runs and time.monotonic() < ends_s and not attack.wrong:
                left = left or draw.sample(faults, len(faults))
                start_s = time.monotonic()
                run = attack.run(left.pop())
                _say(
                    f"{len(attack.runs)} of {given.runs}: {run.fault}, {run.moment}, stood still "
                    f"{run.waits_s:.2f} s, {time.monotonic() - start_s:.1f} s {run.errors or ''}"
                )
            for line in attack.told():
                _say(line)
            _say("WRONG:\n" + "\n".join(attack.wrong) if attack.wrong else "nothing was wrong")
            return 1 if attack.wrong else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
