"""Loans that are placed: they go where they may be, and come home; what is lent lets more run."""

import time
from dataclasses import replace

import borrowing
import msgspec
import pytest
from borrowing import Lent, expected_of, specs_of, tokens_of
from transformers import PreTrainedModel
from vkv.runtime.engine.memory.lending import Lacking, report_of
from vkv.runtime.engine.memory.segments import disconnect_creditor
from vkv.runtime.model.segments import RemoteHolder
from vkv.runtime.request.continuation import Continuation


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return borrowing.model()


# -- more requests at once -----------------------------------------------------------------------


def test_more_run_where_some_of_their_tokens_are_lent(llama: PreTrainedModel) -> None:
    specs = specs_of([900, 700, 560, 600, 40], 30)
    expected = expected_of(llama, specs)
    most: dict[bool, int] = {}
    for lends in (False, True):
        with Lent(llama) as lent:
            engine, running = lent.engines[0], set[int]()
            lent.place(at_1=1536 * lends, at_2=1536 * lends)
            requests = [engine.add(spec)[0] for spec in specs]
            lent.drive(lambda e=engine, r=running: bool(r.add(len(e.scheduler.running))))
            assert tokens_of(requests) == expected
            most[lends] = max(running)
            assert engine.stats().num_preemptions == 0
            assert (lent.loans.lent.num_tokens > 0) == lends
    assert most[True] == len(specs) > most[False]


def test_nothing_is_lent_that_costs_more_than_it_brings(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteHolder, "answer_s", 1.0)  # and steps of a tiny model
    specs = specs_of([900, 700, 600], 10)
    with Lent(llama, 2) as lent:
        lent.place(at_1=1536)
        requests = [lent.engines[0].add(spec)[0] for spec in specs]
        lent.drive()
        assert tokens_of(requests) == expected_of(llama, specs)
        assert not lent.loans.lent.num_tokens


def test_what_was_lent_comes_home_when_there_is_room(llama: PreTrainedModel) -> None:
    specs = specs_of([600, 560, 1000], 60, 60, 4)
    expected = expected_of(llama, specs)
    with Lent(llama, 2) as lent:
        engine = lent.engines[0]
        lent.place(at_1=1536)
        requests = [engine.add(spec)[0] for spec in specs]
        lent.drive(lambda: requests[2].is_finished)
        assert lent.loans.num_lent("1")
        lent.place(at_1=0)
        lent.drive(lambda: lent.loans.num_lent("1") == 0)
        assert not any(request.is_spread for request in requests)
        assert not requests[0].is_finished
        assert lent.loans.came_home.num_tokens >= 512
        lent.drive()
        assert tokens_of(requests) == expected
        assert engine.stats().num_preemptions == 0


# -- loans that are called -------------------------------------------------------------------


def test_a_loan_moves_on_to_another(llama: PreTrainedModel) -> None:
    specs = specs_of([2300, 30], 40)
    expected = expected_of(llama, specs)
    with Lent(llama) as lent:
        lent.place(at_1=1536)
        requests = [lent.engines[0].add(spec)[0] for spec in specs]
        lent.drive(lambda: requests[0].num_output_tokens > 3)
        assert lent.loans.num_lent("1") >= 1024
        lent.place(["1"], at_1=512, at_2=1536)
        lent.drive(lambda: lent.loans.num_lent("1") <= 512)
        assert lent.loans.moved_on.num_tokens
        lent.place(["1"], at_1=0, at_2=1536)
        lent.drive()
        assert tokens_of(requests) == expected
        assert lent.engines[0].stats().num_preemptions == 0
        assert lent.loans.num_called


def test_without_another_its_request_is_computed_again(llama: PreTrainedModel) -> None:
    specs = specs_of([2300, 30], 40)
    expected = expected_of(llama, specs)
    with Lent(llama) as lent:
        lent.place(at_1=1536)
        requests = [lent.engines[0].add(spec)[0] for spec in specs]
        lent.drive(lambda: requests[0].num_output_tokens > 3)
        lent.place(["1"], at_1=0)
        lent.drive(lambda: lent.loans.num_lent("1") == 0)
        assert lent.engines[0].stats().num_preemptions == 1
        assert requests[0].slot is None  # it waits, and its neighbour goes on
        lent.drive(lambda: requests[1].is_finished)
        assert requests[0].slot is None
        lent.place(at_2=1536)
        lent.drive()
        assert tokens_of(requests) == expected


def test_a_creditor_in_need_gives_time_to_move(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vkv.runtime.engine.memory.segments.NOTICE_S", 60.0)  # however slow this is
    specs = specs_of([2300, 1900], 30)
    expected = expected_of(llama, specs)
    with Lent(llama, 4) as lent:
        lent.place(at_1=1536, at_2=1536, at_3=1536)
        (long,) = lent.engines[0].add(specs[0])
        lent.drive(lambda: long.num_output_tokens > 3)
        (own,) = lent.engines[1].add(specs[1])
        lent.drive()
        assert tokens_of([long, own]) == expected
        assert lent.engines[0].stats().num_preemptions == 0
        assert lent.engines[1].stats().num_preemptions == 0
        assert lent.loans.moved_on.num_tokens


# -- too little for all ------------------------------------------------------------------------


def test_two_that_want_more_than_there_is_run_one_after_the_other(llama: PreTrainedModel) -> None:
    specs = specs_of([2900, 2900, 50], 150)
    expected = expected_of(llama, specs)
    with Lent(llama) as lent:
        lent.place(at_1=1024, at_2=1024)
        engine = lent.engines[0]
        requests = [engine.add(spec)[0] for spec in specs]
        lent.drive()
        assert tokens_of(requests) == expected


def test_those_that_outgrow_what_there_is_give_way(llama: PreTrainedModel) -> None:
    """Both begin, as there is room for their prompts; for what they generate there is not."""
    specs = specs_of([1530, 1530, 50], 600)
    expected = expected_of(llama, specs)
    with Lent(llama) as lent:
        lent.place(at_1=1024, at_2=512)
        engine = lent.engines[0]
        requests = [engine.add(spec)[0] for spec in specs]
        lent.drive()
        assert tokens_of(requests) == expected
        assert engine.stats().num_preemptions


def test_one_that_has_to_gives_up(llama: PreTrainedModel) -> None:
    specs = specs_of([2300, 30], 40)
    expected = expected_of(llama, specs)
    with Lent(llama) as lent:
        lent.place(at_1=1536)
        requests = [lent.engines[0].add(spec)[0] for spec in specs]
        lent.drive(lambda: requests[0].num_output_tokens > 3)
        lent.place(give_up=True)
        lent.drive(lambda: requests[1].is_finished)
        assert requests[0].slot is None
        lent.place(at_1=1536)
        lent.drive()
        assert tokens_of(requests) == expected


def test_one_that_the_tier_does_not_hold_waits_for_those_that_will_lend(
    llama: PreTrainedModel,
) -> None:
    specs = specs_of([2300, 30], 40)
    expected = expected_of(llama, specs)
    with Lent(llama, 2, swap_memory=33 * borrowing.PAGE_BYTES) as lent:
        disconnect_creditor(lent.engines[0], "1")
        lent.place()  # a ledger that lends nothing yet
        loop, engine = lent.llms[0].loop, lent.engines[0]
        requests = [engine.add(spec)[0] for spec in specs]
        until_s = time.monotonic() + 3 * borrowing.SHORTAGE_WAIT_S
        while time.monotonic() < until_s:
            assert not [output.failure for output in loop.turn() if output.failure is not None]
        assert requests[0].slot is None
        lent.meet("1")
        lent.place(at_1=1536)
        lent.drive()
        assert tokens_of(requests) == expected
        assert lent.loans.lent.num_tokens


def test_newcomers_go_on_beside_one_that_waits_for_others(llama: PreTrainedModel) -> None:
    specs = specs_of([1530, 50], 600, 20)
    expected = expected_of(llama, specs)
    with Lent(llama, 2) as lent:
        lent.place(at_1=512)
        engine = lent.engines[0]
        (long,) = engine.add(specs[0])
        lent.drive(lambda: engine.scheduler.lacking is not None)
        (short,) = engine.add(specs[1])
        lent.drive(lambda: short.is_finished)
        assert long.slot is not None
        assert long.num_tokens < 1600
        lent.place(at_1=1536)
        lent.drive()
        assert tokens_of([long, short]) == expected
        assert not engine.stats().num_preemptions


def test_nobody_gives_way_for_one_that_waits_for_others(llama: PreTrainedModel) -> None:
    specs = specs_of([40, 50, 60, 1500], 60, 60, 60, 700)
    expected = expected_of(llama, specs)
    with Lent(llama, 2, scheduling_policy="priority", max_seqs=3) as lent:
        lent.place()
        engine = lent.engines[0]
        requests = [engine.add(msgspec.structs.replace(s, priority=1))[0] for s in specs[:3]]
        lent.drive(lambda: all(request.num_output_tokens for request in requests))
        requests += engine.add(specs[3])
        lent.drive(lambda: all(request.is_finished for request in requests[:3]))
        assert not engine.stats().num_preemptions
        assert requests[3].slot is None
        lent.place(at_1=1536)
        lent.drive()
        assert tokens_of(requests) == expected


def test_two_that_want_the_same_tier_run_one_after_the_other(llama: PreTrainedModel) -> None:
    """Both begin; for what they generate neither the tier has room, nor anybody lends."""
    specs = specs_of([1530, 1530], 600)
    expected = expected_of(llama, specs)
    with Lent(llama, 2, swap_memory=49 * borrowing.PAGE_BYTES) as lent:
        lent.place(at_1=0)
        requests = [lent.engines[0].add(spec)[0] for spec in specs]
        lent.drive(lambda: all(request.slot is not None for request in requests))
        lent.drive()
        assert tokens_of(requests) == expected
        assert lent.engines[0].stats().num_preemptions


def test_none_that_gives_up_comes_back_before_it_may(llama: PreTrainedModel) -> None:
    specs = specs_of([2300, 30], 40, 80)
    expected = expected_of(llama, specs)
    with Lent(llama, 2) as lent:
        lent.place(at_1=1536)
        requests = [lent.engines[0].add(spec)[0] for spec in specs]
        lent.drive(lambda: requests[0].num_output_tokens > 3)
        lent.place(give_up=True, at_1=1536)
        lent.drive(lambda: requests[1].is_finished)
        assert requests[0].slot is None
        assert not requests[0].is_finished
        assert lent.engines[0].stats().num_preemptions == 1
        lent.place(at_1=1536)
        lent.drive()
        assert tokens_of(requests) == expected


def test_a_long_wait_in_line_does_not_count_once_it_is_too_long_for_all(
    llama: PreTrainedModel,
) -> None:
    (spec,) = specs_of([2300], 10)
    (expected,) = expected_of(llama, [spec])
    with Lent(llama, 2) as lent:
        lent.place()
        loop, engine = lent.llms[0].loop, lent.engines[0]
        (request,) = engine.add(spec)
        admission = engine.admission
        for longest in (admission.longest, 1000, admission.longest):
            engine.admission = replace(admission, longest=longest)
            until_s = time.monotonic() + (2 if longest > 1000 else 0.2) * borrowing.SHORTAGE_WAIT_S
            while time.monotonic() < until_s:
                assert not [o.failure for o in loop.turn() if o.failure is not None]
        lent.place(at_1=1536)
        lent.drive()
        assert tokens_of([request]) == [expected]


def test_who_takes_nothing_in_is_named_for_a_while(llama: PreTrainedModel) -> None:
    specs = specs_of([1900, 2300], 150, 10)
    with Lent(llama, 2) as lent:
        (own,) = lent.engines[1].add(specs[0])  # the creditor has no room
        lent.drive(lambda: own.num_output_tokens > 3)
        lent.place(at_1=1536)
        engine = lent.engines[0]
        (long,) = engine.add(specs[1])
        lent.drive(lambda: engine.scheduler.lacking is not None)
        report = report_of(engine)
        assert report is not None
        assert report.refusing == ("1",)
        assert report.lacking == Lacking(long.key, 512)
        assert long.slot is not None
        lent.drive()


def test_what_nobody_can_hold_any_more_says_so(llama: PreTrainedModel) -> None:
    specs = specs_of([1500], 1500)
    with Lent(llama) as lent:
        lent.place(at_1=1536)
        loop = lent.llms[0].loop
        (request,) = lent.engines[0].add(specs[0])
        lent.drive(lambda: request.num_output_tokens > 3)
        lent.loans.place({}, ["1"], has_lenders=False)
        engine = lent.engines[0]
        engine.admission = replace(engine.admission, longest=lent.own_longest)
        outputs = []
        while engine.has_work:
            outputs += loop.turn()
        assert request.num_output_tokens > 500  # as far as its own memory goes
        (failure,) = [output.failure for output in outputs if output.failure is not None]
        assert "others have left" in str(failure.error())


def test_one_that_goes_on_may_have_as_much_as_there_is_now(llama: PreTrainedModel) -> None:
    (spec,) = specs_of([1500], 1)
    spec = msgspec.structs.replace(spec, params=replace(spec.params, max_tokens=None))
    with Lent(llama, 1) as lent:
        engine = lent.engines[0]
        engine.admission = replace(engine.admission, longest=3000)
        orphan = Continuation(spec=spec, output_token_ids=[1] * 500)
        assert engine.restore(orphan).max_tokens == 3000 - 1500 + 1
        moved = msgspec.structs.replace(orphan, max_tokens=5000)  # as where it was let in
        assert engine.restore(moved).max_tokens == 5000
        engine.admission = replace(engine.admission, longest=1800)
        assert engine.resume(orphan).is_finished  # and is not computed again to fail
        (output,) = engine.take_outputs()
        assert output.finish_reason == "length"
