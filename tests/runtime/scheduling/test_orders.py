"""Who comes first and who gives way, on plain snapshots."""

import random
from typing import Any

import pytest
from vkv.runtime.request.spec import SequenceKey
from vkv.runtime.scheduling.plan import Order, Plan, Share
from vkv.runtime.scheduling.policies import Fair, Fcfs, PrefillFirst, Priority, SplitFuse
from vkv.runtime.scheduling.snapshot import RunningRequest, Snapshot, TenantShare, WaitingRequest


def _key(name: str) -> SequenceKey:
    return (name, 0)


def _names(requests: Any) -> str:
    return " ".join(request.key[0] for request in requests)


def _running(name: str, priority: int = 0, **more: Any) -> RunningRequest:
    return RunningRequest(
        **{
            "key": _key(name),
            "num_tokens": 10,
            "num_uncomputed": 1,
            "priority": priority,
            **more,
        }
    )


def _waiting(name: str, priority: int = 0, waited_s: float = 0.0, **more: Any) -> WaitingRequest:
    return WaitingRequest(
        **{
            "key": _key(name),
            "num_tokens": 10,
            "was_admitted": False,
            "priority": priority,
            "waited_s": waited_s,
            **more,
        }
    )


def _snapshot(
    running: list[RunningRequest], waiting: list[WaitingRequest], **more: Any
) -> Snapshot:
    """Pages are of one token."""
    return Snapshot(
        **{
            "max_batch_tokens": 64,
            "max_seqs": 4,
            "running": tuple(running),
            "waiting": tuple(waiting),
            "num_waiting": len(waiting),
            "granted": {},
            "short": None,
            "num_preempted": 0,
            "pages_obtainable": 100,
            **more,
        }
    )


# -- first come, first served --------------------------------------------------------------------


def test_fcfs_knows_neither_priority_nor_tenant() -> None:
    order = Fcfs()
    running = [_running("a", 5), _running("b", 0)]
    snapshot = _snapshot(running, [_waiting("c", 9), _waiting("d", -9, 10**6)], max_seqs=2)
    assert _names(order.newcomers(snapshot, 5)) == "c d"
    assert order.loser(snapshot).key == _key("b")
    assert _names(order.ranked(running)) == "a b"
    assert not order.claims(snapshot)


# -- by priority ---------------------------------------------------------------------------------


def test_the_lower_number_goes_first_and_of_equals_who_came_first() -> None:
    waiting = [_waiting("a", 1, 9), _waiting("b", 0, 3), _waiting("c", 0, 5), _waiting("d", -1, 1)]
    snapshot = _snapshot([], waiting)
    for order in (Priority(), Priority(None)):
        assert _names(order.newcomers(snapshot, 9)) == "d c b a"
        assert _names(order.newcomers(snapshot, 2)) == "d c"


def test_each_time_that_it_waits_counts_as_one_priority_better() -> None:
    order = Priority(60.0)
    young = _waiting("young", 0, 1)
    for waited_s, first in ((60, "young old"), (62, "old young")):
        snapshot = _snapshot([], [young, _waiting("old", 1, waited_s)])
        assert _names(order.newcomers(snapshot, 2)) == first
    snapshot = _snapshot([], [young, _waiting("old", 1, 10**9)])
    assert _names(Priority(None).newcomers(snapshot, 2)) == "young old"


@pytest.mark.parametrize("seed", range(50))
def test_two_that_wait_never_change_places(seed: int) -> None:
    """Else lines would have to be sorted anew at each step."""
    rng = random.Random(seed)
    order = Priority(rng.choice([None, 0.5, 60.0]))
    waiting = [_waiting(str(n), rng.randrange(-3, 4), rng.random() * 300) for n in range(20)]
    later = [_waiting(r.key[0], r.priority, r.waited_s + 777) for r in waiting]
    before = _names(order.newcomers(_snapshot([], waiting), 20))
    assert _names(order.newcomers(_snapshot([], later), 20)) == before


def test_the_worst_gives_way_and_of_equals_the_last_admitted() -> None:
    order = Priority()
    running = [_running("a", 2), _running("b", 0), _running("c", 2), _running("d", 1)]
    assert order.loser(_snapshot(running, [])).key == _key("c")
    assert _names(order.ranked(running)) == "b d a c"


def test_what_runs_keeps_what_it_counted_as_when_it_was_admitted() -> None:
    order = Priority(60.0)
    old, worse = _running("old", 5, waited_s=301.0), _running("worse", 1)
    assert (order.level(old), order.level(worse)) == (0, 1)
    assert order.loser(_snapshot([old, worse], [])).key == _key("worse")
    # A newcomer of priority 0 takes nobody's place but the other's.
    snapshot = _snapshot([old, worse], [_waiting("new", 0), _waiting("next", 0)], max_seqs=2)
    assert [(a.key[0], b.key[0]) for a, b in order.claims(snapshot)] == [("new", "worse")]


def test_the_better_take_the_places_of_the_worst_as_far_as_they_are_better() -> None:
    order = Priority()
    running = [_running("a", 3), _running("b", 0), _running("c", 5), _running("d", 3)]
    waiting = [_waiting("w", 4), _waiting("x", 1, 5), _waiting("y", 2), _waiting("z", 1, 9)]
    claims = order.claims(_snapshot(running, waiting))
    assert [(a.key[0], b.key[0]) for a, b in claims] == [("z", "c"), ("x", "d"), ("y", "a")]


def test_age_takes_nobodys_place() -> None:
    """Else equals would drive each other out in turn."""
    order = Priority(1.0)
    snapshot = _snapshot([_running("a", 0)], [_waiting("w", 0, 100.0)], max_seqs=1)
    assert not order.claims(snapshot)


def test_there_is_nothing_to_claim_where_a_slot_is_free() -> None:
    snapshot = _snapshot([_running("a", 5)], [_waiting("w", 0)])
    assert not Priority().claims(snapshot)


def test_memory_is_claimed_of_the_worse_if_theirs_suffices() -> None:
    order = Priority()
    running = [_running("a", 0), _running("b", 1, num_tokens=20), _running("c", 2, num_tokens=8)]
    for tokens, claimed in ((30, "c"), (31, "")):
        waiting = [_waiting("w", 0, num_tokens=tokens), _waiting("x", -5)]
        snapshot = _snapshot(running, waiting, short=_key("w"), pages_obtainable=2)
        assert _names(loser for _, loser in order.claims(snapshot)) == claimed


def test_a_place_without_the_memory_for_it_is_not_taken() -> None:
    running = [_running("a", 0, num_tokens=50), _running("b", 1, num_tokens=5)]
    for tokens, claimed in ((7, "b"), (8, "")):
        waiting = [_waiting("w", 0, num_tokens=tokens)]
        snapshot = _snapshot(running, waiting, max_seqs=2, pages_obtainable=2)
        assert _names(loser for _, loser in Priority().claims(snapshot)) == claimed


# -- fair ----------------------------------------------------------------------------------------


def _fair(
    counters: dict[str, float],
    running: str,
    waiting: str,
    weights: dict[str, float] | None = None,
    **more: Any,
) -> Snapshot:
    """Requests by their tenants, such as "aab"; each waiting one has ten tokens."""
    return _snapshot(
        [_running(f"{t}{n}", tenant=t) for n, t in enumerate(running)],
        [_waiting(f"{t}{n}", tenant=t) for n, t in enumerate(waiting)],
        tenants={
            tenant: TenantShare(counter, (weights or {}).get(tenant, 1.0), waiting.count(tenant))
            for tenant, counter in counters.items()
        },
        **{"max_seqs": 99, **more},
    )


def test_the_tenant_with_the_least_counter_is_next() -> None:
    snapshot = _fair({"a": 25.0, "b": 0.0}, "", "aaabbbb")
    # Each of b's costs it ten, until it is a's turn; at 30 and 35 it is b's again.
    assert _names(Fair().newcomers(snapshot, 7)) == "b3 b4 b5 a0 b6 a1 a2"


def test_prompts_cost_less_to_a_tenant_of_more_weight() -> None:
    snapshot = _fair({"a": 0.0, "b": 0.0}, "", "aaabbb", {"a": 2.0})
    assert _names(Fair().newcomers(snapshot, 6)) == "a0 b3 a1 a2 b4 b5"


def test_one_that_comes_back_costs_nothing_more() -> None:
    waiting = [_waiting("x", tenant="a", was_admitted=True), _waiting("y", tenant="a")]
    snapshot = _snapshot(
        [],
        [*waiting, _waiting("z", tenant="b")],
        tenants={"a": TenantShare(0.0, 1.0, 2), "b": TenantShare(5.0, 1.0, 1)},
    )
    assert _names(Fair().newcomers(snapshot, 3)) == "x y z"


def test_nobody_passes_a_tenant_whose_line_goes_on_behind_what_is_shown() -> None:
    snapshot = _snapshot(
        [],
        [_waiting("x", tenant="a"), _waiting("z", tenant="b")],
        tenants={"a": TenantShare(0.0, 1.0, 7), "b": TenantShare(50.0, 1.0, 1)},
    )
    assert _names(Fair().newcomers(snapshot, 2)) == "x"


def test_who_got_most_gives_way_with_its_last_request() -> None:
    snapshot = _fair({"a": 9.0, "b": 10.0, "c": 1.0}, "babac", "")
    assert Fair().loser(snapshot).key == _key("b2")


def _claimed(snapshot: Snapshot) -> str:
    return " ".join(f"{a.key[0]}>{b.key[0]}" for a, b in Fair().claims(snapshot))


def test_a_tenant_with_fewer_places_takes_the_last_admitted_of_who_has_most() -> None:
    for counter, claimed in ((5.0, "l0>h3"), (19.0, "l0>h3"), (19.1, "")):  # ten of it run
        snapshot = _fair({"h": 9.0, "l": counter}, "hhlh", "l", max_seqs=4)
        assert _claimed(snapshot) == claimed, counter


def test_no_place_is_taken_of_who_would_then_have_fewer() -> None:
    for running, claimed in (("hl", ""), ("hhl", ""), ("hhhl", "l0>h2"), ("hhhhll", "l0>h3")):
        snapshot = _fair({"h": 9.0, "l": 1.0}, running, "l", max_seqs=len(running))
        assert _claimed(snapshot) == claimed, running


def test_places_are_parted_by_weight() -> None:
    for weight, claimed in ((1.0, ""), (1.9, ""), (2.0, "l0>h1")):
        snapshot = _fair({"h": 9.0, "l": 1.0}, "hhl", "l", {"l": weight}, max_seqs=3)
        assert _claimed(snapshot) == claimed, weight


def test_of_tenants_with_too_many_places_it_is_who_has_most() -> None:
    snapshot = _fair({"a": 9.0, "b": 9.0, "l": 1.0}, "aabbba", "l", max_seqs=6)
    assert _claimed(snapshot) == "l0>a5"
    snapshot = _fair({"a": 9.0, "b": 9.0, "l": 1.0}, "abbbaa", "l", {"b": 0.5}, max_seqs=6)
    assert _claimed(snapshot) == "l0>b3"
    # Who got less than the newcomer keeps what it has.
    snapshot = _fair({"a": 9.0, "b": 0.5, "l": 1.0}, "aabbbb", "l", max_seqs=6)
    assert _claimed(snapshot) == "l0>a1"


def test_no_place_is_taken_where_one_is_free_nor_without_the_memory_for_it() -> None:
    few = {"h": 9.0, "l": 1.0}
    assert not _claimed(_fair(few, "hhh", "l", max_seqs=4))
    assert _claimed(_fair(few, "hhh", "l", max_seqs=4, short=_key("l0"))) == "l0>h2"
    assert not _claimed(_fair(few, "hhh", "l", max_seqs=4, short=_key("h0")))
    waiting = [_waiting("l0", tenant="l", num_tokens=13)]
    for pages, claimed in ((2, ""), (3, "l0>h2")):
        running = [_running(f"h{n}", tenant="h") for n in range(3)]
        tenants = {"h": TenantShare(9.0, 1.0, 0), "l": TenantShare(1.0, 1.0, 1)}
        more = {"max_seqs": 3, "tenants": tenants, "pages_obtainable": pages}
        assert _claimed(_snapshot(running, waiting, **more)) == claimed


def test_a_prompt_of_who_got_no_more_is_computed_before_anothers() -> None:
    running = [_running("h0", tenant="h", num_uncomputed=400)]
    for counter, kept in ((9.0, 10), (9.1, 0)):
        tenants = {"h": TenantShare(9.0, 1.0, 0), "l": TenantShare(counter, 1.0, 1)}
        snapshot = _snapshot(running, [_waiting("l0", tenant="l")], tenants=tenants)
        plan = SplitFuse(Fair()).plan(snapshot)
        assert plan.shares == (Share(_key("h0"), 64 - kept),)
        assert plan.admit_tokens == kept


# -- in policies ---------------------------------------------------------------------------------


def test_splitfuse_gives_the_place_of_the_worst_to_the_better_one() -> None:
    running = [_running("a", 0), _running("b", 5, num_uncomputed=40), _running("c", 1)]
    snapshot = _snapshot(running, [_waiting("w", 0)], max_seqs=3)
    assert SplitFuse(Priority()).plan(snapshot) == Plan(
        preempt=(_key("b"),),
        shares=(Share(_key("a"), 1), Share(_key("c"), 1)),
        admit=(_key("w"),),
        admit_tokens=62,
    )
    assert SplitFuse().plan(snapshot).preempt == ()


def test_splitfuse_keeps_tokens_for_a_newcomer_that_is_better_than_a_prompt_under_way() -> None:
    running = [_running("a", 5, num_uncomputed=400), _running("b", 0, num_uncomputed=5)]
    snapshot = _snapshot(running, [_waiting("w", 0)])
    plan = SplitFuse(Priority()).plan(snapshot)
    assert plan.shares == (Share(_key("b"), 5), Share(_key("a"), 49))
    assert (plan.admit, plan.admit_tokens) == ((_key("w"),), 10)
    assert SplitFuse().plan(snapshot).shares == (Share(_key("a"), 64),)


def test_splitfuse_takes_no_place_for_whom_no_token_is_left() -> None:
    running = [_running(name, 5) for name in "abcd"]
    snapshot = _snapshot(running, [_waiting("w", 0)], max_batch_tokens=3)
    plan = SplitFuse(Priority()).plan(snapshot)
    assert plan.preempt == ()
    assert len(plan.shares) == 3


def test_splitfuse_gives_the_memory_of_the_worst_to_the_better_one() -> None:
    snapshot = _snapshot(
        [_running("a", 0), _running("b", 5)],
        [_waiting("w", 0)],
        short=_key("w"),
        granted={_key("a"): 1, _key("b"): 1},
    )
    assert SplitFuse(Priority()).plan(snapshot) == Plan(
        preempt=(_key("b"),), admit=(_key("w"),), admit_tokens=63
    )


def test_prefill_first_puts_one_whole_prompt_in_anothers_place() -> None:
    running = [_running("a", 0), _running("b", 5)]
    snapshot = _snapshot(running, [_waiting("w", 0), _waiting("x", 0)], max_seqs=2)
    assert PrefillFirst(Priority()).plan(snapshot) == Plan(
        preempt=(_key("b"),), admit=(_key("w"),), admit_tokens=64, whole_prompts=True
    )
    # A prompt beyond the budget would have to be alone in its step.
    full = _snapshot(
        running, [_waiting("w", 0)], max_seqs=2, max_batch_tokens=9, granted={_key("a"): 1}
    )
    assert PrefillFirst(Priority()).plan(full).preempt == ()


@pytest.mark.parametrize("order", [Priority(), Fair()])
@pytest.mark.parametrize("kind", [SplitFuse, PrefillFirst])
def test_the_order_says_who_gives_way(kind: Any, order: Order) -> None:
    running = [_running("a", 5, tenant="t"), _running("b", 0, tenant="u")]
    tenants = {"t": TenantShare(9.0, 1.0, 0), "u": TenantShare(1.0, 1.0, 0)}
    snapshot = _snapshot(running, [_waiting("w", -1)], short=_key("b"), tenants=tenants)
    plan = kind(order).plan(snapshot)
    assert plan.preempt == (_key("a"),)
    assert plan.admit == ()
    assert kind().plan(snapshot).preempt == (_key("b"),)


@pytest.mark.parametrize("order", [Fcfs(), Priority(), Fair()])
@pytest.mark.parametrize("seed", range(40))
def test_any_snapshot_has_a_plan_that_can_be_carried_out(seed: int, order: Order) -> None:
    rng = random.Random(seed)
    tenants = "abc"
    running = [
        _running(
            f"r{n}",
            rng.randrange(3),
            num_uncomputed=rng.choice([0, 1, 1, 20]),
            tenant=rng.choice(tenants),
            waited_s=rng.random() * 200,
        )
        for n in range(rng.randrange(6))
    ]
    waiting = [
        _waiting(f"w{n}", rng.randrange(3), rng.random() * 200, tenant=rng.choice(tenants))
        for n in range(rng.randrange(6))
    ]
    granted = {r.key: 1 for r in running if rng.random() < 0.4}
    short = rng.choice([None, *[r.key for r in (*running, *waiting)]])
    snapshot = _snapshot(
        running,
        waiting,
        max_seqs=max(1, len(running) + rng.randrange(3)),
        max_batch_tokens=rng.randrange(6, 40),
        granted=granted,
        short=short,
        pages_obtainable=rng.randrange(40),
        tenants={
            tenant: TenantShare(rng.random() * 50, 1.0, sum(w.tenant == tenant for w in waiting))
            for tenant in tenants
        },
    )
    for policy in (SplitFuse(order), PrefillFirst(order)):
        plan = policy.plan(snapshot)
        keys = {r.key for r in running}
        assert set(plan.preempt) <= keys
        assert {share.key for share in plan.shares} <= keys - set(plan.preempt) - granted.keys()
        assert all(share.num_tokens > 0 for share in plan.shares)
        assert set(plan.admit) <= {w.key for w in waiting}
        assert len(set(plan.admit)) == len(plan.admit)
        left = snapshot.max_seqs - len(running) + len(plan.preempt)
        assert len(plan.admit) <= left
        if short in keys:
            assert plan == Plan() if len(running) == 1 else len(plan.preempt) == 1
        if policy.name == "splitfuse":
            spent = sum(share.num_tokens for share in plan.shares) + plan.admit_tokens
            assert spent <= snapshot.budget + sum(granted.get(key, 0) for key in plan.preempt)
