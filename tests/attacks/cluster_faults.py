"""Moves between instances of a cluster, each a process, with a fault for each: no wrong token.

    python tests/attacks/cluster_faults.py [--runs 1000] [--plain 0] [--by pages|copies|both]
                                           [--seed 0] [--minutes 600] [--tight] [--front-ends 0]

Requests of all kinds run on three instances and move between them. A man in the middle loses,
doubles and delays a move's messages, cuts the way of its keys and values, stops or kills its
source, its target or both, or has its client go away: once a move, at one of its messages, so that
every state of the handshake is hit by every fault. What dies is replaced. All that comes is
compared with what one engine says; from time to time all requests end, and instances must hold
nothing. `--plain N` moves N times with no fault, `--tight` leaves instances memory for a few
requests, `--front-ends N` kills the process that has the cluster N times.
`tests/runtime/cluster/test_faults.py` is its short form.
"""

import argparse
import faulthandler
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import cluster_attack
import cluster_front
from cluster_attack import Attack, Plan

_BATCH = 60  # runs between two looks at what instances hold
_CLIENTS = 10
_MOVERS = 4
_TIGHT = "12MiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000, help="moves with a fault, in all")
    parser.add_argument("--plain", type=int, default=0, help="moves without one, for each channel")
    parser.add_argument("--by", choices=["pages", "copies", "both"], default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="for each channel, at most")
    parser.add_argument("--tight", action="store_true", help="memory for a few requests")
    parser.add_argument("--front-ends", type=int, default=0, help="to kill, for each channel")
    given = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)  # says where it is
    channels = ["pages", "copies"] if given.by == "both" else [given.by]
    _kill_front_ends(channels, given.front_ends, random.Random(given.seed))
    if not given.runs and not given.plain:
        return 0
    pool = cluster_attack.items(most_tokens=400, max_len=2048)
    _say(f"{len(pool)} requests, of which a single engine has said what is right")
    is_right = True
    for by in channels:
        options: dict[str, Any] = {"kv_memory": _TIGHT} if given.tight else {}
        with cluster_attack.attacked(by, pool, seed=given.seed, **options) as attack:
            ends_s = time.monotonic() + 60 * given.minutes
            for plain, number in ((True, given.plain), (False, given.runs // len(channels))):
                _attack(attack, by, number, plain=plain, ends_s=ends_s)
            _report(attack, by)
            is_right = is_right and not attack.wrong
    return 0 if is_right else 1


def _kill_front_ends(channels: list[str], number: int, draw: random.Random) -> None:
    for by in channels:
        for place in range(number):
            stops_one = place % 2 == 1
            took_s = cluster_front.kill_one(by, after_s=draw.uniform(0, 2), stops_one=stops_one)
            of = ", an instance stopped" if stops_one else ""
            _say(f"{by}: front end {place + 1} killed{of}; nothing is left after {took_s:.2f} s")


def _attack(attack: Attack, by: str, number: int, *, plain: bool, ends_s: float) -> None:
    plans = _Plans(by, attack.draw, plain=plain)
    wanted = len(attack.runs) + number
    while len(attack.runs) < wanted and not attack.wrong and time.monotonic() < ends_s:
        start, began_s = len(attack.runs), time.monotonic()
        goal = min(wanted, start + (_BATCH * 4 if plain else _BATCH))
        with attack.clients(_CLIENTS):
            movers = [
                threading.Thread(target=_move, args=(attack, plans, goal), daemon=True)
                for _ in range(_MOVERS)
            ]
            for mover in movers:
                mover.start()
            for mover in movers:
                mover.join()
            attack.check_owners()
        attack.check_idle()
        took_s = time.monotonic() - began_s
        _say(
            f"{by}: {len(attack.runs)} of {wanted} runs, {attack.num_requests} requests, "
            f"{attack.num_dead} died, {took_s:.0f} s for {len(attack.runs) - start}"
        )


class _Plans:
    """What is still to be tried, hard faults apart: of these one at a time."""

    def __init__(self, by: str, draw: random.Random, *, plain: bool) -> None:
        self._by, self._draw, self._is_plain = by, draw, plain
        self._lock = threading.Lock()
        self._left: dict[bool, list[Plan]] = {True: [], False: []}
        self._num_hard = 0

    def next(self, attack: Attack) -> Plan:
        if self._is_plain:
            return Plan("any", "none")
        with self._lock:
            is_hard = self._num_hard == 0 and attack.may_kill
            if not self._left[is_hard]:
                every = list(cluster_attack.all_plans(self._by))
                self._left[is_hard] = [plan for plan in every if plan.is_hard == is_hard]
                self._draw.shuffle(self._left[is_hard])
            self._num_hard += is_hard
            return self._left[is_hard].pop()

    def done(self, plan: Plan) -> None:
        with self._lock:
            self._num_hard -= plan.is_hard


def _move(attack: Attack, plans: _Plans, goal: int) -> None:
    while len(attack.runs) < goal and not attack.wrong:
        plan = plans.next(attack)
        try:
            attack.move(plan)
        except BaseException as error:
            attack.wrong.append(f"{plan}: {error!r}")
            raise
        finally:
            plans.done(plan)


def _report(attack: Attack, by: str) -> None:
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    for plan in attack.runs:
        row = rows.setdefault((plan.state, plan.kind, plan.fault), Counter())
        row[plan.outcome] += 1
    _say(f"\n{by}\n{'state':<11}{'message':<10}{'fault':<14} runs  moved stayed recomputed")
    for (state, kind, fault), row in sorted(rows.items()):
        counts = f"{row['moved']:6} {row['stayed']:6} {row['recomputed']:10}"
        _say(f"{state:<11}{kind:<10}{fault:<14}{row.total():5} {counts}")
    reasons = Counter(plan.why for plan in attack.runs if plan.outcome != "moved")
    total = Counter(plan.outcome for plan in attack.runs)
    stats = attack.cluster.stats()
    _say(f"{len(attack.runs)} runs: {dict(total)}")
    _say(f"{attack.num_requests} requests, {attack.num_dead} instances died")
    _say(f"all moves: {stats.num_migrations} moved, {stats.num_stayed} stayed")
    _say(f"sequences computed again: {stats.num_recomputed}")
    _say("why not moved: " + "; ".join(f"{n} {why}" for why, n in _kinds(reasons)))
    _say(f"requests that ended with an error: {dict(attack.errors) or 'none'}")
    _say(f"moments that did not come: {dict(attack.missed) or 'none'}")
    for pid, counts in attack.held.items():
        told = f"{counts[0]} at first, {counts[-1]} at last, most {max(counts)}"
        _say(f"process {pid}: descriptors and threads {told}")
    _say("WRONG:\n" + "\n".join(attack.wrong) if attack.wrong else "nothing was wrong")


def _kinds(reasons: Counter[str]) -> list[tuple[str, int]]:
    found: Counter[str] = Counter()
    for why, count in reasons.items():
        found[cluster_attack.kind_of(why)] += count
    return found.most_common()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
