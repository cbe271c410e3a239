"""Priorities at work, over slots without a model: who waits, who loses a slot, and for how long."""

import random

import pytest
from stepping import add, make_request, make_scheduler, step, steps
from vkv.runtime.request.request import Request, RequestState
from vkv.runtime.scheduling.policies import Fair, Fcfs, Priority
from vkv.runtime.scheduling.scheduler import Scheduler


def _ends(scheduler: Scheduler, requests: dict[str, Request]) -> str:
    """Names in the order in which requests ended; of the same step, in theirs."""
    ended: list[str] = []
    for _ in steps(scheduler):
        ended += [n for n, r in requests.items() if r.is_finished and n not in ended]
    return " ".join(ended)


def test_the_better_priority_is_admitted_first() -> None:
    scheduler = make_scheduler(max_seqs=1, order=Priority())
    requests = {}
    for name, priority in (("c", 2), ("a", 0), ("d", 9), ("b", 1), ("a2", 0)):
        (requests[name],) = add(scheduler, 3, max_tokens=2, priority=priority)
    assert _ends(scheduler, requests) == "a a2 b c d"


def test_a_better_one_takes_the_slot_of_the_worst_at_once() -> None:
    scheduler = make_scheduler(max_seqs=2, order=Priority())
    low, lower = add(scheduler, 3, priority=5) + add(scheduler, 3, priority=6)
    step(scheduler)
    (high,) = add(scheduler, 4, priority=0)
    assert dict(step(scheduler)) == {low: 1, high: 4}
    assert lower.state is RequestState.WAITING
    assert scheduler.num_preemptions == 1
    tokens = list(lower.token_ids)
    for _ in steps(scheduler):
        pass
    assert lower.token_ids[: len(tokens)] == tokens
    assert all(r.num_output_tokens == 8 for r in (low, lower, high))
    assert scheduler.num_preemptions == 1


def test_an_equal_takes_nothing() -> None:
    scheduler = make_scheduler(max_seqs=1, order=Priority(60.0))
    (first,) = add(scheduler, 3, priority=1)
    step(scheduler)
    second = make_request(3, priority=1, waited_s=1000.0)
    scheduler.add(second)
    while not first.is_finished:
        step(scheduler)
    assert scheduler.num_preemptions == 0


def test_a_better_one_takes_the_memory_that_it_lacks() -> None:
    scheduler = make_scheduler(10, max_batch_tokens=64, max_seqs=4, order=Priority())
    kept, lost, last = (add(scheduler, 8, priority=p, max_tokens=3)[0] for p in (0, 7, 7))
    step(scheduler)
    (high,) = add(scheduler, 16, priority=1, max_tokens=3)
    assert high in dict(step(scheduler))
    assert kept.state is RequestState.RUNNING
    assert last.state is RequestState.WAITING
    for _ in steps(scheduler):
        pass
    assert all(r.num_output_tokens == 3 for r in (kept, lost, last, high))


def test_what_all_the_worse_have_and_would_not_do_is_left_to_them() -> None:
    scheduler = make_scheduler(12, max_batch_tokens=64, max_seqs=4, order=Priority())
    add(scheduler, 28, priority=0, max_tokens=3)  # seven pages, and eight
    (low,) = add(scheduler, 8, priority=7, max_tokens=3)
    step(scheduler)
    (high,) = add(scheduler, 24, priority=1, max_tokens=3)
    step(scheduler)
    assert low.state is RequestState.RUNNING
    assert high.state is RequestState.WAITING
    assert scheduler.num_preemptions == 0


def test_where_memory_is_short_the_worst_gives_way() -> None:
    scheduler = make_scheduler(6, max_batch_tokens=32, order=Priority())
    (low,) = add(scheduler, 8, max_tokens=12, priority=3)
    (high,) = add(scheduler, 8, max_tokens=12, priority=0)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert low.state is RequestState.WAITING  # it came first, and was admitted second
    assert high.state is RequestState.RUNNING
    for _ in steps(scheduler):
        pass
    assert low.num_output_tokens == high.num_output_tokens == 12


def test_a_newcomer_goes_before_a_long_prompt_of_a_worse_one() -> None:
    scheduler = make_scheduler(max_batch_tokens=8, max_seqs=4, order=Priority())
    (long,) = add(scheduler, 60, priority=5)
    assert step(scheduler) == [(long, 8)]
    (high,) = add(scheduler, 6, priority=0)
    assert dict(step(scheduler)) == {long: 2, high: 6}
    assert dict(step(scheduler)) == {high: 1, long: 7}


# -- a priority that changes ---------------------------------------------------------------------


def test_a_new_priority_holds_for_one_that_waits_and_for_one_that_runs() -> None:
    scheduler = make_scheduler(max_seqs=1, order=Priority())
    (running,) = add(scheduler, 3, priority=1, max_tokens=20)
    step(scheduler)
    first, second = add(scheduler, 3, 3, priority=2)
    scheduler.waiting.set_priority(second, 1)
    assert scheduler.waiting.first(2) == [second, first]
    step(scheduler)
    assert running.state is RequestState.RUNNING
    scheduler.waiting.set_priority(second, 0)
    step(scheduler)
    assert running.state is RequestState.WAITING
    scheduler.waiting.set_priority(running, -1)
    step(scheduler)
    assert running.state is RequestState.RUNNING
    scheduler.waiting.set_priority(running, 5)  # it gives way to the others again
    step(scheduler)
    assert second.state is RequestState.RUNNING


# -- starvation ----------------------------------------------------------------------------------


class _Clock:
    """Time that passes by steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now_s)


@pytest.mark.parametrize(("aging_s", "waits_for_ever"), [(20.0, False), (None, True)])
def test_a_stream_of_better_ones_holds_nobody_up_for_ever(
    monkeypatch: pytest.MonkeyPatch, aging_s: float | None, waits_for_ever: bool
) -> None:
    """Two slots, and more requests of priority 0 than they can take; one of priority 3 among them.

    It waits for those that come within three times the aging, and for none that comes later.
    """
    clock = _Clock(monkeypatch)
    scheduler = make_scheduler(1000, max_batch_tokens=16, max_seqs=2, order=Priority(aging_s))
    better = add(scheduler, 4, 4, priority=0)
    (low,) = add(scheduler, 4, priority=3)
    came_s = clock.now_s
    for number in range(200):
        clock.now_s += 1.0
        if number % 3 == 0:  # of eight tokens, so that the line grows and grows
            better += add(scheduler, 4, priority=0)
        was_admitted = low.was_admitted
        before = {r.queued_time_s for r in better if r.was_admitted}
        step(scheduler)
        if aging_s is not None and low.was_admitted and not was_admitted:
            assert came_s + 2.5 * aging_s < max(before) < came_s + 3 * aging_s
            assert all(r.was_admitted for r in better if r.queued_time_s <= max(before))
        assert not was_admitted or low.state is not RequestState.WAITING  # nobody takes its slot
    assert low.is_finished == (not waits_for_ever)
    assert low.was_admitted == (not waits_for_ever)


def test_one_that_aged_and_runs_loses_its_slot_to_a_priority_better_than_it_counted_as(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = _Clock(monkeypatch)
    scheduler = make_scheduler(1000, max_seqs=1, order=Priority(10.0))
    (first,) = add(scheduler, 4, priority=0, max_tokens=4)
    step(scheduler)
    (aged,) = add(scheduler, 4, priority=3, max_tokens=30)
    clock.now_s += 30.0
    while not aged.was_admitted:
        step(scheduler)
    assert first.is_finished
    clock.now_s += 1000.0  # it counts as what it did, and no better
    (same,) = add(scheduler, 4, priority=0)
    step(scheduler)
    assert same.state is RequestState.WAITING
    (better,) = add(scheduler, 4, priority=-1)
    step(scheduler)
    assert better.state is RequestState.RUNNING


def test_equals_do_not_drive_each_other_out_as_they_grow_older(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = _Clock(monkeypatch)
    scheduler = make_scheduler(1000, max_batch_tokens=16, max_seqs=2, order=Priority(1.0))
    requests = add(scheduler, *[4] * 12)
    for _ in steps(scheduler):
        clock.now_s += 7.0
    assert all(request.is_finished for request in requests)
    assert scheduler.num_preemptions == 0


# -- everything at once --------------------------------------------------------------------------


@pytest.mark.parametrize("order", [Fcfs(), Priority(None), Priority(0.05), Fair()])
@pytest.mark.parametrize("seed", range(20))
def test_any_load_ends_with_every_token_and_no_page(seed: int, order: object) -> None:
    draw = random.Random(seed)
    num_pages = draw.randrange(8, 30)
    scheduler = make_scheduler(
        num_pages,
        max_batch_tokens=draw.choice([1, 3, 8, 50]),
        max_seqs=draw.randrange(1, 6),
        max_parked=draw.randrange(4),
        prefix_reuse=draw.random() < 0.7,
        look_ahead_tokens=draw.choice([0, 4]),
        policy=draw.choice(["splitfuse", "prefill_first"]),
        order=order,
    )
    shared = list(range(-40, 0))
    requests: list[Request] = []
    while len(requests) < 25 or scheduler.has_work:
        if len(requests) < 25 and draw.random() < 0.3:
            prompt = shared[: draw.randrange(20)] + [draw.randrange(3) for _ in range(4)]
            room = num_pages * 4 - len(prompt) + 1
            how = {
                "max_tokens": draw.randrange(1, min(room, 40)),
                "priority": draw.randrange(-2, 3),
                "tenant": draw.choice("abc"),
            }
            leader = make_request(prompt, **how)
            for number in range(draw.choice([1, 1, 2, 3])):  # the outputs of one prompt
                one = make_request(prompt, **how, leader=leader) if number else leader
                requests.append(one)
                scheduler.add(one)
        unfinished = [request for request in requests if not request.is_finished]
        if unfinished and draw.random() < 0.05:
            request = draw.choice(unfinished)
            scheduler.abort(request)  # in line, behind a leader, or in a slot
            requests.remove(request)
        elif unfinished and draw.random() < 0.1:
            scheduler.waiting.set_priority(draw.choice(unfinished), draw.randrange(-2, 3))
        if scheduler.has_work:
            step(scheduler)
    assert all(r.is_finished and r.num_output_tokens == r.max_tokens for r in requests)
    # Tokens are named after their position: none was lost, doubled or computed out of order.
    for request in requests:
        outputs = request.output_token_ids
        assert outputs == list(range(request.num_prompt_tokens, request.num_tokens))
    assert sum(told.num_unfinished for told in scheduler.accounts.stats()) == 0
    scheduler.cache.trim()
    assert scheduler.cache.pool.num_held == scheduler.cache.pool.num_reserved == 0
    scheduler.cache.shutdown()
