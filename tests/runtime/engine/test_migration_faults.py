"""Migrations whose messages are lost, whose peers die, whose memory is short: one owner, always."""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import migrating
import msgspec
import pytest
import zoo
from transformers import PreTrainedModel
from vkv.allocator.transfer import Outgoing
from vkv.runtime.engine.messages import Abort, Finish, SetPriority
from vkv.runtime.engine.migration.carriers import Carriage, CopyCarrier
from vkv.runtime.engine.migration.handshake import HandshakeState, Stages
from vkv.runtime.link.carrier import SocketCarrier
from vkv.runtime.request.spec import RequestSpec
from vkv.vmem.errors import InvalidOperation

_PAGE_BYTES = 4096  # 16 tokens of the tiny llama
_KEY = ("0", 0)
_MOST_TURNS = 14  # that a migration takes here, when nothing is lost


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return zoo.tiny_model("llama")


def _spec(name: str = "0", **kind: Any) -> RequestSpec:
    """A request that runs for longer than a migration takes."""
    (spec,) = migrating.specs(
        zoo.random_prompts([40]), max_tokens=60, kinds=[{"temperature": 0.8, "logprobs": 1, **kind}]
    )
    return RequestSpec(
        request_id=name, prompt_token_ids=spec.prompt_token_ids, params=spec.params, seed=7
    )


@pytest.fixture(scope="module")
def alone(llama: PreTrainedModel) -> migrating.Stream:
    return migrating.undisturbed(llama, [_spec()])[_KEY]


def _begin(rig: migrating.Rig, name: str = "0") -> None:
    """A request on its way from the first instance to the second."""
    rig.streams[name, 0] = migrating.Stream()
    rig.migrations.add(_spec(name), "a")
    for _ in range(4):
        rig.turn()
    rig.migrations.migrate((name, 0), "b")


def _equal(stream: migrating.Stream, alone: migrating.Stream) -> None:
    migrating.assert_equal({_KEY: stream}, {_KEY: alone})


# -- messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", [(), (0, 0), (0, 3), (0, 9), (3,), (9,)], ids=str)
def test_any_message_may_be_lost_doubled_or_late(
    llama: PreTrainedModel, alone: migrating.Stream, fate: Sequence[int]
) -> None:
    wrong: list[int] = []
    channel = migrating.Erring(lambda number: fate if number in wrong else (0,))
    stages = Stages(small_tokens=2, spare_tokens=8)
    with migrating.rig(llama, channel=channel, stages=stages) as rig:
        _begin(rig, "none")
        rig.finish()
        most = channel.num_sent
        assert most >= 12  # six commands and their answers
        for number in range(most):
            channel.num_sent, wrong[:] = 0, [number]
            _begin(rig, str(number))
            rig.finish()
            _equal(rig.streams[str(number), 0], alone)
        assert rig.migrations.arbiter.counts.moved == most + 1


@pytest.mark.parametrize("seed", range(4))
def test_channels_that_err_at_random(llama: PreTrainedModel, seed: int) -> None:
    """While engines rest for a while, clients go away, and in the end one engine dies."""
    specs = migrating.specs(migrating.prompts(), max_tokens=40)
    draw = random.Random(seed)
    channel = migrating.at_random(draw, 0.3)
    with migrating.rig(llama, 3, channel=channel, kv_memory=40 * _PAGE_BYTES) as rig:
        rig.add(specs)
        gone: list[str] = []
        resting: list[str] = []
        while rig.unfinished:
            rig.move_some(draw, 0.3)
            if draw.random() < 0.1:
                resting = draw.sample(rig.migrations.instances, draw.randint(0, 2))
            if draw.random() < 0.03:
                gone.append(draw.choice(rig.unfinished)[0])
                rig.migrations.tell(Abort(gone[-1]))
            if rig.num_turns == 30:
                rig.migrations.died(draw.choice(rig.migrations.instances))
            rig.turn(resting)
        rig.finish()
        assert rig.migrations.arbiter.counts.moved >= 10
    expected = migrating.undisturbed(llama, specs)
    for key, stream in rig.streams.items():
        if key[0] in gone:
            assert expected[key].token_ids[: len(stream.token_ids)] == stream.token_ids
            assert stream.ends[0][0] in ("abort", "length", "stop")
        else:
            migrating.assert_equal({key: stream}, {key: expected[key]})


# -- deaths ----------------------------------------------------------------------------------------


def _die(
    llama: PreTrainedModel,
    alone: migrating.Stream,
    victims: Sequence[str],
    num_turns: int,
    decide: Callable[[int], Sequence[int]] = lambda _: (0,),
) -> HandshakeState | None:
    """A migration some turns after whose beginning instances die; returns its state then."""
    with migrating.rig(llama, 3, channel=migrating.Erring(decide)) as rig:
        _begin(rig)
        for _ in range(num_turns):
            rig.turn()
        handshake = rig.migrations.arbiter.handshake(_KEY)
        state = None if handshake is None else handshake.state
        for victim in victims:
            rig.migrations.died(victim)
        rig.finish()
        _equal(rig.streams[_KEY], alone)
        assert sum(vars_of(rig.migrations.arbiter.counts)) == 1
    return state


def vars_of(counts: Any) -> list[int]:
    return [counts.moved, counts.stayed, counts.lost]


@pytest.mark.parametrize("victims", ["a", "b", "ab", "ba", "c"])
def test_peers_may_die_in_any_state(
    llama: PreTrainedModel, alone: migrating.Stream, victims: str
) -> None:
    states = {_die(llama, alone, victims, turns) for turns in range(_MOST_TURNS)}
    assert states >= set(HandshakeState) - {HandshakeState.RETURNING, HandshakeState.DONE,
                                            HandshakeState.EXTENDING}  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_peers_may_die_while_messages_are_lost(
    llama: PreTrainedModel, alone: migrating.Stream, seed: int
) -> None:
    draw = random.Random(seed)
    fates = [draw.choice([(0,), (0,), (), (0, 4), (3,)]) for _ in range(200)]
    victims = draw.choice(["a", "b", "ab", "ba"])
    _die(llama, alone, victims, draw.randrange(24), lambda number: fates[number % 200])


def test_the_words_of_one_that_was_declared_dead_do_not_count(
    llama: PreTrainedModel, alone: migrating.Stream
) -> None:
    """A target that goes on though the sequence went back to its source."""
    with migrating.rig(llama) as rig:
        _begin(rig)
        arbiter = rig.migrations.arbiter
        while arbiter.owner(_KEY) != "b" or rig.loops["b"].engine.find(_KEY) is None:
            rig.turn()
        rig.migrations.died("b")
        num_dropped = 0
        while rig.unfinished:
            rig.turn()
            outputs = rig.loops["b"].turn()
            num_dropped += len(outputs)
            assert not arbiter.accept(outputs)
        rig.finish()
        assert num_dropped > 5
        _equal(rig.streams[_KEY], alone)


@pytest.mark.parametrize("num_turns", [0, 2, 9, 40])
@pytest.mark.parametrize("is_moving", [False, True], ids=["at rest", "on its way"])
def test_what_is_taken_away_goes_on_elsewhere(
    llama: PreTrainedModel, alone: migrating.Stream, num_turns: int, is_moving: bool
) -> None:
    """From an instance that lives on, and goes on speaking of it for a turn."""
    with migrating.rig(llama) as rig:
        arbiter = rig.migrations.arbiter
        if is_moving:
            _begin(rig)
        else:
            rig.streams[_KEY] = migrating.Stream()
            rig.migrations.add(_spec(), "b")
        for _ in range(num_turns):
            rig.turn()
        was_moving = arbiter.handshake(_KEY) is not None
        arbiter.take_away(_KEY)
        assert arbiter.counts.orphaned == (not was_moving)
        rig.turn()
        if not was_moving:
            assert arbiter.owner(_KEY) == "a"
            assert rig.loops["b"].engine.find(_KEY) is None
        rig.finish()
        _equal(rig.streams[_KEY], alone)
        arbiter.take_away(_KEY)  # without effect: it has ended
        assert not arbiter.take_orphans()


# -- what else may happen meanwhile ----------------------------------------------------------------


def _meanwhile(
    llama: PreTrainedModel,
    num_turns: int,
    do: Callable[[migrating.Rig], None],
    **options: Any,
) -> migrating.Rig:
    """Do something some turns after a migration began."""
    with migrating.rig(llama, **options) as rig:
        _begin(rig)
        for _ in range(num_turns):
            rig.turn()
        do(rig)
        rig.finish()
    return rig


@pytest.mark.parametrize("channel", ["sound", "late"])
def test_a_client_may_go_away_at_any_time(
    llama: PreTrainedModel, alone: migrating.Stream, channel: str
) -> None:
    for turns in range(_MOST_TURNS):
        erring = migrating.Erring(lambda number: (number % 3,)) if channel == "late" else None
        rig = _meanwhile(llama, turns, lambda rig: rig.migrations.tell(Abort("0")), channel=erring)
        stream = rig.streams[_KEY]
        assert [end[0] for end in stream.ends] == ["abort"]
        assert alone.token_ids[: len(stream.token_ids)] == stream.token_ids


def test_text_may_be_whole_at_any_time(llama: PreTrainedModel) -> None:
    """A stop string ends it in the front end; no output comes, and nothing runs on."""

    def finish(rig: migrating.Rig) -> None:
        rig.migrations.tell(Finish(*_KEY))
        rig.streams[_KEY].ends.append(("stop",))

    for turns in range(_MOST_TURNS):
        rig = _meanwhile(llama, turns, finish)
        computed = sum(loop.engine.num_computed_tokens for loop in rig.loops.values())
        assert computed < 40 + 4 + turns + 12


def test_a_priority_comes_along(llama: PreTrainedModel) -> None:
    for turns in range(_MOST_TURNS):
        with migrating.rig(llama, scheduling_policy="priority") as rig:
            _begin(rig)
            for _ in range(turns):
                rig.turn()
            rig.migrations.tell(SetPriority("0", 5))
            while rig.migrations.arbiter.num_moving:
                rig.turn()
            rig.turn()
            request = rig.loops["b"].engine.find(_KEY)
            assert request is not None
            assert request.priority == 5
            rig.finish()


@pytest.mark.parametrize("where", ["a", "b"])
def test_a_model_may_change_at_any_time(
    llama: PreTrainedModel, alone: migrating.Stream, where: str
) -> None:
    """To what it was, so that the tokens are the same; all that was computed with it goes."""
    for turns in range(_MOST_TURNS):
        rig = _meanwhile(llama, turns, lambda rig: rig.loops[where].weights_changed())
        _equal(rig.streams[_KEY], alone)


def test_a_request_may_give_its_slot_up_at_any_time(
    llama: PreTrainedModel, alone: migrating.Stream
) -> None:
    def preempt(rig: migrating.Rig) -> None:
        for loop in rig.loops.values():
            for request in loop.engine.scheduler.running:
                loop.engine.scheduler.preempt(request)

    for turns, swap in itertools.product(range(_MOST_TURNS), (None, 1 << 20)):
        rig = _meanwhile(llama, turns, preempt, swap_memory=swap)
        _equal(rig.streams[_KEY], alone)


def test_a_request_may_finish_while_it_is_copied(llama: PreTrainedModel) -> None:
    """At every length: the last token is said once, by whoever has it."""
    for max_tokens in range(2, 20):
        (spec,) = migrating.specs(
            zoo.random_prompts([40]), max_tokens=max_tokens, kinds=[{"temperature": 0}]
        )
        with migrating.rig(llama) as rig:
            rig.add([spec])
            rig.turn()
            rig.migrations.migrate(_KEY, "b")
            rig.finish()
        migrating.assert_equal(rig.streams, migrating.undisturbed(llama, [spec]))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"kv_memory": 6 * _PAGE_BYTES}, {"max_len": 64}, {"max_seqs": 1}, {"split_kv": True}],
    ids=lambda options: next(iter(options)),
)
def test_a_target_that_cannot_have_it_leaves_it_where_it_is(
    llama: PreTrainedModel, alone: migrating.Stream, options: dict[str, Any]
) -> None:
    with migrating.rig(llama, each={1: options}) as rig:
        rig.streams["x", 0] = migrating.Stream()
        rig.migrations.add(
            RequestSpec(request_id="x", prompt_token_ids=[1] * 30, params=zoo.greedy(30)), "b"
        )
        _begin(rig)
        handshake = rig.migrations.arbiter.handshake(_KEY)
        rig.finish()
        assert handshake is not None
        assert handshake.outcome == "stayed"
        assert handshake.why
        _equal(rig.streams[_KEY], alone)


def test_a_target_that_sleeps_refuses(llama: PreTrainedModel, alone: migrating.Stream) -> None:
    with migrating.rig(llama) as rig:
        rig.loops["b"].sleep()
        _begin(rig)
        handshake = rig.migrations.arbiter.handshake(_KEY)
        rig.finish()
        assert handshake is not None
        assert "asleep" in handshake.why
        _equal(rig.streams[_KEY], alone)


def test_a_target_may_refuse_after_the_commit_point(
    llama: PreTrainedModel, alone: migrating.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the sequence goes back to its source, which has its slot still."""
    with migrating.rig(llama) as rig:
        _begin(rig)

        def refuse(*_: Any) -> None:
            raise InvalidOperation("not here")

        while rig.migrations.arbiter.owner(_KEY) == "a":
            rig.turn()
        monkeypatch.setattr(rig.loops["b"].engine, "restore", refuse)
        rig.finish()
        assert rig.migrations.arbiter.counts.stayed == 1
        computed = sum(loop.engine.num_computed_tokens for loop in rig.loops.values())
        assert computed == 40 + 60 - 1
        _equal(rig.streams[_KEY], alone)


class _Broken(CopyCarrier):
    """Carries a number of times, then no more."""

    def __init__(self, num_good: int, how: str) -> None:
        super().__init__()
        self._left = num_good
        self._how = how

    def carry(self, outgoing: Outgoing, address: bytes, start: int, stop: int) -> Carriage:
        self._left -= 1
        if self._left >= 0:
            return super().carry(outgoing, address, start, stop)
        if self._how == "at once":
            raise InvalidOperation("the wire is cut")
        return _Failed()


class _Failed:
    is_done = True
    error = InvalidOperation("the wire is cut")

    def cancel(self) -> None: ...


@pytest.mark.parametrize("how", ["at once", "later"])
@pytest.mark.parametrize("num_good", range(3))
def test_a_carrier_may_fail_at_any_stage(
    llama: PreTrainedModel, alone: migrating.Stream, num_good: int, how: str
) -> None:
    with migrating.rig(llama, carrier=_Broken(num_good, how)) as rig:
        _begin(rig)
        handshake = rig.migrations.arbiter.handshake(_KEY)
        rig.finish()
        assert handshake is not None
        assert ("wire is cut" in handshake.why) == (handshake.outcome == "stayed")
        _equal(rig.streams[_KEY], alone)


# -- silence ---------------------------------------------------------------------------------------


class _Slow(CopyCarrier):
    """Copies at once, and is done some seconds later."""

    def __init__(self, takes_s: float) -> None:
        super().__init__()
        self._takes_s = takes_s

    def carry(self, outgoing: Outgoing, address: bytes, start: int, stop: int) -> Carriage:
        super().carry(outgoing, address, start, stop)
        return _Late(time.monotonic() + self._takes_s)


class _Late:
    error = None

    def __init__(self, done_s: float) -> None:
        self._done_s = done_s

    @property
    def is_done(self) -> bool:
        return time.monotonic() >= self._done_s

    def cancel(self) -> None: ...


def test_a_long_copy_outlives_leases(
    llama: PreTrainedModel, alone: migrating.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arbiter reminds the end that has nothing to do."""
    stages = Stages(most=1, small_tokens=4, spare_tokens=40, lease_s=10.0)
    with migrating.rig(llama, carrier=_Slow(11.0), stages=stages) as rig:
        with monkeypatch.context() as patched:
            patched.setattr("time.monotonic", rig.clock)
            _begin(rig)
            while rig.migrations.arbiter.num_moving:
                rig.turn()
        rig.finish()
        assert rig.migrations.arbiter.counts.moved == 1
        _equal(rig.streams[_KEY], alone)


def test_nobody_waits_for_ever_for_an_arbiter_that_is_silent(
    llama: PreTrainedModel, alone: migrating.Stream
) -> None:
    """What is exposed goes on; what is expected is given back; what is away keeps its tokens."""
    for num_heard in range(16):
        is_silent: list[bool] = []
        channel = migrating.Erring(
            lambda number, most=num_heard, silent=is_silent: (
                () if silent and number >= most else (0,)
            )
        )
        with migrating.rig(
            llama, channel=channel, stages=Stages(small_tokens=4, spare_tokens=8, lease_s=0.0)
        ) as rig:
            is_silent.append(True)
            _begin(rig)
            for _ in range(12):
                rig.turn()
            for loop in rig.loops.values():
                assert loop.engine.scheduler.num_places_kept == 0
                assert loop.arrivals.num_under_way == 0
            is_silent.clear()
            rig.finish()
            _equal(rig.streams[_KEY], alone)


# -- pages that change hands -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["abort", "finish", "lease"])
def test_pages_that_the_target_may_have_are_used_by_nobody_else(
    llama: PreTrainedModel, alone: migrating.Stream, tmp_path: Path, how: str
) -> None:
    """The source gives them up after it has lent them, and before it hears what became of them; the
    target goes on with them, while the source has new requests."""
    carrier = SocketCarrier(str(tmp_path / "kv"))
    with migrating.rig(llama, carrier=carrier, movable=True, kv_memory=24 * _PAGE_BYTES) as rig:
        _begin(rig)
        arbiter, source = rig.migrations.arbiter, rig.loops["a"]
        while arbiter.handshake(_KEY).state is not HandshakeState.PAUSING:
            rig.turn()
        while arbiter.handshake(_KEY).state is not HandshakeState.COMMITTING:
            rig.turn(resting=["b"])
            time.sleep(0.02)  # pages are lent on a thread, and patience is counted in turns
        if how == "lease":
            epoch = arbiter.handshake(_KEY).epoch
            source.departures.check(_KEY, epoch)._ends_s = 0.0  # long ago
            source.departures.settle()
        else:
            source.post(Abort("0") if how == "abort" else Finish(*_KEY))
            source.carry_out()
        for number in range(6):  # where the pages were; they share no prefix with what is parked
            spec = msgspec.structs.replace(_spec(f"new {number}"), variant=str(number))
            rig.streams[spec.request_id, 0] = migrating.Stream()
            rig.migrations.add(spec, "a")
        for _ in range(6):
            rig.turn(resting=["b"])
        rig.finish()
        assert arbiter.counts.moved == 1
        for stream in rig.streams.values():
            _equal(stream, alone)
    carrier.close()
