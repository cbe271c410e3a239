"""Guesses by a small model, and by layers of the model itself: the tokens are the same."""

import random
from pathlib import Path
from typing import Any

import lora
import migrating
import pytest
import zoo
from guessing import PROMPTS, Restless, everything, guess_restlessly, results
from transformers import PreTrainedModel
from vkv import LLM, BlockZoo, MemoryLimit, SamplingParams
from vkv.runtime.speculation import DraftModel, Surrogate
from vkv.vmem.errors import InvalidConfig


def _model() -> PreTrainedModel:
    return zoo.tiny_model("llama", num_hidden_layers=3)


def _draft(seed: int = 0, num_layers: int = 3, **changes: Any) -> PreTrainedModel:
    """Of the same seed and layers, one that says what the model does."""
    return zoo.tiny_model("llama", seed=seed, num_hidden_layers=num_layers, **changes)


_GUESSERS: dict[str, Any] = {
    "the same": _draft,
    "another": lambda: _draft(5, 1),
    "surrogate": lambda: "surrogate",
}


def _open(speculative: Any = None, model: PreTrainedModel | None = None, **options: Any) -> LLM:
    options = zoo.with_defaults({"max_seqs": 4, **options})
    llm = LLM(
        model or _model(),
        tokenizer=zoo.letter_tokenizer(),
        device="cpu",
        speculative=speculative,
        **options,
    )
    if speculative is not None:
        guess_restlessly(llm)
    return llm


def _check_nothing_left(llm: LLM) -> None:
    """What a draft model has of requests that ended is gone."""
    speculation = llm.engine.scheduler.speculation
    assert speculation is not None
    assert not speculation._has_failed
    if isinstance(speculation.drafter, DraftModel):
        cache = speculation.drafter._cache
        cache.check_invariants()
        stats = cache.stats()
        assert stats.pages_held == stats.pages_parked == stats.pages_ahead == 0
        llm.trim()
        assert speculation.drafter.kv_bytes == 0


@pytest.mark.parametrize(
    ("guesser", "options"),
    [
        *((guesser, {}) for guesser in _GUESSERS),
        ("the same", {"max_seqs": 2, "max_batch_tokens": 9}),
        ("another", {"kv_memory": 40 * 4096, "look_ahead_tokens": 0}),
        ("surrogate", {"kv_memory": 40 * 4096, "max_seqs": 2, "max_batch_tokens": 9}),
        ("the same", {"kv": "paged"}),
        ("surrogate", {"kv": "paged"}),
        ("another", {"policy": "prefill_first", "prefix_reuse": False}),
        ("the same", {"repeatable": True}),
        ("surrogate", {"repeatable": True}),
    ],
    ids=str,
)
def test_all_kinds_of_requests_get_the_same(guesser: str, options: dict[str, Any]) -> None:
    params = everything()
    with _open(**options) as plain, _open(_GUESSERS[guesser](), **options) as guessing:
        expected = results(plain, params)
        for _ in range(2):
            assert results(guessing, params) == expected
        stats = guessing.stats()
        assert stats.speculation is not None
        assert stats.num_drafted == stats.speculation.num_drafted
        if "kv_memory" not in options:  # else there may be none for a draft model
            assert stats.num_drafted > 50
            assert stats.num_accepted > 0
        if guesser == "the same":  # whatever is drawn, it draws it too, by the same chance
            assert stats.num_accepted >= 0.95 * stats.num_drafted
        _check_nothing_left(guessing)


@pytest.mark.parametrize("guesser", _GUESSERS)
def test_requests_that_give_way_and_come_back(guesser: str) -> None:
    """Those first in line have what memory there is; a draft model never stands in their way."""
    options = {
        "kv_memory": 24 * 4096,
        "scheduling_policy": "priority",
        "look_ahead_tokens": 0,
        "max_seqs": 6,
    }
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=70, ignore_eos=True)
    prompts = [list(prompt) for prompt in PROMPTS]
    priorities = [5, 4, 3, 2, 1, 0]
    with _open(**options) as plain, _open(_GUESSERS[guesser](), **options) as guessing:
        outs = [llm.generate(prompts, params, priority=priorities) for llm in (plain, guessing)]
        assert guessing.stats().num_preemptions > 0
        expected, got = ([out.outputs[0] for out in some] for some in outs)
        assert [one.token_ids for one in got] == [one.token_ids for one in expected]
        assert {one.finish_reason for one in got} == {"length"}
        guessing.engine.cache.check_invariants()
        _check_nothing_left(guessing)


@pytest.mark.parametrize("guesser", _GUESSERS)
def test_requests_with_adapters(guesser: str, tmp_path: Path) -> None:
    folder = lora.save_adapter(tmp_path / "odd", _model(), seed=1)
    merged = _model()
    lora.merge(merged, folder)
    names = ["odd", None, "odd", None, "odd", None]
    prompts = [list(prompt) for prompt in PROMPTS]
    expected = [
        zoo.generate_alone(merged if name else _model(), prompt, 30)
        for name, prompt in zip(names, prompts, strict=True)
    ]
    with _open(_GUESSERS[guesser](), adapters={"odd": folder}) as llm:
        outs = llm.generate(prompts, zoo.greedy(30), adapter=names)
        assert [list(out.outputs[0].token_ids) for out in outs] == expected
        assert llm.stats().num_accepted > 0


@pytest.mark.parametrize("guesser", ["the same", "surrogate"])
def test_requests_that_move_between_engines(guesser: str) -> None:
    model, draw = _model(), random.Random(0)
    specs = migrating.specs(migrating.prompts())
    expected = migrating.undisturbed(model, specs)
    with migrating.rig(model, 2, speculative=_GUESSERS[guesser]()) as rig:
        drafters = []
        for loop in rig.loops.values():
            speculation = loop.engine.scheduler.speculation
            assert speculation is not None
            speculation.pace = Restless(6)
            drafters.append(speculation)
        rig.add(specs)
        while rig.unfinished:
            rig.move_some(draw, 0.1)
            rig.turn()
        rig.finish()
        assert rig.migrations.arbiter.counts.moved >= 10
        migrating.assert_equal(rig.streams, expected)
        assert all(one.num_accepted and not one._has_failed for one in drafters)


def test_text_ends_where_it_would() -> None:
    sampled = {"temperature": 0.9, "max_tokens": 60}
    params = [
        SamplingParams(seed=i, stop_token_ids=list(range(0, 90, 9)), min_tokens=2 * i, **sampled)
        if i % 2
        else SamplingParams(seed=i, stop=["a", "Q", "#"], **sampled)
        for i in range(len(PROMPTS))
    ]
    with _open() as plain, _open(_draft()) as drafted, _open("surrogate:0.7") as skipping:
        expected = results(plain, params)
        assert "stop" in {output[0][2] for output in expected}
        assert results(drafted, params) == results(skipping, params) == expected


def test_a_draft_takes_free_memory_alone_and_gives_it_back() -> None:
    limit = MemoryLimit(64 * 4096)
    long, params = PROMPTS[1], zoo.greedy(150)
    with _open(_draft(), kv_memory=limit) as llm:
        drafter = llm.engine.scheduler.speculation.drafter  # type: ignore[union-attr]
        stream = llm.stream([*long], zoo.greedy(100))
        most = 0
        for _ in stream:
            most = max(most, drafter.kv_bytes)
        assert 0 < most < limit.num_bytes
        stream = llm.stream([*long], zoo.greedy(60))
        next(stream), next(stream)
        assert drafter.kv_bytes > 0
        # A neighbour that needs all of it has it, and what was guessed is computed again.
        with _open(kv_memory=limit) as neighbour:
            out = neighbour.generate([list(prompt) for prompt in PROMPTS], params)
            assert all(one.outputs[0].finish_reason == "length" for one in out)
        assert len(list(stream)) > 0
        _check_nothing_left(llm)


def test_a_prompt_that_the_draft_has_not_seen_comes_in_chunks() -> None:
    prompt = zoo.random_prompts([200])[0]
    with _open() as plain, _open(_draft(), max_batch_tokens=32) as llm:
        expected = plain.generate([prompt], zoo.greedy(40))[0].outputs[0].token_ids
        drafter, seen = llm.engine.scheduler.speculation.drafter, []  # type: ignore[union-attr]
        draft = drafter.draft

        def watched(wanted: Any) -> Any:
            said = draft(wanted)
            seen.append((drafter.num_caught_up, sum(map(len, said.values()))))
            return said

        drafter.draft = watched
        assert llm.generate([prompt], zoo.greedy(40))[0].outputs[0].token_ids == expected
        assert [caught for caught, _ in seen[:6]] == [32] * 6
        assert [said for _, said in seen[:6]] == [0] * 6
        assert all(caught <= 8 for caught, _ in seen[8:])
        assert sum(said for _, said in seen[6:]) > 10


def test_a_model_that_changes_guesses_by_its_layers_as_they_are() -> None:
    other = zoo.tiny_model("llama", num_hidden_layers=3, seed=9)
    with _open(model=other) as plain:
        expected = results(plain, everything())
    model = _model()
    with _open("surrogate:0.7", model=model) as llm:
        results(llm, everything())
        model.load_state_dict(zoo.tiny_model("llama", num_hidden_layers=3, seed=9).state_dict())
        before = llm.stats().num_accepted
        assert results(llm, everything()) == expected
        assert llm.stats().num_accepted > before
        llm.sleep()
        llm.wake()
        assert results(llm, everything()) == expected


def test_a_draft_model_that_changes_is_read_anew() -> None:
    draft = _draft(5)
    with _open() as plain, _open(draft) as llm:
        expected = results(plain, everything())
        assert results(llm, everything()) == expected
        draft.load_state_dict(_draft().state_dict())
        before = llm.stats()
        assert results(llm, everything()) == expected
        num_drafted = llm.stats().num_drafted - before.num_drafted
        assert llm.stats().num_accepted - before.num_accepted > 0.9 * num_drafted


def test_a_draft_that_breaks_is_not_asked_again() -> None:
    with _open() as plain, _open(_draft()) as llm:
        expected = results(plain, everything())
        speculation = llm.engine.scheduler.speculation
        assert isinstance(speculation.drafter, DraftModel)  # type: ignore[union-attr]
        runner = speculation.drafter._runner  # type: ignore[union-attr]
        runner.launch = lambda batch: 1 / 0
        assert results(llm, everything()) == expected
        assert speculation._has_failed  # type: ignore[union-attr]
        assert llm.stats().num_drafted == 0
        assert speculation.drafter._cache.stats().pages_held == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("where", ["a folder", "a zoo", "a folder of a zoo"])
def test_a_folder_is_a_draft_model(where: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    zoo.save_checkpoint(folder)
    if where != "a folder":
        blocks = BlockZoo.create(tmp_path / "zoo")
        chain = blocks.add(folder, "small").chain
        folder = blocks.path if where == "a zoo" else chain.folder
    with _open(str(folder)) as llm, _open() as plain:
        assert isinstance(llm.engine.scheduler.speculation.drafter, DraftModel)  # type: ignore[union-attr]
        assert results(llm, everything()) == results(plain, everything())


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "qwen3_moe", "deepseek_v3", "opt"])
def test_other_architectures_guess_by_their_layers(name: str) -> None:
    changes = {"num_hidden_layers": 4} if name != "gemma2" else {}
    model = zoo.tiny_model(name, **changes)
    prompts = [list(prompt) for prompt in PROMPTS]
    expected = [zoo.generate_alone(zoo.tiny_model(name, **changes), p, 25) for p in prompts]
    with _open("surrogate", model=model) as llm:
        outs = llm.generate(prompts, zoo.greedy(25))
        assert [list(out.outputs[0].token_ids) for out in outs] == expected
        assert isinstance(llm.engine.scheduler.speculation.drafter, Surrogate)  # type: ignore[union-attr]
        assert llm.stats().num_drafted > 0


@pytest.mark.parametrize(
    ("speculative", "model", "words"),
    [
        ("surrogate:2", "llama", "'surrogate:2'; after 'surrogate:' write"),
        ("surrogate:half", "llama", "after 'surrogate:' write"),
        ("surrogate", "qwen3_next", "'surrogate', but layers with recurrent"),
        (_draft, "qwen3_next", "a model', but layers with recurrent"),
        (lambda: _draft(vocab_size=80), "llama", "has 80 tokens, and .* has 96"),
        (lambda: zoo.tiny_model("lfm2"), "llama", "some of whose layers have recurrent"),
        (7, "llama", "speculative is 7; use 'ngram'"),
    ],
    ids=lambda value: "a model" if callable(value) else str(value),
)
def test_what_cannot_be_is_refused(speculative: Any, model: str, words: str) -> None:
    given = speculative() if callable(speculative) else speculative
    with pytest.raises(InvalidConfig, match=words):
        _open(given, model=zoo.tiny_model(model))


def test_a_model_does_not_guess_for_itself_as_a_draft() -> None:
    model = _model()
    with pytest.raises(InvalidConfig, match="the very model that is to verify; use 'surrogate'"):
        _open(model, model=model)
