"""Which tokens go next: budgets, order, admission, preemption; no model involved."""

import random

import pytest
from stepping import BLOCK as _BLOCK
from stepping import add as _add
from stepping import make_request as _request
from stepping import make_scheduler as _scheduler
from stepping import step as _step
from stepping import steps as _steps
from vkv.runtime.request.request import Request, RequestState
from vkv.vmem.errors import OutOfPages, OutOfSlots

# -- the token budget ----------------------------------------------------------------------------


def test_prompts_are_cut_into_chunks_and_only_the_last_samples() -> None:
    scheduler = _scheduler(max_batch_tokens=8)
    (request,) = _add(scheduler, 19)
    counts = []
    while not request.num_output_tokens:
        ((_, count),) = _step(scheduler)
        counts.append(count)
    assert counts == [8, 8, 3]
    assert request.num_output_tokens == 1


def test_decodes_come_first_and_prompts_fill_the_rest() -> None:
    scheduler = _scheduler(max_batch_tokens=8)
    short, other = _add(scheduler, 3, 2)
    _step(scheduler)
    long, late = _add(scheduler, 20, 9)
    # Two decodes, then a chunk; the newcomers keep their order.
    assert _step(scheduler) == [(short, 1), (other, 1), (long, 6)]
    assert _step(scheduler) == [(short, 1), (other, 1), (long, 6)]
    assert _step(scheduler) == [(short, 1), (other, 1), (long, 6)]
    assert _step(scheduler) == [(short, 1), (other, 1), (long, 2), (late, 4)]
    assert _step(scheduler) == [(short, 1), (other, 1), (long, 1), (late, 5)]


def test_more_decodes_than_budget_take_turns_in_order_of_arrival() -> None:
    scheduler = _scheduler(max_batch_tokens=2)
    first, second, third = _add(scheduler, 1, 1, 1, max_tokens=3)
    order = [[request for request, _ in shares] for shares in _steps(scheduler)]
    assert order[:3] == [[first, second]] * 3
    assert order[3:] == [[third]] * 3


def test_a_prompt_under_way_goes_before_a_new_one() -> None:
    scheduler = _scheduler(max_batch_tokens=8)
    long, new = _add(scheduler, 30, 4)
    for _ in range(3):
        assert _step(scheduler) == [(long, 8)]
    assert _step(scheduler) == [(long, 6), (new, 2)]


def test_as_many_run_as_are_allowed() -> None:
    scheduler = _scheduler(max_batch_tokens=64, max_seqs=2)
    first, second, third = _add(scheduler, 3, 3, 3, max_tokens=2)
    assert _step(scheduler) == [(first, 3), (second, 3)]
    assert _step(scheduler) == [(first, 1), (second, 1)]
    assert _step(scheduler) == [(third, 3)]


# -- the baseline: prefill first -----------------------------------------------------------------


def test_prefill_first_runs_whole_prompts_before_any_decode() -> None:
    scheduler = _scheduler(max_batch_tokens=8, policy="prefill_first")
    (short,) = _add(scheduler, 3)
    assert _step(scheduler) == [(short, 3)]
    assert _step(scheduler) == [(short, 1)]
    three, five, six = _add(scheduler, 3, 5, 6)
    # As many whole prompts as the budget holds; the decode under way waits for all of them.
    assert _step(scheduler) == [(three, 3), (five, 5)]
    assert _step(scheduler) == [(six, 6)]
    assert _step(scheduler) == [(short, 1), (three, 1), (five, 1), (six, 1)]


def test_prefill_first_runs_a_prompt_beyond_the_budget_alone_and_whole() -> None:
    scheduler = _scheduler(max_batch_tokens=8, policy="prefill_first")
    short, long, last = _add(scheduler, 3, 19, 2)
    assert _step(scheduler) == [(short, 3)]
    assert _step(scheduler) == [(long, 19)]
    assert _step(scheduler) == [(last, 2)]
    assert _step(scheduler) == [(short, 1), (long, 1), (last, 1)]


def test_prefill_first_decodes_while_no_prompt_can_be_admitted() -> None:
    scheduler = _scheduler(num_pages=6, max_batch_tokens=32, policy="prefill_first")
    first, large = _add(scheduler, 8, 16, max_tokens=3)
    assert _step(scheduler) == [(first, 8)]
    assert _step(scheduler) == [(first, 1)]
    assert _step(scheduler) == [(first, 1)]
    assert first.is_finished
    assert _step(scheduler) == [(large, 16)]


def test_prefill_first_repeats_a_prompt_whose_step_failed() -> None:
    scheduler = _scheduler(max_batch_tokens=8, policy="prefill_first")
    (failed,) = _add(scheduler, 7)
    scheduler.schedule()  # and the model raises
    (late,) = _add(scheduler, 3)
    assert _step(scheduler) == [(failed, 7)]
    assert _step(scheduler) == [(late, 3)]


# -- the page budget -----------------------------------------------------------------------------


def test_admission_reserves_the_whole_prompt() -> None:
    scheduler = _scheduler(num_pages=10, max_batch_tokens=8)
    first, second = _add(scheduler, 30, 12)
    assert _step(scheduler) == [(first, 8)]
    # Two pages are mapped and six more promised, so that nobody can take them.
    assert scheduler.cache.pool.num_available == 10 - 8
    for _ in range(3):
        assert [request for request, _ in _step(scheduler)] == [first]
    assert list(scheduler.waiting) == [second]


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    scheduler = _scheduler(num_pages=10, max_batch_tokens=8)
    _, large, small = _add(scheduler, 20, 30, 1)
    for _ in range(5):
        _step(scheduler)
    assert list(scheduler.waiting) == [large, small]


def test_the_last_arrived_is_preempted_and_comes_back_first() -> None:
    scheduler = _scheduler(num_pages=6, max_batch_tokens=32)
    # Two pages each and room for a third; then each grows.
    first, second = _add(scheduler, 8, 8, max_tokens=12)
    (third,) = _add(scheduler, 2, max_tokens=12)
    preempted_at = None
    for number, _ in enumerate(_steps(scheduler)):
        if second.state is RequestState.WAITING and second.was_admitted and preempted_at is None:
            preempted_at = number
            assert first.state is RequestState.RUNNING
            assert list(scheduler.waiting) == [second, third]
            tokens = list(second.token_ids)
    assert preempted_at is not None
    assert second.token_ids[: len(tokens)] == tokens
    assert scheduler.num_preemptions >= 1
    for request in (first, second, third):
        assert request.num_output_tokens == 12


def test_several_preempted_keep_their_order() -> None:
    scheduler = _scheduler(num_pages=8, max_batch_tokens=64)
    requests = _add(scheduler, 4, 4, 4, 4)
    _step(scheduler)
    for request in reversed(requests[1:]):
        scheduler.preempt(request)
    assert list(scheduler.waiting) == requests[1:]


def test_a_step_that_preempts_admits_nobody() -> None:
    """What a preemption freed is for those who needed it, not for the next in the queue."""
    scheduler = _scheduler(num_pages=5, max_batch_tokens=32)
    _add(scheduler, 8, 8, max_tokens=12)
    before = 0
    while scheduler.has_work:
        waiting = set(scheduler.waiting)
        _step(scheduler)
        if scheduler.num_preemptions > before:
            before = scheduler.num_preemptions
            assert waiting <= set(scheduler.waiting)
    assert before


def test_preemptions_do_not_thrash() -> None:
    """A returned request makes at least a page of progress before it can lose its slot again."""
    scheduler = _scheduler(num_pages=16, max_batch_tokens=32, prefix_reuse=False)
    requests = _add(scheduler, 12, 12, 12, 12, max_tokens=24)
    progress: dict[Request, int] = {}
    for _ in _steps(scheduler):
        for request in scheduler.waiting:
            if request.was_admitted:
                before = progress.get(request, 0)
                assert request.num_output_tokens in (before, *range(before + 2, 25))
                progress[request] = request.num_output_tokens
    assert scheduler.num_preemptions <= len(requests) * 2


def test_a_preempted_request_finds_what_is_left_of_its_rows() -> None:
    scheduler = _scheduler(num_pages=30, max_batch_tokens=32)
    (request,) = _add(scheduler, 20)
    _step(scheduler)
    _step(scheduler)
    scheduler.preempt(request)
    assert request.num_computed == 0
    # 21 tokens were computed, and the 22nd has been sampled.
    assert _step(scheduler) == [(request, 1)]
    assert request.num_cached == 0  # which speaks of the first admission
    assert scheduler.prefix_hit_tokens == 0


@pytest.mark.parametrize("error", [OutOfPages, OutOfSlots])
def test_when_nothing_fits_nothing_is_lost(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = _scheduler()
    leader = _request(6)
    sibling = _request(leader.token_ids, leader=leader)
    last = _request(5)
    for request in (leader, sibling, last):
        scheduler.add(request)

    def refuse(*_: object) -> None:
        raise error("none")

    with monkeypatch.context() as patched:
        patched.setattr(scheduler.cache, "grow", refuse)
        assert not scheduler.schedule().items
    assert scheduler.shortage is not None
    assert scheduler.shortage[0] is leader
    assert isinstance(scheduler.shortage[1], error)
    assert list(scheduler.waiting) == [leader, sibling, last]
    assert not scheduler.running
    scheduler.cache.check_invariants()
    _step(scheduler)
    assert scheduler.shortage is None
    with monkeypatch.context() as patched:
        patched.setattr(scheduler.cache, "grow", refuse)
        assert not scheduler.schedule().items
    assert scheduler.shortage is not None
    assert scheduler.running == [leader]
    assert list(scheduler.waiting) == [last, sibling]
    scheduler.cache.check_invariants()
    for _ in _steps(scheduler):
        pass
    assert all(request.num_output_tokens == 8 for request in (leader, sibling, last))


# -- sharing and leaving -------------------------------------------------------------------------


def test_siblings_wait_for_their_leader_and_let_others_pass() -> None:
    scheduler = _scheduler(max_batch_tokens=8)
    leader = _request(13)
    siblings = [_request(leader.token_ids, leader=leader) for _ in range(2)]
    other = _request(3)
    for request in (leader, *siblings, other):
        scheduler.add(request)
    assert _step(scheduler) == [(leader, 8)]
    assert _step(scheduler) == [(leader, 5), (other, 3)]
    assert _step(scheduler) == [(leader, 1), (other, 1), (siblings[0], 1), (siblings[1], 1)]
    assert [sibling.num_cached for sibling in siblings] == [12, 12]


def test_siblings_of_a_dropped_leader_compute_for_themselves() -> None:
    scheduler = _scheduler(max_batch_tokens=8)
    leader = _request(13)
    sibling = _request(leader.token_ids, leader=leader)
    scheduler.add(leader)
    scheduler.add(sibling)
    _step(scheduler)
    scheduler.abort(leader)
    assert _step(scheduler) == [(sibling, 8)]


def test_abort_at_any_point_gives_all_pages_back() -> None:
    for steps in range(6):
        scheduler = _scheduler(max_batch_tokens=8)
        running, waiting = _add(scheduler, 19, 40)
        for _ in range(steps):
            _step(scheduler)
        scheduler.abort(running)
        scheduler.abort(waiting)
        assert not scheduler.has_work
        assert running.is_finished
        assert waiting.is_finished
        assert scheduler.cache.pool.num_held == scheduler.cache.pool.num_reserved == 0


def test_a_stranger_lends_a_whole_row_at_least() -> None:
    scheduler = _scheduler(max_batch_tokens=16)
    (donor,) = _add(scheduler, 10)
    _step(scheduler)
    three, eight = (_request([*donor.token_ids[:n], -1, -2]) for n in (3, 8))
    scheduler.add(three)
    scheduler.add(eight)
    assert _step(scheduler) == [(donor, 1), (three, 5), (eight, 2)]
    assert (three.num_cached, eight.num_cached) == (0, 8)


def test_variants_of_equal_tokens_share_nothing_live_or_parked() -> None:
    scheduler = _scheduler(max_batch_tokens=64)
    donor = _request(20, variant="a")
    scheduler.add(donor)
    _step(scheduler)
    same, other = (_request(donor.token_ids[:20], variant=name) for name in ("a", "b"))
    scheduler.add(same)
    scheduler.add(other)
    _step(scheduler)
    assert (same.num_cached, other.num_cached) == (19, 0)  # from a running request
    for _ in _steps(scheduler):
        pass
    again = [_request(donor.token_ids[:20], variant=name) for name in ("c", "b", "a")]
    for request in again:
        scheduler.add(request)
        _step(scheduler)
    assert [request.num_cached for request in again] == [0, 19, 19]  # from a parked slot


@pytest.mark.parametrize("seed", range(20))
def test_any_load_ends_with_every_token_and_no_page(seed: int) -> None:
    draw = random.Random(seed)
    num_pages = draw.randrange(8, 30)
    scheduler = _scheduler(
        num_pages,
        max_batch_tokens=draw.choice([1, 3, 8, 50]),
        max_seqs=draw.randrange(1, 6),
        max_parked=draw.randrange(4),
        prefix_reuse=draw.random() < 0.7,
        look_ahead_tokens=draw.choice([0, 4]),
        policy=draw.choice(["splitfuse", "prefill_first"]),
    )
    shared = list(range(-40, 0))
    requests: list[Request] = []
    while len(requests) < 25 or scheduler.has_work:
        if len(requests) < 25 and draw.random() < 0.3:
            prompt = shared[: draw.randrange(20)] + [draw.randrange(3) for _ in range(4)]
            room = num_pages * _BLOCK - len(prompt) + 1
            leader = _request(prompt, max_tokens=draw.randrange(1, min(room, 40)))
            requests.append(leader)
            scheduler.add(leader)
            if draw.random() < 0.3:
                requests.append(_request(prompt, max_tokens=leader.max_tokens, leader=leader))
                scheduler.add(requests[-1])
        if draw.random() < 0.03 and requests:
            request = draw.choice(requests)
            if not request.is_finished:
                scheduler.abort(request)
                requests.remove(request)
        if scheduler.has_work:
            _step(scheduler)
    assert all(r.is_finished and r.num_output_tokens == r.max_tokens for r in requests)
    # Tokens are named after their position: none was lost, doubled or computed out of order.
    for request in requests:
        outputs = request.output_token_ids
        assert outputs == list(range(request.num_prompt_tokens, request.num_tokens))
    scheduler.cache.trim()
    assert scheduler.cache.pool.num_held == scheduler.cache.pool.num_reserved == 0
    scheduler.cache.shutdown()
