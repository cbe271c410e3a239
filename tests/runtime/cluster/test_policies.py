"""Policies of a cluster on plain snapshots: who takes what, and what moves where."""

import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vkv.runtime.cluster.policies import (
    CLUSTER_POLICIES,
    ClusterPolicy,
    Disaggregated,
    Freeness,
    LeastLoaded,
    LeastTime,
    Llumnix,
    Move,
    RoundRobin,
    Scaling,
    Switching,
    drained_first,
)
from vkv.runtime.cluster.snapshot import (
    ClusterSnapshot,
    Costs,
    InstanceSnapshot,
    Link,
    Newcomer,
    RequestSnapshot,
)
from vkv.vmem.errors import InvalidConfig

CAPACITY = 1000


def _request(
    name: str, num_tokens: int, uncomputed: int = 1, *, waits: bool = False, **more: object
) -> RequestSnapshot:
    return RequestSnapshot((name, 0), num_tokens, uncomputed, is_waiting=waits, **more)  # type: ignore[arg-type]


def _instance(id: int, *requests: RequestSnapshot, **more: object) -> InstanceSnapshot:
    """What it has is counted from its requests."""
    running = [r for r in requests if not r.is_waiting]
    counted = {
        "capacity_tokens": CAPACITY,
        "used_tokens": sum(r.num_tokens for r in running),
        "num_running": len(running),
        "num_waiting": len(requests) - len(running),
        "queued_tokens": sum(r.num_uncomputed for r in requests if not r.has_prompt),
        "requests": requests,
    }
    return InstanceSnapshot(id=id, **{**counted, **more})  # type: ignore[arg-type]


def _cluster(*instances: InstanceSnapshot, **more: object) -> ClusterSnapshot:
    return ClusterSnapshot(**{"time_s": 0.0, "instances": instances, **more})  # type: ignore[arg-type]


def _newcomer(num_tokens: int = 10, **more: object) -> Newcomer:
    return Newcomer(key=("new", 0), num_tokens=num_tokens, **more)  # type: ignore[arg-type]


def _carried_out(snapshot: ClusterSnapshot, moves: Sequence[Move]) -> ClusterSnapshot:
    """The cluster once the moves are made and nothing else has happened."""
    lists = {i.id: list(i.requests) for i in snapshot.instances}
    for move in moves:
        (request,) = [r for r in lists[move.source] if r.key == move.key]
        lists[move.source].remove(request)
        lists[move.target].append(request)
    kept = {"role", "home", "is_alive", "is_draining", "max_running", "capacity_tokens"}
    return msgspec.structs.replace(
        snapshot,
        instances=tuple(
            _instance(
                i.id,
                *sorted(lists[i.id], key=lambda r: r.is_waiting),
                **{name: getattr(i, name) for name in kept},
            )
            for i in snapshot.instances
        ),
    )


# -- any policy ----------------------------------------------------------------------------------


@st.composite
def _snapshots(draw: st.DrawFn, roles: bool = True) -> ClusterSnapshot:
    """Instances from empty to full, many of them crowded with small requests."""
    names = iter(range(10**6))
    instances = []
    for id in range(draw(st.integers(1, 6))):
        room = draw(st.sampled_from([0, CAPACITY // 2, CAPACITY, CAPACITY]))
        largest = draw(st.sampled_from([100, 250, 600]))
        requests = []
        while room >= largest // 2 and len(requests) < 8:
            tokens = draw(st.integers(largest // 4, min(largest, room)))
            room -= tokens
            uncomputed = draw(st.sampled_from([1, 1, 1, tokens // 2]))
            requests.append((tokens, uncomputed, False))
        for tokens in draw(st.lists(st.integers(1, 400), max_size=3)):
            requests.append((tokens, tokens, True))
        seen = [
            _request(
                str(next(names)),
                tokens,
                uncomputed,
                waits=waits,
                priority=draw(st.integers(-1, 1)),
                is_migratable=draw(st.integers(0, 4)) > 0,
            )
            for tokens, uncomputed, waits in requests
        ]
        instances.append(
            _instance(
                id,
                *seen,
                role=draw(st.sampled_from(["prefill", "decode", "both"])) if roles else "both",
                home=draw(st.sampled_from([None, None, "prefill", "decode"])) if roles else None,
                is_draining=draw(st.integers(0, 4)) == 0,
                is_alive=draw(st.integers(0, 5)) > 0,
                max_running=draw(st.sampled_from([None, None, 4, 8])),
            )
        )
    return _cluster(*instances, num_dispatched=draw(st.integers(0, 10)))


_policies = st.sampled_from(
    [
        RoundRobin(),
        LeastLoaded(),
        Llumnix(),
        Llumnix(source_below=60, target_above=80, moves=3, prefix_tokens=16),
        Llumnix(freeness=Freeness({-1: 400})),
        Disaggregated(),
        Disaggregated(kept=0.0, held=1.0, switching=Switching(queue_tokens=100)),
    ]
)


@given(_policies, _snapshots())
def test_who_drains_or_is_dead_gets_nothing(
    policy: ClusterPolicy, snapshot: ClusterSnapshot
) -> None:
    able = {i.id for i in snapshot.instances if i.is_alive and not i.is_draining}
    chosen = policy.dispatch(snapshot, _newcomer(prefixes={i.id: 50 for i in snapshot.instances}))
    assert chosen in able or chosen is None
    if not able:
        assert chosen is None
    assert {move.target for move in policy.migrations(snapshot)} <= able
    assert policy.roles(snapshot).keys() <= able


@given(_policies, _snapshots())
def test_moves_are_of_requests_that_are_there_once_and_fit(
    policy: ClusterPolicy, snapshot: ClusterSnapshot
) -> None:
    moves = policy.migrations(snapshot)
    of_id = {i.id: i for i in snapshot.instances}
    assert len({move.key for move in moves}) == len(moves)
    taken: dict[int, list[RequestSnapshot]] = {}
    for move in moves:
        assert move.source != move.target
        (request,) = [r for r in of_id[move.source].requests if r.key == move.key]
        assert request.is_migratable
        assert of_id[move.source].is_alive
        if not request.is_waiting:
            taken.setdefault(move.target, []).append(request)
    for id, requests in taken.items():
        target = of_id[id]
        assert sum(r.num_tokens for r in requests) < target.free_tokens
        if target.max_running is not None:
            assert target.num_requests + len(requests) <= target.max_running


@given(_policies, _snapshots())
def test_the_same_question_gets_the_same_answer(
    policy: ClusterPolicy, snapshot: ClusterSnapshot
) -> None:
    other = msgspec.convert(msgspec.to_builtins(snapshot), ClusterSnapshot, strict=False)
    assert policy.dispatch(snapshot, _newcomer()) == policy.dispatch(other, _newcomer())
    assert policy.migrations(snapshot) == policy.migrations(other)
    assert policy.scale(snapshot) == policy.scale(other)
    assert policy.roles(snapshot) == policy.roles(other)


def test_snapshots_are_data() -> None:
    before = _cluster(_instance(0, _request("a", 5)), links={(0, 1): Link(1e-3, 1e9)})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(before), type=ClusterSnapshot) == before
    assert Link(0.5, 100.0).time_s(50) == 1.0
    assert Link(0.5).time_s(10**12) == 0.5  # pages change hands


def test_policies_go_by_name() -> None:
    assert set(CLUSTER_POLICIES) == {
        "round_robin",
        "least_loaded",
        "least_time",
        "llumnix",
        "disaggregated",
    }
    assert all(CLUSTER_POLICIES[name]().name == name for name in CLUSTER_POLICIES)


@pytest.mark.parametrize("policy", [RoundRobin(), LeastLoaded(), Llumnix(), Disaggregated()])
def test_an_instance_that_drains_hands_over_all_that_fits(policy: ClusterPolicy) -> None:
    leaving = _instance(
        0,
        _request("small", 100),
        _request("large", 700),
        _request("stays", 100, is_migratable=False),
        _request("waits", 50, 50, waits=True),
        is_draining=True,
    )
    moves = policy.migrations(_cluster(leaving, _instance(1, _request("x", 300)), _instance(2)))
    assert {(m.key[0], m.target, m.reason) for m in moves} == {
        ("small", 2, "drain"),
        ("large", 2, "drain"),
        ("waits", 1, "drain"),
    }


# -- dispatch ------------------------------------------------------------------------------------


def test_round_robin_goes_round_those_that_are_able() -> None:
    instances = (_instance(0), _instance(1, is_draining=True), _instance(2))
    chosen = [
        RoundRobin().dispatch(_cluster(*instances, num_dispatched=n), _newcomer()) for n in range(4)
    ]
    assert chosen == [0, 2, 0, 2]


def test_least_loaded_counts_requests_then_tokens() -> None:
    policy = LeastLoaded()
    two, one, more = _request("a", 5), _request("b", 900), _request("c", 901)
    snapshot = _cluster(_instance(0, two, _request("d", 5)), _instance(1, more), _instance(2, one))
    assert policy.dispatch(snapshot, _newcomer()) == 2
    assert policy.dispatch(_cluster(*snapshot.instances[:2]), _newcomer()) == 1


def test_scores_follow_an_instance_that_changed_and_a_cluster_that_shrank() -> None:
    policy = LeastLoaded()
    a, b = _instance(0), _instance(1, _request("a", 5))
    assert policy.dispatch(_cluster(a, b), _newcomer()) == 0
    a = a.with_newcomer(_newcomer()).with_newcomer(_newcomer())
    assert (a.num_waiting, a.queued_tokens) == (2, 20)
    assert policy.dispatch(_cluster(a, b), _newcomer()) == 1
    assert policy.dispatch(_cluster(a), _newcomer()) == 0
    assert policy.dispatch(_cluster(), _newcomer()) is None


# -- Llumnix -------------------------------------------------------------------------------------


def test_freeness_is_steps_until_memory_is_full() -> None:
    freeness = Freeness()
    assert freeness(_instance(0)) == CAPACITY
    assert freeness(_instance(0, _request("a", 200), _request("b", 300))) == 250
    first = _request("first", 400, 400, waits=True)
    behind = _request("behind", 999, 999, waits=True)
    assert freeness(_instance(0, _request("a", 200), first, behind)) == 400  # who waits first
    assert freeness(_instance(0, is_draining=True)) == float("-inf")
    assert freeness(_instance(0, is_alive=False)) == float("-inf")


def test_urgent_requests_count_as_more_than_they_hold() -> None:
    freeness = Freeness({-1: 300})
    urgent = _request("urgent", 100, priority=-1)
    assert freeness(_instance(0, urgent)) == 600
    assert freeness(_instance(0, urgent, _request("more", 100, priority=-1))) == 250
    assert freeness(_instance(0, _request("other", 100))) == 900


def test_llumnix_dispatches_to_the_freest_with_what_waits_counted() -> None:
    line = [_request(f"w{n}", 300, 300, waits=True) for n in range(3)]
    snapshot = _cluster(_instance(0, *line), _instance(1, _request("a", 300)))
    assert Llumnix().dispatch(snapshot, _newcomer()) == 1


def test_urgent_newcomers_go_where_headroom_is_kept_and_others_elsewhere() -> None:
    policy = Llumnix(freeness=Freeness({-1: 800}))
    kept = _instance(0, _request("urgent", 100, priority=-1))
    crowded = _instance(1, _request("a", 200), _request("b", 200))
    snapshot = _cluster(kept, crowded)
    assert policy.dispatch(snapshot, _newcomer(priority=-1)) == 0
    assert policy.dispatch(snapshot, _newcomer()) == 1
    assert Llumnix().dispatch(snapshot, _newcomer()) == 0


def test_llumnix_dispatches_by_prefix_while_its_holder_is_free() -> None:
    policy = Llumnix(prefix_tokens=32, source_below=100, target_above=100)
    busy, full = _instance(0, _request("a", 300)), _instance(0, _request("a", 950))
    newcomer = _newcomer(100, prefixes={0: 64})
    assert policy.dispatch(_cluster(busy, _instance(1)), newcomer) == 0
    assert policy.dispatch(_cluster(full, _instance(1)), newcomer) == 1
    assert policy.dispatch(_cluster(busy, _instance(1)), _newcomer(100, prefixes={0: 31})) == 1


def test_llumnix_pairs_the_least_free_with_the_freest() -> None:
    def of(id: int, *sizes: int) -> InstanceSnapshot:
        return _instance(id, *(_request(f"{id}-{n}", size) for n, size in enumerate(sizes)))

    policy = Llumnix(source_below=30, target_above=100)
    snapshot = _cluster(of(0, 480, 490), of(1, 100), of(2, 400, 595), of(3, 200), of(4, 500))
    assert [(m.key[0], m.source, m.target, m.reason) for m in policy.migrations(snapshot)] == [
        ("2-0", 2, 1, "balance"),
        ("0-0", 0, 3, "balance"),
    ]


def test_llumnix_moves_the_least_urgent_first_and_none_whose_prompt_is_under_way() -> None:
    crowded = _instance(
        0,
        _request("urgent", 50, priority=-1),
        _request("prompt", 60, 30),
        _request("long", 700, priority=1),
        _request("short", 100),
        _request("waits", 300, 300, waits=True),
    )
    (move,) = Llumnix().migrations(_cluster(crowded, _instance(1)))
    assert move.key == ("long", 0)


def test_room_is_made_for_who_waits() -> None:
    blocked = _instance(
        0, _request("a", 300), _request("b", 400), _request("waits", 350, 350, waits=True)
    )
    assert not Llumnix().migrations(
        _cluster(_instance(0, *blocked.requests[:2]), _instance(1))
    )  # 150 steps of it are free
    (move,) = Llumnix().migrations(_cluster(blocked, _instance(1)))
    assert move.key == ("a", 0)


def test_who_would_be_short_itself_is_given_nothing() -> None:
    crowded = _instance(0, _request("a", 830), _request("b", 150))
    target = _instance(1, _request("c", 700))  # 300 steps free; 75 with b
    move = Move(("b", 0), 0, 1, "balance")
    assert Llumnix(source_below=70).migrations(_cluster(crowded, target)) == [move]
    assert not Llumnix(source_below=80).migrations(_cluster(crowded, target))


def test_room_is_not_given_away_that_others_wait_for_nor_slots_that_are_taken() -> None:
    policy = Llumnix(source_below=60, target_above=60, freeness=_FreeForAll())
    crowded = _instance(0, _request("a", 650), _request("b", 310))
    line = [_request("x", 400, 400, waits=True), _request("y", 300, 300, waits=True)]
    assert policy.migrations(_cluster(crowded, _instance(1, *line[:1])))
    assert not policy.migrations(_cluster(crowded, _instance(1, *line)))
    assert not policy.migrations(_cluster(crowded, _instance(1, _request("z", 1), max_running=1)))
    several = Llumnix(source_below=60, target_above=60, moves=2)
    many = _instance(0, *(_request(f"m{n}", 95) for n in range(10)))
    assert len(several.migrations(_cluster(many, _instance(1)))) == 2
    assert len(several.migrations(_cluster(many, _instance(1, max_running=1)))) == 1


class _FreeForAll(Freeness):
    """Does not count those in line."""

    def virtual_tokens(self, instance: InstanceSnapshot) -> int:
        return instance.used_tokens


@given(
    _snapshots(roles=False), st.integers(1, 3), st.sampled_from([(30, 100), (60, 60), (150, 160)])
)
def test_moves_come_to_an_end_and_nobody_goes_to_and_fro(
    snapshot: ClusterSnapshot, moves: int, bounds: tuple[int, int]
) -> None:
    policy = Llumnix(source_below=bounds[0], target_above=bounds[1], moves=moves)
    balanced: set[object] = set()
    for _ in range(60):
        found = policy.migrations(snapshot)
        if not found:
            break
        for move in found:
            if move.reason == "balance":
                assert move.key not in balanced, "it moved twice, though nothing else happened"
                balanced.add(move.key)
        snapshot = _carried_out(snapshot, found)
    else:
        raise AssertionError("it never comes to rest")


@st.composite
def _near_their_bounds(draw: st.DrawFn) -> ClusterSnapshot:
    """An instance that is almost full beside others, of few requests: where one move turns a
    target into a source, and the source into a target."""
    names = iter(range(10**6))
    instances = []
    for id, least_used in enumerate((CAPACITY * 9 // 10, 0, 0)):
        sizes: list[int] = []
        while sum(sizes) < least_used or (len(sizes) < 4 and draw(st.booleans())):
            room = CAPACITY - sum(sizes)
            sizes.append(draw(st.integers(min(50, room), min(500, room))))
        seen = [_request(str(next(names)), size) for size in sizes if size]
        instances.append(_instance(id, *seen))
    return _cluster(*instances)


@given(_near_their_bounds(), st.integers(40, 250), st.integers(0, 30), st.integers(1, 3))
def test_no_move_undoes_another_even_where_both_are_near_their_bounds(
    snapshot: ClusterSnapshot, source_below: int, gap: int, moves: int
) -> None:
    policy = Llumnix(source_below=source_below, target_above=source_below + gap, moves=moves)
    moved: set[object] = set()
    while found := policy.migrations(snapshot):
        for move in found:
            assert move.key not in moved, "it moved twice, though nothing else happened"
            moved.add(move.key)
        snapshot = _carried_out(snapshot, found)
        for target in {move.target for move in found}:
            (instance,) = [i for i in snapshot.instances if i.id == target]
            assert policy.freeness(instance) > source_below


def test_bounds_that_would_swing_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="to and fro"):
        Llumnix(source_below=100, target_above=50)
    with pytest.raises(InvalidConfig, match="below < above"):
        Scaling(least=1, most=2, below=300, above=60)
    with pytest.raises(InvalidConfig, match="1 <= least <= most"):
        Scaling(least=0, most=2)


# -- how many ------------------------------------------------------------------------------------


def test_scaling_follows_the_average_freeness_within_its_bounds() -> None:
    policy = Llumnix(scaling=Scaling(least=1, most=3, below=60, above=300, pause_s=30))
    full, free = _instance(0, _request("a", 950)), _instance(1)
    assert policy.scale(_cluster(full)) == 2
    assert policy.scale(_cluster(full, time_s=10.0, scaled_s=0.0)) == 1  # not yet
    assert policy.scale(_cluster(full, time_s=40.0, scaled_s=0.0)) == 2
    assert policy.scale(_cluster(full, full, full)) == 3
    assert policy.scale(_cluster(full, free)) == 1
    crowd = _instance(2, *(_request(str(n), 30) for n in range(32)))
    assert policy.scale(_cluster(crowd, crowd, free)) == 3  # free as it is, it is not enough
    wide = Llumnix(scaling=Scaling(least=1, most=64, below=60, above=300))
    assert wide.scale(_cluster(*[full] * 4)) == 5  # (950 + 180) * 4 / 1000
    assert wide.scale(_cluster(*[crowd] * 4)) == 27  # (960 + 32 * 180) * 4 / 1000
    assert wide.scale(_cluster(*[free] * 16)) == 14  # not one, at once
    assert policy.scale(_cluster(free)) == 1
    assert policy.scale(_cluster(_instance(0, _request("a", 850)))) == 1  # between the bounds
    assert policy.scale(_cluster(full, _instance(1, is_draining=True))) == 2
    assert policy.scale(_cluster(*[free] * 5)) == 3
    assert Llumnix().scale(_cluster(full, free)) == 2


def test_who_has_least_to_move_away_drains_first_and_no_role_is_left_empty() -> None:
    a = _instance(0, _request("a", 10), role="prefill")
    b, c = _instance(1, role="decode"), _instance(2, _request("c", 1), role="decode")
    assert drained_first(_cluster(a, b, c), 2) == [1]
    assert drained_first(_cluster(a, b, c), 0) == []


# -- prefill and decode apart --------------------------------------------------------------------


def test_prompts_go_to_the_shortest_queue_and_never_to_those_that_generate() -> None:
    snapshot = _cluster(
        _instance(0, _request("a", 500, 500, waits=True), role="prefill"),
        _instance(1, _request("b", 400, 400, waits=True), role="prefill"),
        _instance(2, role="decode"),
    )
    assert Disaggregated().dispatch(snapshot, _newcomer()) == 1


def test_newcomers_are_held_back_while_computed_prompts_fill_their_memory() -> None:
    policy = Disaggregated(held=0.5)
    decode = _instance(1, _request("x", 999), role="decode")
    waiting = _instance(0, _request("a", 300), _request("b", 201), role="prefill")
    assert policy.dispatch(_cluster(waiting, decode), _newcomer()) is None
    less = _instance(0, _request("a", 300), role="prefill")
    assert policy.dispatch(_cluster(less, decode), _newcomer()) == 0


def test_decode_instances_pull_when_they_have_room_and_the_oldest_goes_first() -> None:
    policy = Disaggregated(kept=0.1)
    prefill = _instance(
        0,
        _request("young", 200, waited_s=1.0),
        _request("old", 200, waited_s=9.0),
        _request("prompt", 90, 40),
        role="prefill",
    )
    busy, full = _request("x", 650), _request("y", 750)
    decodes = (_instance(1, busy, role="decode"), _instance(2, full, role="decode"))
    (move,) = policy.migrations(_cluster(prefill, *decodes))
    assert (move.key[0], move.target, move.reason) == ("old", 1, "decode")
    assert not policy.migrations(_cluster(prefill, decodes[1]))  # it would fit, but for `kept`
    assert len(policy.migrations(_cluster(prefill, *decodes, _instance(3, role="decode")))) == 2


@given(_snapshots())
def test_a_burst_never_fills_a_decode_instance(snapshot: ClusterSnapshot) -> None:
    kept = 0.2
    moves = [m for m in Disaggregated(kept=kept).migrations(snapshot) if m.reason == "decode"]
    after = _carried_out(snapshot, moves)
    given_to = {move.target for move in moves}
    for instance in after.instances:
        if instance.id in given_to and instance.num_requests > 1:
            assert instance.used_tokens < (1 - kept) * instance.capacity_tokens


def test_a_request_of_nearly_all_memory_is_pulled_by_who_has_nothing() -> None:
    """Else it would fit nowhere for good, and newcomers would be held back for it."""
    policy = Disaggregated(kept=0.1)
    prefill = _instance(0, _request("long", 950, waited_s=9.0), _request("a", 5), role="prefill")
    idle, busy = _instance(1, role="decode"), _instance(2, _request("x", 1), role="decode")
    moves = policy.migrations(_cluster(prefill, idle, busy))
    assert [(move.key[0], move.target) for move in moves] == [("long", 1), ("a", 2)]
    assert [move.key[0] for move in policy.migrations(_cluster(prefill, busy))] == ["a"]


def test_roles_switch_towards_the_side_that_is_full() -> None:
    policy = Disaggregated(switching=Switching(queue_tokens=100, pause_s=30))
    line = _instance(0, _request("w", 300, 300, waits=True), role="prefill")
    idle = _instance(1, role="prefill")
    used, free = _request("x", 990), _request("y", 100)
    first, second = _instance(2, free, role="decode"), _instance(3, role="decode")
    assert policy.roles(_cluster(line, first, second)) == {3: "prefill"}
    assert policy.roles(_cluster(line, first, second, time_s=9.0, switched_s=0.0)) == {}
    assert policy.roles(_cluster(line, first)) == {}  # the last of its kind
    assert policy.roles(_cluster(idle, idle, _instance(4, used, role="decode"))) == {1: "decode"}
    assert Disaggregated().roles(_cluster(line, first, second)) == {}


def test_where_a_side_has_nobody_left_the_others_do_both() -> None:
    prefill, dead = _instance(0, role="prefill"), _instance(1, role="decode", is_alive=False)
    assert Disaggregated().roles(_cluster(prefill, dead)) == {0: "both"}
    only_decodes = _cluster(
        _instance(0, role="prefill", is_draining=True), _instance(1, role="decode")
    )
    assert Disaggregated().roles(only_decodes) == {1: "both"}
    assert Disaggregated().dispatch(only_decodes, _newcomer()) == 1


def test_who_did_both_is_itself_again_once_the_other_side_is_back() -> None:
    policy = Disaggregated(switching=Switching(queue_tokens=100, pause_s=30))
    alone = _instance(0, role="both", home="prefill")
    assert policy.roles(_cluster(alone)) == {}  # it does both already
    back = _instance(1, role="decode")
    assert policy.roles(_cluster(alone, back)) == {0: "prefill"}
    assert policy.roles(_cluster(alone, _instance(1))) == {0: "prefill"}  # one for either side
    leaving = _instance(1, role="decode", is_draining=True)
    assert policy.roles(_cluster(alone, leaving)) == {}
    other = _instance(1, role="both", home="prefill")
    assert policy.roles(_cluster(alone, other)) == {}
    always = _cluster(_instance(0), _instance(1))  # who is for both of its own stays so
    assert policy.roles(always) == {}


def test_shares_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="kept"):
        Disaggregated(kept=1.0)
    with pytest.raises(InvalidConfig, match="low"):
        Switching(low=0.9, high=0.8)


@pytest.mark.parametrize(
    ("room", "chosen"), [(0, 1), (40, 1), (300, 2)], ids=["equal", "about equal", "much less"]
)
@pytest.mark.parametrize("by_links", [False, True], ids=["nodes", "links"])
def test_of_equal_targets_the_one_is_chosen_to_which_nothing_is_copied(
    room: int, chosen: int, by_links: bool
) -> None:
    """Instance 1 is on the source's node and has `room` tokens less than 2, which is not."""
    full = [_request(str(n), 190) for n in range(5)]
    near = [_request("near", room)] if room else []
    nodes = ["a", "a", "b"] if not by_links else [""] * 3
    links = {(0, 2): Link(1e-3, 1e9), (0, 1): Link(1e-4)} if by_links else {}

    def cluster(**source: object) -> ClusterSnapshot:
        return _cluster(
            _instance(0, *full, node=nodes[0], **source),
            _instance(2, node=nodes[2]),
            _instance(1, *near, node=nodes[1]),
            links=links,
        )

    (pulled, *_) = Disaggregated().migrations(cluster(role="prefill"))
    assert pulled.target == chosen
    (drained, *_) = RoundRobin().migrations(cluster(is_draining=True))
    assert drained.target == chosen


def test_a_pair_is_of_one_node_where_others_are_no_freer() -> None:
    sources = [
        _instance(n, *(_request(f"{n}{m}", 190) for m in range(5)), node=node)
        for n, node in enumerate("ab")
    ]
    targets = [_instance(n + 2, _request(f"t{n}", 100), node=node) for n, node in enumerate("ba")]
    moves = Llumnix().migrations(_cluster(*sources, *targets))
    assert {(move.source, move.target) for move in moves} == {(0, 3), (1, 2)}
    apart = [msgspec.structs.replace(i, node=str(i.id)) for i in (*sources, *targets)]
    assert len(Llumnix().migrations(_cluster(*apart))) == 2
    # One that is much freer is worth the bytes.
    near = _instance(3, _request("near", 300), node="a")
    moves = Llumnix().migrations(_cluster(sources[0], targets[0], near))
    assert [move.target for move in moves] == [2]


# -- what is there already -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", [LeastLoaded(), LeastTime(), Llumnix(), Disaggregated()])
def test_of_instances_about_as_good_the_one_is_chosen_that_has_what_is_needed(
    policy: ClusterPolicy,
) -> None:
    ann = _newcomer(needs={"ann": 5})
    has = frozenset({"ann", "bob"})
    assert policy.dispatch(_cluster(_instance(0), _instance(1, residents=has)), ann) == 1
    assert policy.dispatch(_cluster(_instance(0, residents=has), _instance(1)), ann) == 0
    assert policy.dispatch(_cluster(_instance(0), _instance(1, residents=has)), _newcomer()) == 0
    busy = [_request(f"r{n}", 300, 200) for n in range(3)]
    assert policy.dispatch(_cluster(_instance(0), _instance(1, *busy, residents=has)), ann) == 0
    gone = _instance(1, residents=has, is_draining=True)
    assert policy.dispatch(_cluster(_instance(0), gone), ann) == 0
    # Of a chain's blocks, most of the bytes count.
    chain = _newcomer(needs={"a": 10, "b": 90, "c": 5})
    some = [_instance(0, residents=frozenset("ac")), _instance(1, residents=frozenset("b"))]
    assert policy.dispatch(_cluster(*some), chain) == 1


def test_who_was_given_a_newcomer_will_have_what_it_needs() -> None:
    newcomer = _newcomer(needs={"ann": 5})
    for has in (_instance(0).with_given(newcomer), _instance(0).with_newcomer(newcomer)):
        assert has.residents == {"ann"}
        assert has.missing_bytes(newcomer) == 0
        assert has.missing_bytes(_newcomer(needs={"ann": 5, "bob": 7})) == 7


def test_loading_elsewhere_is_weighed_against_waiting_for_who_has_it() -> None:
    policy = LeastTime()
    ann = _newcomer(100, needs={"ann": 1000})
    here = _instance(0, _request("r", 400, 400), residents=frozenset({"ann"}))
    for load_bytes_per_s, chosen in ((100.0, 0), (1000.0, 1)):  # 10 s, or one; waiting is 4
        costs = Costs(tokens_per_s=100, load_bytes_per_s=load_bytes_per_s)
        cluster = _cluster(here, _instance(1), costs=costs)
        assert policy.dispatch(cluster, ann) == chosen
    # Who has no slot left makes it wait until somebody ends.
    full = _instance(0, _request("r", 10), residents=frozenset({"ann"}), max_running=1)
    for request_s, chosen in ((2.0, 0), (20.0, 1)):
        costs = Costs(tokens_per_s=100, load_bytes_per_s=100, request_s=request_s)
        assert policy.dispatch(_cluster(full, _instance(1), costs=costs), ann) == chosen


@pytest.mark.parametrize(
    ("queued", "bytes_per_s", "kv", "instance"),
    [
        (0, 1e3, "there", 0),  # routed to where the beginning is
        (500, 1e6, "moved", 1),  # which is busy, and the way from there is fast
        (500, 1e2, "computed", 1),  # or slow
        (2000, None, "moved", 1),  # pages change hands
    ],
)
def test_a_beginning_is_used_where_it_is_or_moved_or_computed_again(
    queued: int, bytes_per_s: float | None, kv: str, instance: int
) -> None:
    policy = LeastTime(moves_prefixes=True)
    newcomer = _newcomer(400, prefixes={0: 300})
    waits = [_request("r", queued, queued)] if queued else []
    cluster = _cluster(
        _instance(0, *waits, capacity_tokens=5000),
        _instance(1),
        costs=Costs(tokens_per_s=100),
        token_bytes=10,
        links={(0, 1): Link(0.0, bytes_per_s)},
    )
    way = policy.way(cluster, newcomer)
    assert way is not None
    assert (way.kv, way.instance, way.source) == (kv, instance, 0 if kv == "moved" else None)
    assert LeastTime().way(cluster, newcomer).kv != "moved"  # type: ignore[union-attr]
    far = msgspec.structs.replace(cluster, links={})  # of two machines, and nothing is known
    nodes = [msgspec.structs.replace(i, node=str(i.id)) for i in far.instances]
    found = policy.way(msgspec.structs.replace(far, instances=tuple(nodes)), newcomer)
    assert found is not None
    assert found.kv != "moved"


class _Worker:
    """An instance that computes one prompt after the other, and has three adapters in memory."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.free_s = 0.0
        self.here: list[str] = []
        self.num_loads = 0

    def give(self, now_s: float, adapter: str, costs: Costs) -> float:
        """When its prompt of 100 tokens is computed."""
        self.free_s = max(self.free_s, now_s) + costs.computing_s(100)
        if adapter not in self.here:
            self.free_s += costs.loading_s(1000)
            self.num_loads += 1
        self.here = [adapter, *(one for one in self.here if one != adapter)][:3]
        return self.free_s

    def seen(self, now_s: float, costs: Costs) -> InstanceSnapshot:
        queued = max(0, int((self.free_s - now_s) * costs.tokens_per_s))
        waits = [_request(f"{self.id}", queued, queued)] if queued else []
        residents = frozenset(self.here)
        return _instance(self.id, *waits, residents=residents, capacity_tokens=10**6)


def _simulated(policy: ClusterPolicy, load_s: float) -> tuple[float, int]:
    """Mean seconds to a first token, and loads, of 600 requests for 8 adapters on 4 workers."""
    draw = random.Random(7)
    costs = Costs(tokens_per_s=1000, load_bytes_per_s=1000 / load_s)
    workers, now_s, waited_s = [_Worker(id) for id in range(4)], 0.0, 0.0
    for number in range(600):
        now_s += draw.expovariate(25)  # of 40 a second that they compute
        adapter = f"a{min(int(draw.expovariate(0.4)), 7)}"  # some are asked for more than others
        newcomer = _newcomer(100, needs={adapter: 1000})
        seen = [worker.seen(now_s, costs) for worker in workers]
        cluster = _cluster(*seen, time_s=now_s, costs=costs, num_dispatched=number)
        chosen = policy.dispatch(cluster, newcomer)
        assert chosen is not None
        waited_s += workers[chosen].give(now_s, adapter, costs) - now_s
    return waited_s / 600, sum(worker.num_loads for worker in workers)


def test_requests_gather_where_their_adapters_are() -> None:
    """Where loading takes as long as three prompts, and where it takes no time worth naming."""
    slow = {p.name: _simulated(p, 0.3) for p in (RoundRobin(), LeastLoaded(), LeastTime())}
    assert slow["least_time"][0] < 0.8 * slow["least_loaded"][0] < 0.1 * slow["round_robin"][0]
    assert slow["least_time"][1] < 0.5 * slow["round_robin"][1]
    quick = {p.name: _simulated(p, 1e-4) for p in (LeastLoaded(), LeastTime())}
    assert quick["least_time"][0] <= 1.05 * quick["least_loaded"][0]
