"""Tokens that were guessed and verified: the same as without guesses, whoever asks how."""

from typing import Any

import pytest
import zoo
from guessing import PROMPTS, KnowingDrafter, everything, guess, results
from vkv import LLM, SamplingParams
from vkv.vmem.errors import InvalidConfig


def _open(**options: Any) -> LLM:
    options = zoo.with_defaults({"max_seqs": 4, **options})
    return LLM(zoo.tiny_model("llama"), tokenizer=zoo.letter_tokenizer(), device="cpu", **options)


def _answers(results: list[list[tuple[Any, ...]]]) -> dict[tuple[tuple[int, ...], int], Any]:
    return {
        (tuple(prompt), index): output[0]
        for prompt, outputs in zip(PROMPTS, results, strict=True)
        for index, output in enumerate(outputs)
    }


@pytest.mark.parametrize("error_rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_seqs": 2, "max_batch_tokens": 9},
        {"kv_memory": 18 * 4096, "look_ahead_tokens": 0},
        {"kv": "paged"},
        {"policy": "prefill_first", "prefix_reuse": False},
    ],
    ids=str,
)
def test_all_kinds_of_requests_get_the_same(error_rate: float, options: dict[str, Any]) -> None:
    params = everything()
    with _open(**options) as plain, _open(**options) as guessing:
        expected = results(plain, params)
        drafter = KnowingDrafter(_answers(expected), error_rate=error_rate, vocab_size=95)
        guess(guessing, drafter)
        for _ in range(2):
            assert results(guessing, params) == expected
        stats = guessing.stats()
        assert stats.num_drafted > 50
        if error_rate == 1:
            assert stats.num_accepted < stats.num_drafted / 10
        elif not error_rate:
            assert stats.num_accepted > 0.8 * stats.num_drafted  # ends are guessed beyond
            assert stats.num_steps < plain.stats().num_steps * 2


def test_stop_tokens_within_a_guess_end_the_output() -> None:
    sampled = {"temperature": 0.9, "max_tokens": 60}
    params = [
        SamplingParams(seed=i, stop_token_ids=list(range(0, 90, 9)), min_tokens=2 * i, **sampled)
        if i % 2
        else SamplingParams(seed=i, stop=["a", "Q", "#"], **sampled)
        for i in range(len(PROMPTS))
    ]
    with _open() as plain, _open() as guessing:
        expected = results(plain, params)
        guess(guessing, KnowingDrafter(_answers(expected), error_rate=0, vocab_size=95))
        assert results(guessing, params) == expected
        assert {output[0][2] for output in expected} == {"stop"}
        assert guessing.stats().num_accepted > 10


def test_prompt_lookup_in_a_text_that_repeats_itself() -> None:
    prompt = (list(range(20, 50)) * 4)[:100]
    with _open() as plain, _open(speculative="ngram") as guessing:
        expected = plain.generate([prompt], zoo.greedy(60))[0].outputs[0].token_ids
        assert guessing.generate([prompt], zoo.greedy(60))[0].outputs[0].token_ids == expected
        stats = guessing.stats()
        assert stats.num_drafted > 0
        assert stats.num_steps <= plain.stats().num_steps - stats.num_accepted


def test_a_seed_draws_the_same_whatever_is_guessed() -> None:
    params = [
        SamplingParams(temperature=1.0, top_k=6, max_tokens=12, seed=seed, ignore_eos=True)
        for seed in range(len(PROMPTS))
    ]
    with _open() as llm:
        expected = results(llm, params)
        for error_rate in (0.1, 0.5, 0.9):
            drafter = KnowingDrafter(_answers(expected), error_rate=error_rate, vocab_size=95)
            guess(llm, drafter)
            assert results(llm, params) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speculative": "magic"}, "speculative is 'magic', which is no folder; use 'ngram'"),
        ({"speculative": "ngram", "speculative_tokens": 0}, "speculative_tokens is 0"),
        ({"speculative": "ngram", "overlap": True}, "overlap is True, but a step that verifies"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        _open(**options)
