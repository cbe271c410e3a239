"""The verbs of departures and arrivals in every state, twice each, and in the wrong order."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import migrating
import msgspec
import pytest
import zoo
from transformers import PreTrainedModel
from vkv import SamplingParams
from vkv.allocator import Slot
from vkv.allocator.transfer.transfers import TransferState
from vkv.runtime.engine.loop import EngineLoop
from vkv.runtime.engine.messages import Abort, Add, Finish, Resume
from vkv.runtime.engine.migration.arrivals import ArrivalState
from vkv.runtime.engine.migration.departures import DepartureState
from vkv.runtime.engine.migration.model_state import pack_state, unpack_state
from vkv.runtime.request.continuation import Continuation
from vkv.runtime.request.spec import RequestSpec
from vkv.vmem.errors import (
    DriverError,
    InvalidOperation,
    InvalidPrompt,
    OutOfPages,
    OutOfSlots,
    RequestTooLong,
    SequenceGone,
    UsageError,
)

_KEY = ("r", 0)
_PAGE_BYTES = 4096


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return zoo.tiny_model("llama")


@pytest.fixture
def rig(llama: PreTrainedModel) -> Iterator[migrating.Rig]:
    with migrating.rig(llama) as rig:
        yield rig


def _spec(name: str = "r", **options: Any) -> RequestSpec:
    (prompt,) = zoo.random_prompts([30])
    return RequestSpec(
        request_id=name, prompt_token_ids=prompt, params=zoo.greedy(40, **options), seed=3
    )


def _started(rig: migrating.Rig, num_turns: int = 4, **options: Any) -> EngineLoop:
    loop = rig.loops["a"]
    loop.carry_out([Add(_spec(**options))])
    for _ in range(num_turns):
        loop.turn()
    return loop


def _finish(loop: EngineLoop) -> list[int]:
    """The tokens that come from now on."""
    token_ids: list[int] = []
    while loop.has_work:
        for output in loop.turn():
            token_ids += output.token_ids
    migrating.check_idle(loop)
    return token_ids


def _expected(llama: PreTrainedModel) -> list[int]:
    return migrating.undisturbed(llama, [_spec()])[_KEY].token_ids


# -- departures ----------------------------------------------------------------------------------


def test_a_departure_grows_while_the_request_goes_on(rig: migrating.Rig) -> None:
    loop = _started(rig)
    departure = loop.departures.begin(_KEY, 1)
    assert departure.num_ready == 33
    assert loop.departures.begin(_KEY, 1) is departure
    loop.turn()
    assert loop.departures.extend(_KEY, 1).num_ready == 34
    assert departure.outgoing is not None
    assert departure.outgoing.num_tokens == 34
    assert departure.slot is not None
    assert departure.slot.num_pins == 1
    loop.departures.go_on(_KEY, 1)
    assert len(_finish(loop)) == 40 - 5


def test_what_has_departed_runs_no_more_until_it_comes_back(
    rig: migrating.Rig, llama: PreTrainedModel
) -> None:
    loop = _started(rig)
    engine = loop.engine
    num_computed = engine.num_computed_tokens
    loop.departures.begin(_KEY, 1)
    departure = loop.departures.depart(_KEY, 1)
    assert loop.departures.depart(_KEY, 1) is departure
    assert departure.continuation is not None
    assert departure.continuation.output_token_ids == tuple(_expected(llama)[:4])
    assert not engine.has_work
    assert engine.find(_KEY) is None
    assert engine.scheduler.num_places_kept == 1
    assert loop.turn() == []
    with pytest.raises(InvalidOperation, match="on their way"):
        loop.sleep()
    for _ in range(2):
        assert loop.departures.go_on(_KEY, 1)
    assert _finish(loop) == _expected(llama)[4:]
    assert engine.num_computed_tokens == num_computed + 40 - 4


def test_what_others_generated_meanwhile_is_taken_over(
    rig: migrating.Rig, llama: PreTrainedModel
) -> None:
    loop, expected = _started(rig), _expected(llama)
    loop.departures.begin(_KEY, 1)
    loop.departures.depart(_KEY, 1)
    assert loop.departures.go_on(_KEY, 1, owner_epoch=9, output_token_ids=expected[:11])
    outputs = loop.turn()
    assert [output.epoch for output in outputs] == [9]
    assert [*outputs[0].token_ids, *_finish(loop)] == expected[11:]


def test_one_that_comes_back_with_all_its_tokens_ends(
    rig: migrating.Rig, llama: PreTrainedModel
) -> None:
    loop = _started(rig)
    loop.departures.begin(_KEY, 1)
    loop.departures.depart(_KEY, 1)
    assert not loop.departures.go_on(_KEY, 1, output_token_ids=_expected(llama))
    assert [output.finish_reason for output in loop.turn()] == ["length"]
    migrating.check_idle(loop)


def test_what_was_released_stays_away(rig: migrating.Rig) -> None:
    loop = _started(rig)
    loop.departures.begin(_KEY, 1)
    with pytest.raises(InvalidOperation, match="goes on here"):
        loop.departures.release(_KEY, 1)
    loop.departures.depart(_KEY, 1)
    for _ in range(2):
        loop.departures.release(_KEY, 1)
    assert not loop.departures.go_on(_KEY, 1)
    with pytest.raises(SequenceGone, match="elsewhere"):
        loop.departures.depart(_KEY, 1)
    assert loop.turn() == []
    # What it computed is found again by its tokens.
    assert loop.engine.cache.prefix_length(_spec().prompt_token_ids) == 30
    migrating.check_idle(loop)


def test_late_verbs_of_an_epoch_that_has_ended_do_nothing(rig: migrating.Rig) -> None:
    loop = _started(rig)
    assert loop.departures.go_on(_KEY, 2)  # which overtook its `begin`
    for verb in (loop.departures.begin, loop.departures.depart, loop.departures.extend):
        with pytest.raises(InvalidOperation, match="later"):
            verb(_KEY, 2)
    with pytest.raises(InvalidOperation, match="has ended: it was ended before it began"):
        loop.departures.begin(_KEY, 2)
    with pytest.raises(InvalidOperation, match="later"):
        loop.departures.begin(_KEY, 1)
    loop.departures.begin(_KEY, 3)
    loop.departures.begin(_KEY, 5)  # whoever drove the third is not there any more
    with pytest.raises(InvalidOperation, match="not known"):
        loop.departures.depart(_KEY, 3)
    with pytest.raises(InvalidOperation, match="overtaken"):
        loop.departures.go_on(_KEY, 3)
    loop.departures.depart(_KEY, 5)
    for epoch in (6, 7):
        with pytest.raises(InvalidOperation, match="is away"):
            loop.departures.begin(_KEY, epoch)
        with pytest.raises(InvalidOperation, match="is away"):
            loop.departures.go_on(_KEY, epoch)
    with pytest.raises(InvalidOperation, match="not known"):
        loop.departures.release(_KEY, 6)
    assert loop.departures.go_on(_KEY, 5)
    assert len(_finish(loop)) == 36


def test_what_is_not_there_cannot_leave(rig: migrating.Rig) -> None:
    loop = _started(rig)
    for key in (("x", 0), ("r", 1)):
        with pytest.raises(SequenceGone):
            loop.departures.begin(key, 1)
        assert not loop.departures.go_on(key, 1)
    loop.departures.begin(_KEY, 1)
    loop.carry_out([Finish(*_KEY)])
    with pytest.raises(SequenceGone, match="finished"):
        loop.departures.depart(_KEY, 1)


def test_one_that_loses_its_slot_says_so(rig: migrating.Rig) -> None:
    loop = _started(rig)
    departure = loop.departures.begin(_KEY, 1)
    loop.engine.scheduler.preempt(loop.engine.requests[0])
    loop.carry_out()
    assert departure.state is DepartureState.ENDED
    assert departure.is_here
    with pytest.raises(InvalidOperation, match="gave its slot up"):
        loop.departures.extend(_KEY, 1)
    assert len(_finish(loop)) == 36


@pytest.mark.parametrize("message", [Abort("r"), Finish("r", 0)], ids=["abort", "finish"])
def test_messages_reach_what_is_away(rig: migrating.Rig, message: Abort | Finish) -> None:
    loop = _started(rig)
    loop.departures.begin(_KEY, 1)
    loop.departures.depart(_KEY, 1)
    outputs = loop.carry_out([message, message])
    expected = ["abort"] if isinstance(message, Abort) else []
    assert [output.finish_reason for output in outputs] == expected
    assert not loop.departures.go_on(_KEY, 1)
    migrating.check_idle(loop)


def test_an_engine_that_closes_says_so_of_what_is_away(llama: PreTrainedModel) -> None:
    with migrating.rig(llama) as rig:
        loop = _started(rig)
        loop.departures.begin(_KEY, 1)
        loop.departures.depart(_KEY, 1)
        loop.arrivals.begin(Continuation(spec=_spec("s"), epoch=1), 20)
        loop.close()
        assert [output.finish_reason for output in loop.take_outputs()] == ["abort"]


def test_a_request_that_finishes_leaves_nothing_pinned(rig: migrating.Rig) -> None:
    loop = _started(rig)
    departure = loop.departures.begin(_KEY, 1)
    _finish(loop)
    assert departure.state is DepartureState.ENDED
    assert not departure.is_here


def test_exposed_memory_gives_way(llama: PreTrainedModel) -> None:
    """One running request lacks memory that a departure holds back: nobody waits for that."""
    with migrating.rig(llama, kv_memory=8 * _PAGE_BYTES) as rig:
        loop = _started(rig)
        loop.engine.scheduler.preempt(loop.engine.requests[0])
        departure = loop.departures.begin(_KEY, 1)
        assert departure.outgoing is not None  # parked, and pinned
        other = replace(zoo.greedy(60), seed=1)
        spec = RequestSpec(request_id="o", prompt_token_ids=[5] * 60, params=other, priority=-1)
        loop.engine.set_priority("r", 5)
        loop.turn([Add(spec)])
        while loop.has_work:
            loop.turn()
        migrating.check_idle(loop)


def test_lent_memory_that_gives_way_is_the_targets(llama: PreTrainedModel) -> None:
    """What was parked of a request that waits: the target may go on with the very pages."""
    with migrating.rig(llama, movable=True) as rig:
        loop = _started(rig)
        loop.engine.scheduler.preempt(loop.engine.requests[0])
        loop.departures.begin(_KEY, 1)
        outgoing = loop.departures.depart(_KEY, 1).outgoing
        assert outgoing is not None
        for descriptor in outgoing.lend().descriptors:
            os.close(descriptor)
        assert loop.departures.give_way()
        assert outgoing.state is TransferState.COMMITTED
        assert loop.departures.go_on(_KEY, 1)
        assert len(_finish(loop)) == 36  # computed again
        migrating.check_idle(loop)


# -- arrivals ------------------------------------------------------------------------------------


def _continuation(epoch: int = 1, count: int = 0, name: str = "r") -> Continuation:
    return Continuation(spec=_spec(name), epoch=epoch, output_token_ids=tuple(range(count)))


def test_an_arrival_has_a_place_and_memory_first(rig: migrating.Rig) -> None:
    loop = rig.loops["b"]
    arrival = loop.arrivals.begin(_continuation(), 20, num_room=25)
    assert loop.arrivals.begin(_continuation(), 20) is arrival
    assert loop.engine.scheduler.num_places_kept == 1
    assert loop.engine.stats().pages_held == 2
    assert loop.arrivals.extend(_KEY, 1, 50).num_room == 50
    assert loop.engine.stats().pages_held == 4
    for _ in range(2):
        loop.arrivals.abort(_KEY, 1)
    assert arrival.state is ArrivalState.GONE
    with pytest.raises(InvalidOperation, match="not expected"):
        loop.arrivals.extend(_KEY, 1, 60)
    migrating.check_idle(loop)


def test_an_arrival_that_the_system_keeps_is_let_go_later(
    rig: migrating.Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = rig.loops["b"]
    loop.arrivals.begin(_continuation(), 20)
    with monkeypatch.context() as patch:
        patch.setattr(loop.engine.cache, "close", _refuse)
        loop.arrivals.abort(_KEY, 1)
    assert loop.engine.stats().pages_held == 2
    loop.turn([Add(_spec("other"))])
    _finish(loop)
    assert loop.engine.stats().pages_held == 0


def _refuse(slot: Slot) -> None:
    raise DriverError("injected")


def test_what_was_aborted_never_comes(rig: migrating.Rig) -> None:
    loop = rig.loops["b"]
    loop.arrivals.abort(_KEY, 2)  # which overtook the rest
    for epoch in (1, 2):
        with pytest.raises(InvalidOperation, match="later"):
            loop.arrivals.begin(_continuation(epoch), 20)
        with pytest.raises(InvalidOperation, match="has ended"):
            loop.arrivals.commit(_continuation(epoch), 20)
    loop.arrivals.begin(_continuation(3), 20)
    loop.arrivals.abort(_KEY, 3)
    with pytest.raises(InvalidOperation, match="has ended"):
        loop.arrivals.commit(_continuation(3), 20)
    migrating.check_idle(loop)


def test_a_commit_is_for_good_and_comes_once(rig: migrating.Rig, llama: PreTrainedModel) -> None:
    """Also one whose memory is gone by then, or that was never expected: it is computed again."""
    loop, expected = rig.loops["b"], _expected(llama)
    for epoch, is_expected in ((1, False), (2, True)):
        if is_expected:
            loop.arrivals.begin(_continuation(epoch), 20, lease_s=0.0)
            loop.carry_out()
            assert loop.arrivals.num_under_way == 0
        given = msgspec.structs.replace(
            _continuation(epoch), output_token_ids=tuple(expected[:9]), max_tokens=40
        )
        assert loop.arrivals.commit(given, 20) is not None
        assert loop.arrivals.commit(given, 20) is None
        with pytest.raises(UsageError, match="unfinished here"):
            loop.arrivals.begin(_continuation(9), 20)
        assert _finish(loop) == expected[9:]


def test_an_abort_drops_what_goes_on_already(rig: migrating.Rig) -> None:
    loop = rig.loops["b"]
    loop.arrivals.commit(_continuation(2, 3), 0)
    loop.turn()
    loop.arrivals.abort(_KEY, 1)  # of an earlier epoch
    assert loop.engine.has_work
    loop.arrivals.abort(_KEY, 2)
    assert loop.turn() == []
    migrating.check_idle(loop)


def test_places_and_memory_are_not_promised_twice(llama: PreTrainedModel) -> None:
    with migrating.rig(llama, max_seqs=2, kv_memory=10 * _PAGE_BYTES) as rig:
        loop = rig.loops["b"]
        loop.arrivals.begin(_continuation(name="1"), 30)
        with pytest.raises(OutOfPages):
            loop.arrivals.begin(_continuation(name="2"), 30, num_room=120)
        assert loop.engine.scheduler.num_places_kept == 1
        loop.arrivals.begin(_continuation(name="2"), 20)
        with pytest.raises(OutOfSlots, match="places"):
            loop.arrivals.begin(_continuation(name="3"), 20)
        with pytest.raises(OutOfPages):
            loop.arrivals.extend(("1", 0), 1, 200)
        # What arrives keeps its place: a request that comes later waits.
        loop.turn([Add(_spec("late"))])
        assert not loop.engine.scheduler.running
        loop.arrivals.abort(("1", 0), 1)
        loop.arrivals.abort(("2", 0), 1)
        assert len(_finish(loop)) == 40


# -- resuming ------------------------------------------------------------------------------------


def test_a_sequence_may_be_resumed_from_its_tokens_alone(
    rig: migrating.Rig, llama: PreTrainedModel
) -> None:
    loop, expected = rig.loops["b"], _expected(llama)
    for count in (0, 1, 7, 39):
        loop.post(Resume(Continuation(spec=_spec(), output_token_ids=expected[:count], epoch=4)))
        assert _finish(loop) == expected[count:]


def test_what_is_parked_of_a_sequence_is_not_computed_again(
    rig: migrating.Rig, llama: PreTrainedModel
) -> None:
    loop, expected = _started(rig), _expected(llama)
    loop.departures.begin(_KEY, 1)
    continuation = loop.departures.depart(_KEY, 1).continuation
    assert continuation is not None
    loop.departures.release(_KEY, 1)
    num_computed = loop.engine.num_computed_tokens
    loop.post(Resume(continuation))
    assert _finish(loop) == expected[4:]
    assert loop.engine.num_computed_tokens == num_computed + 40 - 4


def test_what_has_ended_is_not_resumed_further(rig: migrating.Rig, llama: PreTrainedModel) -> None:
    loop, expected = rig.loops["b"], _expected(llama)
    (output,) = loop.turn([Resume(Continuation(spec=_spec(), output_token_ids=expected))])
    assert (output.finish_reason, output.token_ids) == ("length", ())
    spec = RequestSpec(
        request_id="r",
        prompt_token_ids=[1],
        params=replace(zoo.greedy(9), stop_token_ids=(4,)),
    )
    (output,) = loop.turn([Resume(Continuation(spec=spec, output_token_ids=[3, 4]))])
    assert (output.finish_reason, output.stop_reason) == ("stop", 4)
    migrating.check_idle(loop)


def test_what_cannot_be_resumed_is_refused_by_name(rig: migrating.Rig) -> None:
    loop = rig.loops["b"]
    params = replace(zoo.greedy(40), temperature=0.9, n=3)
    given = Continuation(spec=msgspec.structs.replace(_spec(), params=params), index=2, epoch=5)
    wrong = [
        (msgspec.structs.replace(given, output_token_ids=[1, 96]), InvalidPrompt, "96"),
        (msgspec.structs.replace(given, max_tokens=600), RequestTooLong, "600"),
    ]
    for continuation, kind, words in wrong:
        (output,) = loop.turn([Resume(continuation)])
        assert (output.index, output.epoch, output.finish_reason) == (2, 5, "error")
        assert output.failure is not None
        error = output.failure.error()
        assert isinstance(error, kind)
        assert words in str(error)
    loop.carry_out([Resume(given)])
    (output,) = loop.carry_out([Resume(given)])
    assert output.finish_reason == "error"
    loop.carry_out([Abort("r")])
    migrating.check_idle(loop)


def test_outputs_of_one_prompt_may_be_in_different_engines(llama: PreTrainedModel) -> None:
    """Followers wait for a leader that is here, and for none that is elsewhere."""
    spec = RequestSpec(
        request_id="r",
        prompt_token_ids=zoo.random_prompts([50])[0],
        params=replace(zoo.greedy(12), temperature=0.9, n=3),
        seed=5,
    )
    expected = migrating.undisturbed(llama, [spec])
    with migrating.rig(llama, 3, max_batch_tokens=16) as rig:
        rig.add([spec])
        rig.turn()  # the leader is in the middle of its prompt
        rig.migrations.migrate(("r", 1), "b")
        rig.migrations.migrate(("r", 0), "c")
        rig.finish()
        assert rig.migrations.arbiter.counts.moved == 2
    migrating.assert_equal(rig.streams, expected)


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_one_whose_room_is_less_than_its_least_tokens_goes_on(
    llama: PreTrainedModel, rig: migrating.Rig, max_tokens: int | None
) -> None:
    """`min_tokens` may be more than a slot holds behind the prompt: then it ends with the slot."""
    params = SamplingParams(temperature=0, ignore_eos=True, min_tokens=900, max_tokens=max_tokens)
    spec = RequestSpec(
        request_id="r", prompt_token_ids=zoo.random_prompts([230])[0], params=params, seed=3
    )
    expected = migrating.undisturbed(llama, [spec])
    assert len(expected[_KEY].token_ids) == 256 - 230
    rig.add([spec])
    for _ in range(5):
        rig.turn()
    rig.migrations.migrate(_KEY, "b")
    rig.finish()
    assert rig.migrations.arbiter.counts.moved == 1
    migrating.assert_equal(rig.streams, expected)


def test_prompt_scores_are_told_once(llama: PreTrainedModel) -> None:
    """Also where the prompt is computed in two engines, at every step of it."""
    spec = RequestSpec(
        request_id="r",
        prompt_token_ids=zoo.random_prompts([70])[0],
        params=zoo.greedy(5, prompt_logprobs=1),
    )
    expected = migrating.undisturbed(llama, [spec])
    assert len(expected[_KEY].prompt_logprobs) == 70
    for num_turns in range(12):
        with migrating.rig(llama, max_batch_tokens=8) as rig:
            rig.add([spec])
            for _ in range(num_turns):
                rig.turn()
            rig.migrations.migrate(_KEY, "b")
            rig.finish()
        migrating.assert_equal(rig.streams, expected)


# -- hybrids ---------------------------------------------------------------------------------------


def test_a_hybrids_state_survives_as_bytes() -> None:
    model = zoo.tiny_model("qwen3_next")
    with migrating.rig(model) as rig:
        loop = _started(rig)
        loop.departures.begin(_KEY, 1)
        departure = loop.departures.depart(_KEY, 1)
        state = departure.model_state
        assert state
        again = unpack_state(pack_state(state))
        assert again is not None
        assert again.keys() == state.keys()
        assert all((again[key] == tensor).all() for key, tensor in state.items())
        assert all(again[key].dtype == tensor.dtype for key, tensor in state.items())
        loop.departures.go_on(_KEY, 1)
        _finish(loop)


def test_the_map_of_memory_names_slots_that_sequences_come_to_and_leave(
    rig: migrating.Rig, llama: PreTrainedModel
) -> None:
    here, there = _started(rig), rig.loops["b"]
    (strip,) = here.memory_map().strips
    assert (strip.state, strip.request) == ("live", "r")
    here.departures.begin(_KEY, 1)
    (strip,) = here.memory_map().strips
    assert (strip.state, strip.request) == ("live", "r")  # it goes on here
    departure = here.departures.depart(_KEY, 1)
    (strip,) = here.memory_map().strips
    assert (strip.state, strip.request) == ("leaving", "r")
    assert departure.continuation is not None
    there.arrivals.begin(departure.continuation, 30)
    (strip,) = there.memory_map().strips
    assert (strip.state, strip.request) == ("arriving", "r")
    there.arrivals.abort(_KEY, 1)
    assert all(strip.state == "parked" for strip in there.memory_map().strips)
    here.departures.go_on(_KEY, 1)
    here.turn()
    assert any(strip.state == "live" for strip in here.memory_map().strips)
    _finish(here)
