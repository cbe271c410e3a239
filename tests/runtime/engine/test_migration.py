"""Sequences that move between engines while they run say what they would have said in one."""

import random
from typing import Any

import migrating
import msgspec
import pytest
import torch
import zoo
from transformers import PreTrainedModel
from vkv.allocator.transfer import Copier, Outgoing
from vkv.runtime.engine.migration.carriers import Carriage, CopyCarrier
from vkv.runtime.engine.migration.handshake import Stages
from vkv.runtime.request.continuation import Continuation

_PAGE_BYTES = 4096  # 16 tokens of the tiny llama


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return zoo.tiny_model("llama")


def _run(
    model: PreTrainedModel,
    specs: list[Any],
    *,
    seed: int = 0,
    rate: float = 0.25,
    num_instances: int = 3,
    **options: Any,
) -> tuple[migrating.Streams, Any]:
    draw = random.Random(seed)
    with migrating.rig(model, num_instances, **options) as rig:
        rig.add(specs)
        while rig.unfinished:
            rig.move_some(draw, rate)
            rig.turn()
        rig.finish()
        return rig.streams, rig.migrations.arbiter.counts


# -- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"max_batch_tokens": 24}),
        ("llama", {"policy": "prefill_first"}),
        ("llama", {"overlap": True}),
        ("llama", {"scheduling_policy": "fair"}),
        ("llama", {"kv": "paged", "attention": "paged_sdpa", "block_tokens": 16}),
        ("llama", {"sanitize": "zero", "layers_per_range": 2, "split_kv": True}),
        ("llama", {"max_parked": 0, "look_ahead_tokens": 0}),
        ("mistral", {}),
        ("qwen3_next", {}),
        ("lfm2", {"max_batch_tokens": 24}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "plain",
)
def test_moves_at_random_steps_change_nothing(name: str, options: dict[str, Any]) -> None:
    model = zoo.tiny_model(name)
    specs = migrating.specs(migrating.prompts())
    streams, counts = _run(model, specs, **options)
    assert counts.moved >= 40
    assert counts.lost == 0
    migrating.assert_equal(streams, migrating.undisturbed(model, specs, **options))


@pytest.mark.parametrize(
    "stages",
    [Stages(most=0), Stages(most=2, small_tokens=0, spare_tokens=4)],
    ids=["at once", "two"],
)
def test_in_one_copy_or_in_several(llama: PreTrainedModel, stages: Stages) -> None:
    specs = migrating.specs(migrating.prompts())
    streams, counts = _run(llama, specs, stages=stages)
    assert counts.moved >= 40
    migrating.assert_equal(streams, migrating.undisturbed(llama, specs))


def test_copies_beside_the_steps(llama: PreTrainedModel) -> None:
    carrier = CopyCarrier(Copier(torch.device("cpu")))
    specs = migrating.specs(migrating.prompts())
    streams, counts = _run(llama, specs, carrier=carrier)
    assert counts.moved >= 30
    migrating.assert_equal(streams, migrating.undisturbed(llama, specs))


def test_grammars_go_on_where_they_were() -> None:
    model = zoo.tiny_model("llama")
    specs = migrating.specs(migrating.prompts(), structured=True, max_tokens=30)
    options = {"tokenizer": zoo.letter_tokenizer()}
    streams, counts = _run(model, specs, **options)
    assert counts.moved >= 40
    migrating.assert_equal(streams, migrating.undisturbed(model, specs, **options))


@pytest.mark.parametrize("swap", [None, 8 << 20], ids=["computed again", "swapped"])
@pytest.mark.parametrize("seed", range(2))
def test_under_pressure(llama: PreTrainedModel, swap: int | None, seed: int) -> None:
    """Memory for a few of the requests, so that they push each other out while they move."""
    specs = migrating.specs(migrating.prompts(), max_tokens=40)
    streams, counts = _run(
        llama,
        specs,
        seed=seed,
        kv_memory=20 * _PAGE_BYTES,
        max_batch_tokens=32,
        swap_memory=swap,
    )
    assert counts.moved >= 20
    assert counts.stayed >= 5
    migrating.assert_equal(streams, migrating.undisturbed(llama, specs))


def test_between_pages_of_different_sizes(llama: PreTrainedModel) -> None:
    specs = migrating.specs(migrating.prompts())
    streams, counts = _run(llama, specs, each={1: {"page_bytes": 16384}, 2: {"max_seqs": 4}})
    assert counts.moved >= 30
    migrating.assert_equal(streams, migrating.undisturbed(llama, specs))


def test_what_moves_is_not_computed_again(llama: PreTrainedModel) -> None:
    """All that is computed anywhere is computed once."""
    (spec,) = migrating.specs(zoo.random_prompts([60]), max_tokens=40)
    with migrating.rig(llama) as rig:
        rig.add([spec])
        draw = random.Random(0)
        while rig.unfinished:
            rig.move_some(draw, 0.3)
            rig.turn()
        rig.finish()
        assert rig.migrations.arbiter.counts.moved >= 5
        computed = sum(loop.engine.num_computed_tokens for loop in rig.loops.values())
        assert computed == 60 + 40 - 1


class _Counting(CopyCarrier):
    """Notes how many tokens each copy is of."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens: list[int] = []

    def carry(self, outgoing: Outgoing, address: bytes, start: int, stop: int) -> Carriage:
        self.num_tokens.append(stop - start)
        return super().carry(outgoing, address, start, stop)


def test_the_pause_does_not_grow_with_the_context(llama: PreTrainedModel) -> None:
    """A client misses one turn, and the last copy is of a few tokens; not so in one copy."""
    for length in (30, 120, 400):
        (spec,) = migrating.specs(zoo.random_prompts([length]), max_tokens=40, kinds=[{}])
        for stages in (Stages(small_tokens=4), Stages(most=0)):
            carrier = _Counting()
            with migrating.rig(llama, carrier=carrier, stages=stages, max_len=480) as rig:
                rig.add([spec])
                stream, silent, longest = rig.streams["0", 0], 0, 0
                while not stream.token_ids:
                    rig.turn()
                rig.migrations.migrate(("0", 0), "b")
                while rig.unfinished:
                    num_before = len(stream.token_ids)
                    rig.turn()
                    silent = 0 if len(stream.token_ids) > num_before else silent + 1
                    longest = max(longest, silent)
                rig.finish()
                assert rig.migrations.arbiter.counts.moved == 1
            assert longest == 1
            first, last = carrier.num_tokens[0], carrier.num_tokens[-1]
            if stages.most:
                assert first >= length
                assert last <= 4
            else:
                assert carrier.num_tokens == [first]


def test_waiting_requests_take_what_is_kept_of_them(llama: PreTrainedModel) -> None:
    """One that gave its slot up is copied from where it is parked; a new one moves as it is."""
    specs = migrating.specs(zoo.random_prompts([60, 50]), max_tokens=20, kinds=[{"temperature": 0}])
    expected = migrating.undisturbed(llama, specs)
    with migrating.rig(llama) as rig:
        rig.add(specs[:1])
        for _ in range(5):
            rig.turn()
        engine = rig.loops["a"].engine
        (request,) = engine.requests
        engine.scheduler.preempt(request)
        rig.migrations.migrate(("0", 0), "b")
        rig.migrations.add(specs[1], "a")
        rig.streams["1", 0] = migrating.Stream()
        rig.migrations.migrate(("1", 0), "b")
        while rig.migrations.arbiter.num_moving:
            rig.turn(resting=["b"] if rig.num_turns < 6 else [])
        rig.finish()
    migrating.assert_equal(rig.streams, expected)


# -- what a continuation is ----------------------------------------------------------------------


def test_a_continuation_survives_another_process(llama: PreTrainedModel) -> None:
    specs = migrating.specs(migrating.prompts(), structured=True)
    with migrating.rig(llama, 1, tokenizer=zoo.letter_tokenizer()) as rig:
        rig.add(specs)
        for _ in range(6):
            rig.turn()
        requests = rig.loops["a"].engine.requests
        assert len(requests) > 10
        for request in requests:
            given = Continuation.of(request, epoch=3)
            arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(given), type=Continuation)
            assert arrived.token_ids == request.token_ids
            assert arrived.spec.params == request.params
            assert arrived.key == request.key
            assert arrived.spec.seed == request.sampling.seed
            again = msgspec.msgpack.decode(msgspec.msgpack.encode(arrived), type=Continuation)
            assert again == arrived


def test_sampling_is_brought_to_where_it_was(llama: PreTrainedModel) -> None:
    """Counts of penalties, bad words and the place in a grammar, all made again of the tokens."""
    kinds: list[dict[str, Any]] = [
        {"frequency_penalty": 0.5, "temperature": 0.8},
        {"bad_words": tuple((i, j) for i in range(96) for j in (1, 2)), "temperature": 0.8},
        {"structured_outputs": {"regex": "[a-f]{3,30}x"}, "temperature": 0.8},
    ]
    specs = migrating.specs(zoo.random_prompts([9, 12, 15]), kinds=kinds)
    tokenizer = zoo.letter_tokenizer()
    with migrating.rig(llama, 2, tokenizer=tokenizer) as rig:
        rig.migrations.add(specs[0], "a")
        rig.migrations.add(specs[1], "a")
        rig.migrations.add(specs[2], "a")
        for _ in range(8):
            rig.migrations.turn()
        here, there = rig.loops["a"].engine, rig.loops["b"].engine
        penalised, barred, structured = here.requests
        for request in here.requests:
            assert request.num_output_tokens >= 5
            twin = there.restore(Continuation.of(request)).sampling
            assert twin.key() == request.sampling.key()
            assert twin.num_output_tokens == request.sampling.num_output_tokens
            if request is penalised:
                for a, b in zip(
                    twin.history(96, torch.device("cpu")),
                    request.sampling.history(96, torch.device("cpu")),
                    strict=True,
                ):
                    assert torch.equal(a, b)
            if request is barred:
                assert twin.bars is not None
                assert request.sampling.bars is not None
                assert twin.bars.now() == request.sampling.bars.now() != []
            if request is structured:
                assert twin.grammar is not None
                assert request.sampling.grammar is not None
                masks = [
                    g.matcher.compute_bitmask() for g in (twin.grammar, request.sampling.grammar)
                ]
                assert masks[0] == masks[1]
