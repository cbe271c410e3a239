"""Moves between processes: each message lost and doubled, either end killed in each state.

`python tests/attacks/cluster_faults.py` is its long form.
"""

import threading
import time
from collections.abc import Iterator, Sequence

import cluster_attack
import cluster_front
import middle
import pytest
from cluster_attack import Attack, Item, Plan

pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")

_SIZE = 6
# A message of each state, shared out between the channels: what follows a death is the same.
_DEADLY = {
    "pages": ["Begin", "Extend", "Paused", "Committed"],
    "copies": ["Ready", "Carried", "Release", "WentOn"],
}
_STATES = {"beginning", "preparing", "extending", "pausing", "committing", "releasing"}


@pytest.fixture(scope="module")
def pool() -> Sequence[Item]:
    """Requests, and what one engine says to them."""
    return cluster_attack.items(most_tokens=250, max_len=1024, lengths=(5, 60, 500))


@pytest.fixture(scope="module", params=["pages", "copies"])
def attack(request: pytest.FixtureRequest, pool: Sequence[Item], one_ray: None) -> Iterator[Attack]:
    with cluster_attack.attacked(
        request.param, pool, seed=1, size=_SIZE, liveness_s=30.0, max_len=1024
    ) as attack:
        yield attack


def _move(attack: Attack, plans: Sequence[Plan]) -> None:
    """Each of them once, several at a time; those that an instance dies of one at a time."""
    hard = [plan for plan in plans if plan.is_hard]
    soft = [plan for plan in plans if not plan.is_hard]

    lock = threading.Lock()

    def take(plans: list[Plan]) -> Plan | None:
        with lock:
            return plans.pop() if plans and not attack.wrong else None

    def mover(plans: list[Plan]) -> None:
        while (plan := take(plans)) is not None:
            while plan.is_hard and not attack.may_kill:
                time.sleep(0.01)
            if not attack.move(plan) and not attack.wrong:
                attack.wrong.append(f"{plan}: its moment did not come")

    before = len(attack.runs)
    with attack.clients(6):
        movers = [threading.Thread(target=mover, args=(some,)) for some in (hard, soft, soft)]
        for thread in movers:
            thread.start()
        for thread in movers:
            thread.join()
        attack.check_owners()
    attack.check_idle()
    assert not attack.wrong, "\n".join(attack.wrong)
    assert len(attack.runs) == before + len(plans)
    assert not attack.errors


def test_each_message_may_be_lost_and_doubled(attack: Attack) -> None:
    kinds = [kind for kind in middle.KINDS if cluster_attack.comes(kind, attack.by)]
    plans = [Plan(kind, fault) for kind in kinds for fault in ("lose", "double", "again")]
    _move(attack, plans)
    there = {plan.state for plan in attack.runs}
    assert there >= _STATES | {"returning"} | ({"copying"} if attack.by == "copies" else set())
    recomputed = [plan for plan in attack.runs if plan.outcome == "recomputed"]
    assert not recomputed  # a message that is lost costs no token
    moved = [plan for plan in attack.runs if plan.outcome == "moved"]
    assert len(moved) > len(plans) // 3


def test_the_way_may_break_in_the_middle_of_a_stage(attack: Attack) -> None:
    _move(attack, [Plan("Ready", "cut") for _ in range(6)])
    assert all(plan.outcome != "recomputed" for plan in attack.runs[-6:])


def test_either_end_may_be_stopped_for_a_while_and_clients_may_go(attack: Attack) -> None:
    faults = ("pause source", "pause target", "abort", "late")
    _move(attack, [Plan(kind, fault) for kind in ("Ready", "Paused", "Commit") for fault in faults])


def test_either_end_may_be_killed_in_each_state(attack: Attack) -> None:
    kinds = _DEADLY[attack.by]
    plans = [Plan(kind, fault) for kind in kinds for fault in ("kill source", "kill target")]
    attack.heals_at = 2
    _move(attack, plans[:-1])
    attack.heals_at = 0  # none is needed any more
    _move(attack, plans[-1:])
    assert attack.num_dead >= len(plans)
    states = {plan.state for plan in attack.runs if plan.is_hard}
    assert len(states) >= len(kinds), states


def test_a_front_end_that_is_killed_leaves_nothing() -> None:
    """In the middle of moves; one of its instances is stopped, and can do nothing by itself."""
    cluster_front.kill_one("pages", after_s=0.3, stops_one=True)
