"""Policies on plain snapshots: what they decide, and that nobody else is asked."""

import pytest
from vkv.runtime.request.spec import SequenceKey
from vkv.runtime.scheduling.plan import Plan, Policy, Share
from vkv.runtime.scheduling.policies import POLICIES, PrefillFirst, SplitFuse
from vkv.runtime.scheduling.snapshot import RunningRequest, Snapshot, WaitingRequest


def _key(name: str) -> SequenceKey:
    return (name, 0)


def _snapshot(
    running: dict[str, int] | None = None,
    waiting: dict[str, int] | None = None,
    *,
    granted: dict[str, int] | None = None,
    short: str | None = None,
    budget: int = 16,
    max_seqs: int = 4,
    num_preempted: int = 0,
) -> Snapshot:
    """`running`: uncomputed tokens by name; `waiting`: all tokens by name."""
    running, waiting = running or {}, waiting or {}
    return Snapshot(
        max_batch_tokens=budget,
        max_seqs=max_seqs,
        running=tuple(RunningRequest(_key(n), 50, left) for n, left in running.items()),
        waiting=tuple(WaitingRequest(_key(n), count, False) for n, count in waiting.items()),
        num_waiting=len(waiting),
        granted={_key(name): count for name, count in (granted or {}).items()},
        short=_key(short) if short else None,
        num_preempted=num_preempted,
        pages_obtainable=99,
    )


def _shares(**counts: int) -> tuple[Share, ...]:
    return tuple(Share(_key(name), count) for name, count in counts.items())


def test_splitfuse_serves_decodes_then_prompts_then_newcomers() -> None:
    plan = SplitFuse().plan(_snapshot({"p": 40, "d": 1, "e": 1, "done": 0}, {"w": 9}, max_seqs=5))
    assert plan == Plan(shares=_shares(d=1, e=1, p=14), admit=(_key("w"),), admit_tokens=0)


def test_splitfuse_leaves_what_is_over_to_newcomers_as_far_as_slots_go() -> None:
    plan = SplitFuse().plan(_snapshot({"d": 1, "p": 5}, {"v": 9, "w": 9, "x": 9}))
    assert plan.shares == _shares(d=1, p=5)
    assert plan.admit == (_key("v"), _key("w"))
    assert plan.admit_tokens == 10


@pytest.mark.parametrize("policy", [SplitFuse(), PrefillFirst()])
def test_the_last_admitted_gives_way_and_nobody_comes_in(policy: Policy) -> None:
    plan = policy.plan(_snapshot({"a": 1, "b": 1, "c": 1}, {"w": 3}, granted={"a": 1}, short="b"))
    assert plan.preempt == (_key("c"),)
    assert plan.admit == ()
    assert _key("c") not in {share.key for share in plan.shares}


@pytest.mark.parametrize("policy", [SplitFuse(), PrefillFirst()])
def test_with_nobody_to_give_way_the_plan_is_empty(policy: Policy) -> None:
    assert policy.plan(_snapshot({"a": 1}, {"w": 3}, short="a")) == Plan()


def test_splitfuse_gets_back_what_the_one_that_gives_way_was_granted() -> None:
    plan = SplitFuse().plan(
        _snapshot({"a": 1, "b": 30, "c": 1}, granted={"c": 1, "a": 1}, short="b", budget=9)
    )
    assert plan == Plan(preempt=(_key("c"),), shares=_shares(b=8))


@pytest.mark.parametrize("policy", [SplitFuse(), PrefillFirst()])
def test_a_newcomer_that_found_no_memory_is_not_asked_again(policy: Policy) -> None:
    plan = policy.plan(_snapshot({"a": 1}, {"w": 3}, granted={"a": 1}, short="w"))
    assert plan.admit == ()
    assert plan.preempt == ()


def test_prefill_first_lets_decodes_wait_for_prompts() -> None:
    policy = PrefillFirst()
    plan = policy.plan(_snapshot({"d": 1, "p": 5}, {"w": 9}))
    assert plan == Plan(
        shares=_shares(p=5), admit=(_key("w"),), admit_tokens=11, whole_prompts=True
    )
    assert policy.plan(_snapshot({"d": 1, "e": 1})).shares == _shares(d=1, e=1)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_keeps_nothing_between_plans(name: str) -> None:
    policy = POLICIES[name]()
    snapshot = _snapshot({"p": 40, "d": 1}, {"w": 9})
    before = dict(vars(policy))
    first = policy.plan(snapshot)
    policy.plan(_snapshot({"x": 1, "y": 1}, short="x"))
    assert policy.plan(snapshot) == first
    assert vars(policy) == before == {"order": policy.order}
