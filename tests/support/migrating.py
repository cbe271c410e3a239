"""Engines of one process between which sequences move at random steps, and what they say."""

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zoo
from transformers import PreTrainedModel
from vkv import LLM, SamplingParams, StructuredOutputsParams
from vkv.runtime.engine.loop import EngineLoop
from vkv.runtime.engine.messages import Abort, Add
from vkv.runtime.engine.migration.handshake import Handshake, Stages
from vkv.runtime.engine.migration.local import Channel, Migrations, Post
from vkv.runtime.engine.migration.messages import Answer, Command
from vkv.runtime.request.outputs import Logprob
from vkv.runtime.request.spec import RequestSpec, SequenceKey
from vkv.runtime.request.step_output import StepOutput
from vkv.vmem.errors import VkvError

MOST_TURNS = 4000
_QUICK = Stages(small_tokens=4, spare_tokens=8)


@dataclass
class Stream:
    """All that a client gets of one output."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    num_firsts: int = 0
    ends: list[tuple[Any, ...]] = field(default_factory=list)
    error: VkvError | None = None

    def take(self, output: StepOutput) -> None:
        assert not self.ends, f"{output} came after the end"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.num_firsts += output.num_cached_tokens is not None
        if output.finish_reason is not None:
            self.ends.append((output.finish_reason, output.stop_reason, output.ends_with_text))
        if output.failure is not None:
            self.error = output.failure.error()


Streams = dict[SequenceKey, Stream]


class Clock:
    """Seconds that pass by the turn."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Rig:
    """Migrations whose clock counts turns, and what has come of them.

    Attributes:
        reasons: why sequences did not move, one of each that stayed or was lost.
    """

    migrations: Migrations
    loops: dict[str, EngineLoop]
    clock: Clock
    streams: Streams = field(default_factory=dict)
    num_turns: int = 0
    reasons: list[str] = field(default_factory=list)
    _moving: list[Handshake] = field(default_factory=list)

    def add(self, specs: Sequence[RequestSpec]) -> None:
        """Queue requests with the instances in turn."""
        names = self.migrations.instances
        for number, spec in enumerate(specs):
            for index in range(spec.params.n):
                self.streams[spec.request_id, index] = Stream()
            self.migrations.add(spec, names[number % len(names)])

    def turn(self, resting: Collection[str] = ()) -> None:
        """One turn of all instances but those that rest."""
        self.num_turns += 1
        assert self.num_turns < MOST_TURNS, "it does not end"
        self.clock.now_s += 1
        for output in self.migrations.turn(resting):
            self.streams[output.request_id, output.index].take(output)
        self._note_reasons()
        self.check_owners()

    def check_owners(self) -> None:
        """No sequence runs in two engines, and one that is not on its way runs in its owner."""
        arbiter = self.migrations.arbiter
        for key in self.unfinished:
            having = [
                name
                for name in self.migrations.instances
                if self.loops[name].engine.find(key) is not None
            ]
            assert len(having) <= 1, f"{key} runs in {having}"
            if arbiter.handshake(key) is not None or arbiter.owner(key) is None:
                continue
            if not self.loops[arbiter.owner(key)].has_mail:
                assert having == [arbiter.owner(key)], key

    def _note_reasons(self) -> None:
        over = [one for one in self._moving if one.is_done]
        self._moving = [one for one in self._moving if not one.is_done]
        self.reasons += [f"{one.why}" for one in over if one.outcome != "moved"]

    @property
    def unfinished(self) -> list[SequenceKey]:
        return [key for key, stream in self.streams.items() if not stream.ends]

    def finish(self) -> None:
        """Turn until all is over, and see that nothing is left."""
        while self.migrations.has_work or self.unfinished:
            self.turn()
        for name in self.migrations.instances:
            check_idle(self.loops[name])

    def move_some(self, draw: random.Random, rate: float) -> int:
        """Begin to move a part of what is not moving."""
        arbiter, names, count = self.migrations.arbiter, self.migrations.instances, 0
        for key in self.unfinished:
            owner = arbiter.owner(key)
            if owner is None or arbiter.handshake(key) is not None or draw.random() >= rate:
                continue
            self.migrations.migrate(key, draw.choice([name for name in names if name != owner]))
            handshake = arbiter.handshake(key)
            assert handshake is not None
            self._moving.append(handshake)
            count += 1
        return count


def check_idle(loop: EngineLoop) -> None:
    """Nothing is unfinished, expected, exposed or pinned, and all memory goes back."""
    engine = loop.engine
    assert not engine.has_work
    assert loop.departures.num_under_way == loop.arrivals.num_under_way == 0
    assert engine.scheduler.num_places_kept == 0
    engine.cache.check_invariants()
    swapping = engine.scheduler.tiers.swapping
    if swapping is not None:
        while swapping.is_leaving:
            swapping.wait()
        swapping.tier.far.check_invariants()
    stats = engine.stats()
    assert stats.pages_held == stats.pages_parked
    assert all(tenant.num_unfinished == 0 for tenant in stats.tenants)
    engine.trim()
    assert engine.stats().pages_held == 0


@contextmanager
def rig(
    model: PreTrainedModel | Path,
    num_instances: int = 2,
    *,
    channel: Channel | None = None,
    stages: Stages = _QUICK,
    carrier: Any = None,
    each: Mapping[int, Mapping[str, Any]] | None = None,
    device: str = "cpu",
    **options: Any,
) -> Iterator[Rig]:
    """Engines with the same options, but for those of `each`."""
    with ExitStack() as stack:
        loops = {}
        for number in range(num_instances):
            given = {"max_seqs": 16, **options, **(each or {}).get(number, {})}
            llm = stack.enter_context(LLM(model, device=device, **zoo.with_defaults(given)))
            loops["abcdefgh"[number]] = llm._driver._loop
            if llm.engine.scheduler.tiers.swapping is not None:
                llm.engine.scheduler.tiers.swapping.always = True
        clock = Clock()
        migrations = Migrations(
            loops, stages=stages, carrier=carrier, channel=channel, clock=clock, repeat_s=4
        )
        yield Rig(migrations, loops, clock)


def undisturbed(
    model: PreTrainedModel, specs: Sequence[RequestSpec], *, device: str = "cpu", **options: Any
) -> Streams:
    """What one engine says of all requests."""
    streams: Streams = {
        (spec.request_id, index): Stream() for spec in specs for index in range(spec.params.n)
    }
    given = zoo.with_defaults({"max_seqs": 16, **options})
    with LLM(model, device=device, **given) as llm:
        loop = llm._driver._loop
        for output in loop.carry_out([Add(spec) for spec in specs]):
            streams[output.request_id, output.index].take(output)
        while loop.has_work:
            for output in loop.turn():
                streams[output.request_id, output.index].take(output)
    return streams


def assert_equal(got: Streams, expected: Streams) -> None:
    """Every stream is complete, once, and says the same; probabilities but for rounding."""
    assert got.keys() == expected.keys()
    for key, stream in got.items():
        wanted = expected[key]
        assert stream.error is None, (key, stream.error)
        assert stream.token_ids == wanted.token_ids, key
        assert stream.ends == wanted.ends, key
        assert stream.num_firsts == wanted.num_firsts == 1, key
        _assert_close(stream.logprobs, wanted.logprobs)
        _assert_close(stream.prompt_logprobs, wanted.prompt_logprobs)


def _assert_close(
    got: Sequence[dict[int, Logprob] | None], expected: Sequence[dict[int, Logprob] | None]
) -> None:
    assert len(got) == len(expected)
    for table, wanted in zip(got, expected, strict=True):
        assert (table is None) == (wanted is None)
        for token_id, logprob in (table or {}).items():
            assert wanted is not None
            assert abs(logprob.logprob - wanted[token_id].logprob) < 1e-3


# -- requests ------------------------------------------------------------------------------------


def specs(
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 24,
    structured: bool = False,
    kinds: Sequence[dict[str, Any]] | None = None,
) -> list[RequestSpec]:
    """Requests of all kinds, in turn. Those without a seed are given one by whoever adds them."""
    kinds = list(kinds or KINDS)
    if structured:
        kinds.insert(0, {"structured_outputs": {"regex": "[a-f]{3,30}x"}, "seed": 7})
    found = []
    for number, prompt in enumerate(prompts):
        kind = dict(kinds[number % len(kinds)])
        bad_words = kind.pop("bad_words", ())
        outputs = kind.pop("structured_outputs", None)
        if outputs is not None:
            kind["structured_outputs"] = StructuredOutputsParams(**outputs)
        params = SamplingParams(**{"max_tokens": max_tokens, "ignore_eos": True, **kind})
        found.append(
            RequestSpec(
                request_id=str(number),
                prompt_token_ids=list(prompt),
                params=params,
                bad_words=bad_words,
                seed=1000 + number,
                tenant="abc"[number % 3],
                variant="v" if number % 7 == 6 else "",
            )
        )
    return found


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9},  # without a seed of its own
    {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.3, "logprobs": 2},
    {"temperature": 0.8, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0, "prompt_logprobs": 2, "logprobs": 0},
    {"temperature": 0.9, "n": 3},
    {"temperature": 0.7, "min_tokens": 9, "stop_token_ids": [*range(0, 96, 3)]},
    {"temperature": 0.9, "bad_words": ((3, 4), (5,), *((i, j) for i in range(9) for j in (1, 2)))},
    {"temperature": 0.7, "n": 2, "prompt_logprobs": 1, "logit_bias": {4: 2.0}},
]


def prompts() -> list[list[int]]:
    """Eighteen, of which some begin alike and some are longer than a step's budget."""
    found = zoo.random_prompts([30, 5, 44, 18, 9, 27, 33, 61, 12, 40, 7, 22, 90, 3])
    return [*found, *([*found[7][:48], 3 + i] for i in range(4))]


# -- channels that err ---------------------------------------------------------------------------


class Erring(Post):
    """Loses, doubles and holds back what it is given, as `decide` says of the n-th message.

    `decide(n)` gives how many turns late each copy comes: `(0,)` as it should be, `()` never.
    """

    def __init__(self, decide: Callable[[int], Sequence[int]]) -> None:
        super().__init__()
        self._decide = decide
        self._held: list[tuple[int, str, Command | Answer]] = []
        self.num_sent = 0

    def send(self, receiver: str, message: Command | Answer) -> None:
        for delay in self._decide(self.num_sent):
            if delay:
                self._held.append((delay, receiver, message))
            else:
                super().send(receiver, message)
        self.num_sent += 1

    def receive(self, receiver: str) -> list[Command | Answer]:
        due = [entry for entry in self._held if entry[1] == receiver and entry[0] <= 1]
        self._held = [
            (delay - (whose == receiver), whose, message)
            for delay, whose, message in self._held
            if whose != receiver or delay > 1
        ]
        return [*super().receive(receiver), *(message for *_, message in due)]


def at_random(draw: random.Random, rate: float) -> Erring:
    """A channel that errs with a part of its messages, in any way."""

    def decide(_: int) -> Sequence[int]:
        if draw.random() >= rate:
            return (0,)
        return draw.choice([(), (0, 0), (0, 3), (2,), (5,), (9,), (1, 6, 11)])

    return Erring(decide)


def abort(rig: Rig, request_id: str) -> None:
    """A client goes away."""
    rig.migrations.tell(Abort(request_id))
