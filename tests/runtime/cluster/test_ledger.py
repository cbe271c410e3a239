"""The ledger on plain snapshots: who may have how much where, and what has to leave."""

from collections import Counter, defaultdict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vkv.runtime.cluster.policies import Credit, Ledger, Settlement
from vkv.runtime.cluster.snapshot import (
    ClusterSnapshot,
    InstanceSnapshot,
    Loan,
    RequestSnapshot,
)
from vkv.vmem.errors import InvalidConfig

PART, CAPACITY, LENT, LOCAL = 10, 100, 80, 50
ledger = Ledger(part_tokens=PART)


def _request(
    name: str, num_tokens: int, *, waits: bool = False, age: float = 0.0, most: int = 0
) -> RequestSnapshot:
    return RequestSnapshot(
        (name, 0), num_tokens, 1, is_waiting=waits, waited_s=age, most_tokens=most
    )


def _instance(id: int, *requests: RequestSnapshot, **more: object) -> InstanceSnapshot:
    running = [r for r in requests if not r.is_waiting]
    facts = {
        "capacity_tokens": CAPACITY,
        "max_lent_tokens": LENT,
        "max_local_tokens": LOCAL,
        "num_running": len(running),
        "num_waiting": len(requests) - len(running),
        "requests": requests,
    }
    return InstanceSnapshot(id=id, **{**facts, **more})  # type: ignore[arg-type]


def _cluster(*instances: InstanceSnapshot, **more: object) -> ClusterSnapshot:
    return ClusterSnapshot(time_s=0.0, instances=instances, **more)  # type: ignore[arg-type]


def _of(settlement: Settlement, debtor: int) -> dict[int, int]:
    return {c.creditor: c.num_tokens for c in settlement.credits if c.debtor == debtor}


def _credit(settlement: Settlement, debtor: int, creditor: int) -> Credit:
    (found,) = [c for c in settlement.credits if (c.debtor, c.creditor) == (debtor, creditor)]
    return found


# -- who borrows from whom -------------------------------------------------------------------


def test_who_needs_nothing_gets_nothing() -> None:
    assert not ledger.settle(_cluster(_instance(0, _request("a", 60)), _instance(1))).credits


def test_a_long_request_gets_what_it_needs_from_the_nearest() -> None:
    long = _request("a", 190)
    near, far = _instance(1, node="x"), _instance(2, node="y")
    found = ledger.settle(_cluster(_instance(0, long, node="y"), near, far))
    assert _of(found, 0) == {2: 80, 1: 80}  # 150 that it needs, and what more there is
    assert [c.creditor for c in found.credits] == [2, 1]
    assert not any(c.is_called for c in found.credits)


def test_one_that_may_outgrow_its_memory_counts_as_long() -> None:
    found = ledger.settle(_cluster(_instance(0, _request("a", 60, most=120)), _instance(1)))
    assert _of(found, 0) == {1: 60}
    assert not ledger.settle(_cluster(_instance(0, _request("a", 60)), _instance(1))).credits


def test_what_waits_may_borrow_so_that_more_run() -> None:
    short = [_request("a", 70), _request("b", 50, waits=True, age=3)]
    found = ledger.settle(_cluster(_instance(0, *short), _instance(1, _request("c", 50))))
    assert _of(found, 0) == {1: 30}  # of the 40 that lack, with what it keeps to spare
    full = _instance(0, *short, max_running=1)
    assert not ledger.settle(_cluster(full, _instance(1))).credits  # no slot for it


def test_a_long_one_in_line_gets_all_or_nothing() -> None:
    waits = _request("a", 150, waits=True, age=3)
    own = _request("b", 35)
    found = ledger.settle(_cluster(_instance(0, waits), _instance(1, own), _instance(2, own)))
    assert not found.credits  # 80 of 100
    found = ledger.settle(_cluster(_instance(0, waits), _instance(1, own), _instance(2)))
    assert sum(_of(found, 0).values()) >= 100
    two = [_instance(0, waits), _instance(1, _request("b", 150, waits=True, age=4))]
    found = ledger.settle(_cluster(*two, _instance(2)))
    assert not _of(found, 0)  # the older one has what there is
    assert sum(_of(found, 1).values()) >= 100


def test_who_says_that_it_lacks_something_gets_it_though_others_came_before() -> None:
    """Its instance lets it in first, whoever came first."""
    line = _request("a", 60, waits=True, age=9), _request("b", 90, waits=True, age=2)
    lacks = {"lacking": (("b", 0), 40)}
    found = ledger.settle(_cluster(_instance(0, *line, **lacks), _instance(1)))
    assert _of(found, 0)[1] >= 40
    running = [_request("a", 30), _request("b", 55)]
    found = ledger.settle(_cluster(_instance(0, *running, lacking=(("b", 0), 10)), _instance(1)))
    assert _of(found, 0) == {1: 10}


def test_what_its_own_tier_holds_nobody_lends() -> None:
    long = _request("a", 190)
    found = ledger.settle(_cluster(_instance(0, long, tier_tokens=150), _instance(1)))
    assert sum(_of(found, 0).values()) <= 40
    two = [_instance(0, _request("a", 190, age=5), tier_tokens=150), _instance(1)]
    young = _instance(2, _request("b", 130, age=1))
    loan = Loan(2, 1, 80)
    assert not ledger.settle(_cluster(*two, young, loans=(loan,))).give_up


def test_the_oldest_has_first_and_the_youngest_gives_up() -> None:
    old, young = _request("a", 200, age=9), _request("b", 130, age=1)
    instances = _instance(0, old), _instance(1, young), _instance(2)
    loans = Loan(0, 2, 30), Loan(1, 2, 50)
    found = ledger.settle(_cluster(*instances, loans=loans))
    assert found.give_up == (1,)
    assert _credit(found, 1, 2) == Credit(1, 2, 0, is_called=True)
    assert _of(found, 0) == {2: 80, 1: 80}
    later = _instance(1, msgspec.structs.replace(young, is_waiting=True))
    found = ledger.settle(_cluster(instances[0], later, instances[2], loans=loans[:1]))
    assert _of(found, 0) == {1: 80, 2: 80}
    assert not found.give_up


def test_nobody_gives_up_in_vain() -> None:
    huge, young = _request("a", 900, age=9), _request("b", 120, age=1)
    instances = _instance(0, huge), _instance(1, young), _instance(2)
    found = ledger.settle(_cluster(*instances, loans=(Loan(1, 2, 80),)))
    assert not found.give_up
    assert _of(found, 1)[2] == 80


# -- back ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "stays"), [(10, 80), (20, 70), (50, 40), (100, 0)])
def test_a_creditor_calls_once_it_needs_the_memory(own: int, stays: int) -> None:
    long = _request("a", 130)
    loan = Loan(0, 1, 80)
    instances = _instance(0, long), _instance(1, _request("b", own)), _instance(2)
    found = ledger.settle(_cluster(*instances, loans=(loan,)))
    assert _credit(found, 0, 1).num_tokens == stays
    assert _credit(found, 0, 1).is_called == (stays < 80)
    assert sum(_of(found, 0).values()) >= min(90, 80 + stays)  # it goes to another


def test_nobody_gives_up_for_one_who_is_not_to_ask_there() -> None:
    snapshot = _cluster(
        _instance(1),
        _instance(2, _request("a", 5), _request("b", 130)),
        _instance(4, _request("c", 5), _request("d", 130), max_lent_tokens=0, is_draining=True),
        loans=(Loan(4, 1, 80), Loan(4, 2, 20)),
        shunned=frozenset({(2, 1)}),
    )
    assert not ledger.settle(snapshot).give_up


def test_what_a_draining_creditor_has_goes_elsewhere() -> None:
    instances = _instance(0, _request("a", 130)), _instance(1, is_draining=True), _instance(2)
    found = ledger.settle(_cluster(*instances, loans=(Loan(0, 1, 80),)))
    assert _credit(found, 0, 1) == Credit(0, 1, 0, is_called=True)
    assert _of(found, 0)[2] == 80


def test_loans_come_home_once_there_is_room_and_not_before() -> None:
    running = [_request("a", 60), _request("b", 60)]
    loan = Loan(0, 1, 40)
    found = ledger.settle(_cluster(_instance(0, *running), _instance(1), loans=(loan,)))
    assert _of(found, 0) == {1: 40}
    found = ledger.settle(_cluster(_instance(0, running[0]), _instance(1), loans=(loan,)))
    assert _credit(found, 0, 1) == Credit(0, 1, 0)
    fewer = _request("b", 35)
    found = ledger.settle(_cluster(_instance(0, running[0], fewer), _instance(1), loans=(loan,)))
    assert _of(found, 0) == {1: 20}


# -- slow ones -------------------------------------------------------------------------------


def test_a_slow_creditor_is_not_asked_and_what_it_has_leaves() -> None:
    instances = _instance(0, _request("a", 120), layer_s=0.001), _instance(1), _instance(2)
    slow = Loan(0, 1, 40, answer_s=0.1), Loan(0, 2, 40, answer_s=0.002)
    found = ledger.settle(_cluster(*instances, loans=slow))
    assert found.slow == ((0, 1),)
    assert _of(found, 0) == {1: 0, 2: 80}
    assert not _credit(found, 0, 1).is_called  # nothing is computed again for that
    shunned = frozenset(found.slow)
    again = ledger.settle(_cluster(*instances, loans=slow, shunned=shunned))
    assert not again.slow
    assert again.credits == found.credits


def test_one_alone_is_compared_with_computing() -> None:
    own, other = _request("a", 130), _instance(1)
    loan = Loan(0, 1, 80, answer_s=0.05)
    for layer_s, is_slow in ((0.05, False), (0.001, True), (None, False)):
        here = _instance(0, own, layer_s=layer_s)
        assert bool(ledger.settle(_cluster(here, other, loans=(loan,))).slow) == is_slow


def test_a_slow_one_keeps_what_nobody_else_takes() -> None:
    here = _instance(0, _request("a", 130))
    found = ledger.settle(
        _cluster(here, _instance(1), loans=(Loan(0, 1, 80),), shunned=frozenset([(0, 1)]))
    )
    assert _of(found, 0) == {1: 80}


def test_what_it_is_made_of_is_checked() -> None:
    for wrong in ({"part_tokens": 0}, {"eaten": 0.0}, {"returns": 0}, {"slow_times": 1.0}):
        with pytest.raises(InvalidConfig):
            Ledger(**wrong)  # type: ignore[arg-type]


# -- whatever there is -------------------------------------------------------------------------


@st.composite
def _snapshots(draw: st.DrawFn, *, says: bool = False) -> ClusterSnapshot:
    """A cluster; with `says`, of which some say what they lack and what their tiers hold."""
    count = draw(st.integers(1, 5))
    lengths = st.sampled_from([5, 20, 45, 60, 90, 130, 200, 350])
    instances = []
    for id in range(count):
        requests = [
            _request(
                f"{id}.{place}",
                draw(lengths),
                waits=place >= 2,
                age=draw(st.floats(0, 9)),
                most=draw(st.sampled_from([0, 0, 150])),
            )
            for place in range(draw(st.integers(0, 4)))
        ]
        more: dict[str, object] = {}
        if says:
            keys = [request.key for request in requests] or [("gone", 0)]
            lacks = st.tuples(st.sampled_from(keys), st.integers(1, 12).map(lambda n: n * PART))
            more["lacking"] = draw(st.none() | lacks)
            more["tier_tokens"] = draw(st.sampled_from([0, 0, 50, 200]))
        instances.append(
            _instance(
                id,
                *requests,
                **more,
                node=draw(st.sampled_from("xy")),
                is_draining=draw(st.integers(0, 9)) == 0,
                max_lent_tokens=draw(st.sampled_from([0, LENT, LENT, LENT])),
                max_running=draw(st.sampled_from([None, 3])),
            )
        )
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    some = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=6)) if pairs else []
    room, loans = {i: instances[i].max_lent_tokens for i in range(count)}, []
    for debtor, creditor in some:
        num_tokens = min(room[creditor], draw(st.integers(1, 8)) * PART)
        room[creditor] -= num_tokens
        if num_tokens:
            loans.append(Loan(debtor, creditor, num_tokens))
    shunned = frozenset(draw(st.lists(st.sampled_from(pairs), max_size=2)) if pairs else [])
    return _cluster(*instances, loans=tuple(loans), shunned=shunned)


@given(
    st.lists(st.sampled_from([20, 40, 60, 130]), min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(1, 2 * LENT // PART),
    st.integers(0, 3),
)
def test_who_lacks_something_gets_it_of_those_that_hold_nothing(
    lengths: list[int], which: int, num_parts: int, num_running: int
) -> None:
    """Whatever else is in its line, in whichever order; unless there is no room for it at home."""
    requests = [
        _request(str(place), length, waits=place >= num_running, age=9 - place)
        for place, length in enumerate(lengths)
    ]
    lacks = requests[which % len(requests)]
    one = _instance(0, *requests, lacking=(lacks.key, num_parts * PART))
    found = ledger.settle(_cluster(one, _instance(1), _instance(2)))
    here = [min(r.num_tokens, LOCAL) if _is_long(r) else r.num_tokens for r in requests]
    held = sum(here[:num_running])
    elsewhere = sum(r.num_tokens - LOCAL + PART for r in requests[:num_running] if _is_long(r))
    fits = held + here[which % len(requests)] <= CAPACITY
    if not lacks.is_waiting or (fits and elsewhere + num_parts * PART <= 2 * LENT):
        assert sum(_of(found, 0).values()) >= num_parts * PART


@given(_snapshots() | _snapshots(says=True))
def test_caps_hold_and_nothing_is_lent_twice(snapshot: ClusterSnapshot) -> None:
    found = ledger.settle(snapshot)
    assert found == Ledger(part_tokens=PART).settle(snapshot)
    pairs = Counter((c.debtor, c.creditor) for c in found.credits)
    assert not pairs or max(pairs.values()) == 1
    assert set(pairs) >= {(loan.debtor, loan.creditor) for loan in snapshot.loans}
    by_creditor: dict[int, int] = defaultdict(int)
    for credit in found.credits:
        assert credit.debtor != credit.creditor
        assert credit.num_tokens >= 0
        by_creditor[credit.creditor] += credit.num_tokens
    lent = {(loan.debtor, loan.creditor): loan.num_tokens for loan in snapshot.loans}
    for one in snapshot.instances:
        assert by_creditor[one.id] <= (one.max_lent_tokens if one.takes_work else 0)
    for credit in found.credits:  # nothing new where it was slow
        if (credit.debtor, credit.creditor) in snapshot.shunned:
            assert credit.num_tokens <= lent.get((credit.debtor, credit.creditor), 0)


@given(_snapshots())
def test_while_loads_stay_it_comes_to_rest(snapshot: ClusterSnapshot) -> None:
    """Debtors fill what they may have, and give back what they may not; long ones begin once they
    may have enough, or give up. Then nothing changes."""
    for _ in range(20):
        found = ledger.settle(snapshot)
        loans = tuple(
            Loan(c.debtor, c.creditor, c.num_tokens) for c in found.credits if c.num_tokens
        )
        instances = tuple(_after(one, found) for one in snapshot.instances)
        after = msgspec.structs.replace(snapshot, loans=loans, instances=instances)
        if after == snapshot:
            return
        snapshot = after
    raise AssertionError(f"it goes on and on: {found} of {snapshot}")


def _is_long(request: RequestSnapshot) -> bool:
    return max(request.num_tokens, request.most_tokens - 1) > CAPACITY


def _after(instance: InstanceSnapshot, found: Settlement) -> InstanceSnapshot:
    """What an engine does: its long ones wait if they gave up, and run if they may."""
    running = [r for r in instance.requests if not r.is_waiting]
    waiting = [r for r in instance.requests if r.is_waiting]
    if instance.id in found.give_up:
        back = [msgspec.structs.replace(r, is_waiting=True) for r in running if _is_long(r)]
        running, waiting = [r for r in running if not _is_long(r)], [*back, *waiting]
    elif waiting and _is_long(waiting[0]):
        elsewhere = sum(max(0, r.num_tokens - LOCAL) for r in (*running, waiting[0]) if _is_long(r))
        has_slot = instance.max_running is None or len(running) < instance.max_running
        here = sum(min(r.num_tokens, LOCAL) if _is_long(r) else r.num_tokens for r in running)
        has_room = here + min(waiting[0].num_tokens, LOCAL) <= CAPACITY
        if has_slot and has_room and sum(_of(found, instance.id).values()) >= elsewhere:
            first, *waiting = waiting
            running.append(msgspec.structs.replace(first, is_waiting=False))
    return msgspec.structs.replace(
        instance, requests=(*running, *waiting), num_running=len(running), num_waiting=len(waiting)
    )
