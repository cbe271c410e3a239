"""Tenants get their parts: the bound of the virtual token counter, over slots without a model."""

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import add, make_request, make_scheduler, step
from vkv.runtime.request.request import Request
from vkv.runtime.scheduling.accounts import MOST_IDLE, Accounts
from vkv.runtime.scheduling.policies import Fair, Fcfs
from vkv.runtime.scheduling.policies.fair import OUTPUT_COST, PROMPT_COST
from vkv.runtime.scheduling.scheduler import Scheduler

_MOST_PROMPT, _MOST_OUTPUT = 30, 12


def _counter(scheduler: Scheduler, tenant: str) -> float:
    return _counters(scheduler)[tenant]


def _counters(scheduler: Scheduler) -> dict[str, float]:
    return {told.tenant: told.counter for told in scheduler.accounts.stats()}


def _service(requests: list[Request]) -> dict[str, int]:
    """What tenants got, counted anew from their requests, none of which found a prefix."""
    found: dict[str, int] = {}
    for request in requests:
        computed = min(request.num_computed, request.num_prompt_tokens)
        computed = max(computed, request.num_served)  # before it lost its slot, if it did
        cost = PROMPT_COST * computed + OUTPUT_COST * request.num_output_tokens
        found[request.tenant] = found.get(request.tenant, 0) + cost
    return found


@st.composite
def _loads(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Requests of a heavy tenant and of a light one: prompt and output tokens."""
    one = st.tuples(st.integers(1, _MOST_PROMPT), st.integers(1, _MOST_OUTPUT))
    heavy = draw(st.lists(one, min_size=100, max_size=100))
    return heavy, draw(st.lists(one, min_size=10, max_size=10))


def _run_while_both_are_backlogged(
    heavy: list[tuple[int, int]],
    light: list[tuple[int, int]],
    *,
    max_seqs: int,
    weights: Mapping[str, float] | None = None,
    num_pages: int = 1000,
    order: Fair | Fcfs | None = None,
) -> tuple[float, list[Request], Scheduler]:
    """The most that service over weight differed meanwhile; ten heavy requests come for a light."""
    scheduler = make_scheduler(
        num_pages,
        max_batch_tokens=16,
        max_seqs=max_seqs,
        order=order or Fair(),
        tenant_weights=weights,
        prefix_reuse=False,
    )
    requests: list[Request] = []
    for number, (prompt, output) in enumerate(light):
        for size, tokens in heavy[10 * number : 10 * number + 10]:
            requests += add(scheduler, size, max_tokens=tokens, tenant="heavy")
        requests += add(scheduler, prompt, max_tokens=output, tenant="light")
    weights = weights or {}
    worst = 0.0
    while {"heavy", "light"} <= {request.tenant for request in scheduler.waiting}:
        step(scheduler)
        got = _service(requests)
        parts = [got.get(tenant, 0) / weights.get(tenant, 1.0) for tenant in ("heavy", "light")]
        worst = max(worst, abs(parts[0] - parts[1]))
    return worst, requests, scheduler


def _bound(requests: list[Request], max_seqs: int, least_weight: float = 1.0) -> float:
    """As the paper's: what all slots together may still get before the other's turn."""
    cost = max(PROMPT_COST * r.num_prompt_tokens + OUTPUT_COST * r.max_tokens for r in requests)
    return max_seqs * cost / least_weight


@settings(max_examples=30, deadline=None)
@given(_loads())
def test_one_at_a_time_two_tenants_differ_by_no_more_than_a_request(loads: tuple) -> None:
    worst, requests, _ = _run_while_both_are_backlogged(*loads, max_seqs=1)
    assert worst <= _bound(requests, 1)


@settings(max_examples=30, deadline=None)
@given(_loads(), st.integers(2, 6), st.sampled_from([1000, 40]))
def test_many_at_once_differ_by_no_more_than_what_runs(
    loads: tuple, max_seqs: int, num_pages: int
) -> None:
    worst, requests, _ = _run_while_both_are_backlogged(
        *loads, max_seqs=max_seqs, num_pages=num_pages
    )
    assert worst <= _bound(requests, max_seqs)


@settings(max_examples=30, deadline=None)
@given(_loads(), st.integers(1, 4), st.sampled_from([2.0, 0.5, 3.0]))
def test_weights_are_kept_to_the_same_bound(loads: tuple, max_seqs: int, weight: float) -> None:
    worst, requests, _ = _run_while_both_are_backlogged(
        *loads, max_seqs=max_seqs, weights={"light": weight}
    )
    assert worst <= _bound(requests, max_seqs, min(1.0, weight))


def test_by_arrival_they_differ_by_far_more() -> None:
    """Or the bound would say nothing."""
    load = [(_MOST_PROMPT, _MOST_OUTPUT)] * 100, [(_MOST_PROMPT, _MOST_OUTPUT)] * 10
    worst, requests, _ = _run_while_both_are_backlogged(*load, max_seqs=2, order=Fcfs())
    assert worst > 5 * _bound(requests, 2)
    worst, requests, scheduler = _run_while_both_are_backlogged(*load, max_seqs=2)
    assert worst <= _bound(requests, 2)
    while scheduler.has_work:
        step(scheduler)
    assert all(request.num_output_tokens == request.max_tokens for request in requests)


def test_counters_are_what_requests_got_whatever_was_preempted() -> None:
    scheduler = make_scheduler(
        12, max_batch_tokens=16, max_seqs=4, order=Fair(), prefix_reuse=False
    )
    requests = []
    for tenant in "abab":
        requests += add(scheduler, 9, 6, max_tokens=14, tenant=tenant)
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.num_preemptions
    told = {t.tenant: (t.prompt_tokens, t.output_tokens) for t in scheduler.accounts.stats()}
    assert told == {"a": (30, 56), "b": (30, 56)}
    assert all(t.num_unfinished == 0 for t in scheduler.accounts.stats())


def test_a_light_tenant_waits_for_nobodys_long_outputs() -> None:
    scheduler = make_scheduler(1000, max_batch_tokens=64, max_seqs=4, order=Fair())
    heavy = [r for _ in range(40) for r in add(scheduler, 6, max_tokens=60, tenant="heavy")]
    waits = []
    for _ in range(12):
        for _ in range(7):
            step(scheduler)
        (light,) = add(scheduler, 6, max_tokens=3, tenant="light")
        num_steps = 0
        while not light.num_output_tokens:
            step(scheduler)
            num_steps += 1
        waits.append(num_steps)
    assert max(waits) <= 2
    # Whose places were taken is not the worse for it: each time the last admitted.
    assert scheduler.num_preemptions <= 12
    while scheduler.has_work:
        step(scheduler)
    assert all(request.num_output_tokens == 60 for request in heavy)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20)), max_size=40), st.data())
def test_no_place_goes_to_and_fro(load: list[tuple[str, int]], data: st.DataObject) -> None:
    """Where nothing new comes, each request loses its slot a few times at most."""
    weights = {"a": data.draw(st.sampled_from([1.0, 3.0])), "b": 0.5}
    scheduler = make_scheduler(
        1000, max_batch_tokens=16, max_seqs=5, order=Fair(), tenant_weights=weights
    )
    for tenant, size in load:
        add(scheduler, size, max_tokens=12, tenant=tenant)
    num_steps = 0
    while scheduler.has_work:
        step(scheduler)
        num_steps += 1
    assert scheduler.num_preemptions <= 2 * len(load)
    assert num_steps <= 40 * len(load)


# -- what costs, and what does not ---------------------------------------------------------------


def test_a_prefix_that_was_found_costs_nothing() -> None:
    scheduler = make_scheduler(max_batch_tokens=64, order=Fair())
    (first,) = add(scheduler, 20, max_tokens=1, tenant="a")
    step(scheduler)
    assert first.is_finished
    again = make_request(first.token_ids[:20], max_tokens=1, tenant="b")
    scheduler.add(again)
    step(scheduler)
    assert again.num_cached == 19
    told = {t.tenant: (t.prompt_tokens, t.output_tokens) for t in scheduler.accounts.stats()}
    assert told == {"a": (20, 1), "b": (1, 1)}


def test_a_prompt_that_was_not_computed_is_not_paid_for() -> None:
    scheduler = make_scheduler(max_batch_tokens=8, order=Fair())
    (request,) = add(scheduler, 50, tenant="a")
    step(scheduler)
    assert _counter(scheduler, "a") == 50  # at once, so that not all slots go to one
    scheduler.abort(request)
    assert _counter(scheduler, "a") == 8


def test_who_gets_a_payment_back_is_next_at_once() -> None:
    scheduler = make_scheduler(max_batch_tokens=8, max_seqs=1, order=Fair())
    (dropped,) = add(scheduler, 100, tenant="a")
    step(scheduler)
    (other,) = add(scheduler, 5, tenant="b")
    (waiting,) = add(scheduler, 5, tenant="a")
    assert _counters(scheduler) == {"a": 100, "b": 100}
    assert scheduler.waiting.first(2) == [other, waiting]
    scheduler.abort(dropped)
    assert _counters(scheduler) == {"a": 8, "b": 100}
    assert scheduler.waiting.first(2) == [waiting, other]


def test_what_is_computed_again_was_paid_for() -> None:
    scheduler = make_scheduler(max_batch_tokens=64, order=Fair(), prefix_reuse=False)
    (request,) = add(scheduler, 30, tenant="a", max_tokens=3)
    step(scheduler)
    before = _counter(scheduler, "a")
    scheduler.preempt(request)
    assert _counter(scheduler, "a") == before
    step(scheduler)
    assert _counter(scheduler, "a") == before + OUTPUT_COST


# -- those that were away ------------------------------------------------------------------------


def test_who_was_away_is_not_owed_what_it_did_not_ask_for() -> None:
    scheduler = make_scheduler(1000, max_batch_tokens=16, max_seqs=1, order=Fair())
    busy = [request for _ in range(30) for request in add(scheduler, 10, tenant="a", max_tokens=4)]
    while sum(request.is_finished for request in busy) < 20:
        step(scheduler)
    late = [request for _ in range(30) for request in add(scheduler, 10, tenant="b", max_tokens=4)]
    assert _counter(scheduler, "b") == _counter(scheduler, "a") > 300
    while not all(request.is_finished for request in busy):
        step(scheduler)
    # Had it begun at nothing, it would have had all of the slot meanwhile.
    assert sum(request.is_finished for request in late) in (9, 10, 11)


def test_with_nobody_in_line_it_is_lifted_to_the_last_who_was() -> None:
    scheduler = make_scheduler(max_batch_tokens=64, max_seqs=1, order=Fair())
    add(scheduler, 40, tenant="a", max_tokens=5)
    step(scheduler)
    assert not len(scheduler.waiting)
    add(scheduler, 1, tenant="b")
    assert _counter(scheduler, "b") == _counter(scheduler, "a") == 40 + OUTPUT_COST


def test_one_that_got_more_than_others_keeps_what_it_owes() -> None:
    scheduler = make_scheduler(1000, max_batch_tokens=64, max_seqs=2, order=Fair())
    (first,) = add(scheduler, 60, tenant="a", max_tokens=30)
    while not first.is_finished:
        step(scheduler)
    add(scheduler, 5, 5, 5, 5, tenant="b", max_tokens=2)
    add(scheduler, 5, tenant="c", max_tokens=2)
    owed = _counter(scheduler, "a")
    add(scheduler, 5, tenant="a", max_tokens=2)
    assert _counter(scheduler, "a") == owed
    assert _counters(scheduler)["b"] == _counters(scheduler)["c"] == owed


def test_a_tenant_whose_request_lost_its_slot_is_not_lifted() -> None:
    scheduler = make_scheduler(1000, max_batch_tokens=64, max_seqs=2, order=Fair())
    (light,) = add(scheduler, 1, tenant="light")
    step(scheduler)
    accounts = scheduler.accounts
    for request in add(scheduler, 50, 50, tenant="heavy"):
        assert request.tenant == "heavy"
    accounts.of(scheduler.waiting.first(1)[0]).counter = 500.0
    before = _counter(scheduler, "light")
    scheduler.preempt(light)
    assert _counter(scheduler, "light") == before
    assert scheduler.waiting.first(1) == [light]


def test_siblings_of_a_leader_that_runs_are_no_return() -> None:
    """They waited all the time, for the leader's prompt."""
    scheduler = make_scheduler(1000, max_batch_tokens=8, max_seqs=1, order=Fair())
    leader = make_request(12, tenant="a", max_tokens=2)
    siblings = [make_request(leader.token_ids, tenant="a", leader=leader) for _ in range(2)]
    for request in (leader, *siblings):
        scheduler.add(request)
    step(scheduler)
    (other,) = add(scheduler, 5, tenant="b")
    scheduler.accounts.of(other).counter = 1000.0
    while not leader.is_finished:
        step(scheduler)
    assert _counter(scheduler, "a") < 20
    assert scheduler.waiting.first(3) == [*siblings, other]


# -- those that are forgotten --------------------------------------------------------------------


def _visit(accounts: Accounts, tenant: str, tokens: int) -> float:
    """A request comes, gets so many prompt tokens, and goes; the counter it began with."""
    request = make_request(tokens, tenant=tenant)
    accounts.came(request)
    begun = accounts.of(request).counter
    accounts.admitted(request)
    request.num_computed = tokens
    accounts.released(request)
    accounts.left(request)
    return begun


def test_some_hundred_tenants_are_remembered_and_all_that_have_requests() -> None:
    accounts = Accounts({})
    unfinished = [make_request(1, tenant=f"live {n}") for n in range(400)]
    for request in unfinished:
        accounts.came(request)
    for number in range(1000):
        _visit(accounts, f"gone {number}", 1)
    assert 400 < len(accounts) <= 400 + MOST_IDLE
    assert len(accounts.stats()) <= MOST_IDLE
    assert all(accounts.of(request).num_unfinished == 1 for request in unfinished)


def test_nobody_gets_rid_of_what_it_owes_by_being_forgotten() -> None:
    accounts = Accounts({})
    _visit(accounts, "debtor", 5000)
    for number in range(2000):  # of which many are forgotten
        _visit(accounts, f"other {number}", 1 + number)
    assert _visit(accounts, "debtor", 1) >= 5000
    known = {told.tenant: told.counter for told in accounts.stats()}
    forgotten = [n for n in range(2000) if f"other {n}" not in known]
    assert forgotten
    for number in forgotten[-3:]:
        assert _visit(accounts, f"other {number}", 1) >= 1 + number
    assert _visit(accounts, "somebody new", 1) >= 1 + max(forgotten[:-3])
