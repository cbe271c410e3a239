"""Steps prepared while the one before computes: the same tokens, and nothing left behind.

On a CPU the device has always finished; what is tested is that the host does not need to know.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import zoo
from rerun import record_by_rerun
from vkv import LLM, SamplingParams
from vkv.runtime.execution.model_runner import ModelRunner
from vkv.vmem.errors import InvalidConfig, InvalidOperation, OutOfPages


def _open(*, overlap: bool, **options: Any) -> LLM:
    tokenizer = zoo.letter_tokenizer()
    model = zoo.tiny_model("llama")
    options = zoo.with_defaults({"max_seqs": 5, **options})
    return LLM(model, tokenizer=tokenizer, device="cpu", overlap=overlap, **options)


def _results(
    llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[list[tuple[Any, ...]]]:
    outs = llm.generate([list(prompt) for prompt in prompts], list(params))
    llm.engine.cache.check_invariants()
    assert llm.engine.is_caught_up
    zoo.assert_idle(llm)
    return [
        [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in out.outputs] for out in outs
    ]


def _compare(
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    recorded: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Run both ways, several times over, so that finished requests' slots are used again."""
    with _open(overlap=False, **options) as plain, _open(overlap=True, **options) as overlapped:
        if recorded:
            record_by_rerun(plain)
            record_by_rerun(overlapped)
        for _ in range(2):
            expected = _results(plain, prompts, params)
            assert _results(overlapped, prompts, params) == expected
        return plain.stats(), overlapped.stats()


_PROMPTS = zoo.random_prompts([5, 40, 1, 17, 16, 9, 30, 22, 3])


def test_greedy_tokens_by_number() -> None:
    params = [zoo.greedy(n) for n in (30, 9, 17, 1, 40, 12, 3, 25, 2)]
    plain, overlapped = _compare(_PROMPTS, params, max_batch_tokens=24)
    # The number of tokens is known beforehand, so nothing is computed for nobody.
    assert overlapped.num_computed_tokens == plain.num_computed_tokens
    assert overlapped.num_output_tokens == plain.num_output_tokens


def test_stop_tokens_and_strings_are_seen_late_and_what_came_after_is_dropped() -> None:
    sampled = {"temperature": 0.9, "max_tokens": 60}
    params = [
        SamplingParams(seed=i, stop_token_ids=list(range(0, 90, 9)), min_tokens=i, **sampled)
        if i % 2
        else SamplingParams(seed=i, stop=["a", "Q", "#"], **sampled)
        for i in range(len(_PROMPTS))
    ]
    plain, overlapped = _compare(_PROMPTS, params, prefix_reuse=False)
    assert overlapped.num_output_tokens == plain.num_output_tokens
    assert overlapped.num_computed_tokens > plain.num_computed_tokens


def test_preemption_with_tokens_pending() -> None:
    params = [
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=i, max_tokens=50, ignore_eos=True)
        for i in range(6)
    ]
    options = {"kv_memory": 18 * 4096, "look_ahead_tokens": 0}
    _, overlapped = _compare(zoo.random_prompts([20, 31, 12, 25, 8, 17]), params, **options)
    assert overlapped.num_preemptions
    stopping = [
        SamplingParams(temperature=1.2, seed=i, max_tokens=90, stop_token_ids=list(range(12)))
        for i in range(6)
    ]
    _compare(zoo.random_prompts([20, 31, 12, 25, 8, 17]), stopping, **options)


def test_penalties_scores_and_several_outputs_beside_plain_requests() -> None:
    params = [
        SamplingParams(temperature=0.7, seed=1, repetition_penalty=1.3, max_tokens=20),
        zoo.greedy(30),
        SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, max_tokens=8),
        SamplingParams(temperature=1, seed=4, n=3, max_tokens=15),
        SamplingParams(temperature=0, frequency_penalty=0.5, max_tokens=25, logit_bias={3: 2.0}),
        zoo.greedy(6),
    ]
    _compare(_PROMPTS[:6], params)
    _compare(_PROMPTS[:6], params[::-1], max_seqs=2, policy="prefill_first")


@pytest.mark.parametrize("options", [{}, {"kv_memory": 18 * 4096, "look_ahead_tokens": 0}], ids=str)
def test_bad_words_that_look_back_and_bars_that_do_not(options: dict[str, Any]) -> None:
    """Also under preemption: what a sequence said before it lost its slot counts."""
    allowed = {ord(letter) - 32 for letter in "abcd"}
    bars = [
        {"allowed_token_ids": allowed, "bad_words": ["ab", "bc", "ca", "dd", "aaa"]},
        {"allowed_token_ids": allowed},
        {"bad_words": ["a", "Q", "#"]},
        {"allowed_token_ids": allowed, "bad_words": ["d", "cb"]},
        {},
        {"bad_words": [" x", "7"], "repetition_penalty": 1.2},
    ]
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=50, ignore_eos=True, **bar)
        for i, bar in enumerate(bars)
    ]
    prompts = zoo.random_prompts([20, 31, 12, 25, 8, 17])
    plain, _ = _compare(prompts, params, **options)
    assert bool(plain.num_preemptions) == bool(options)
    with _open(overlap=True, **options) as llm:
        texts = [out.outputs[0].text for out in llm.generate(prompts, params)]
    for text, bar in zip(texts, bars, strict=True):
        assert text
        assert not any(word in text for word in bar.get("bad_words", ()))
        assert "allowed_token_ids" not in bar or set(text) <= set("abcd")


def test_recorded_steps_take_pending_tokens(flash_standin: str) -> None:
    params = [zoo.greedy(n) for n in (30, 9, 17, 1, 40, 12, 3, 25, 2)]
    _, overlapped = _compare(_PROMPTS, params, recorded=True, attention=flash_standin)
    assert overlapped.num_replays > 20


def test_tokens_come_one_step_late_and_reach_a_stream() -> None:
    with _open(overlap=True) as llm:
        (request,) = zoo.add(llm.engine, "0", [1, 2, 3], zoo.greedy(4))
        counts = []
        while llm.engine.has_work:
            llm.engine.step()
            advanced = llm.engine.take_outputs()
            counts.append((len(advanced), request.num_output_tokens, request.num_pending))
        assert counts == [(0, 0, 1), (1, 1, 1), (1, 2, 1), (1, 3, 1), (1, 4, 0)]
        llm.engine.step()
        assert llm.engine.take_outputs() == []
        expected = zoo.generate_alone(zoo.tiny_model("llama", attention="sdpa"), [1, 2, 3], 4)
        assert request.output_token_ids == expected
        deltas = list(llm.stream([1, 2, 3], zoo.greedy(4)))
        assert [token for delta in deltas for token in delta.token_ids] == expected


def test_an_aborted_request_leaves_nothing_pending() -> None:
    with _open(overlap=True) as llm:
        gone, stays = (
            zoo.add(llm.engine, str(i), [1 + i, 2, 3], zoo.greedy(12))[0] for i in range(2)
        )
        for _ in range(4):
            llm.engine.step()
        llm.engine.abort(gone.key[0])
        count = gone.num_output_tokens
        while llm.engine.has_work:
            llm.engine.step()
        assert gone.num_output_tokens == count
        expected = zoo.generate_alone(zoo.tiny_model("llama", attention="sdpa"), [2, 2, 3], 12)
        assert stays.output_token_ids == expected
        llm.engine.cache.check_invariants()
        zoo.assert_idle(llm)


def test_logits_that_are_not_finite_end_their_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, num_calls = ModelRunner.logits, 0

    def broken_once(self: ModelRunner, *args: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        found = logits(self, *args)
        if num_calls == 5:
            found[1] = torch.nan
        return found

    with _open(overlap=True, record_decodes=False) as llm:  # which runs the model every time
        requests = [
            zoo.add(llm.engine, str(i), prompt, SamplingParams(seed=i, max_tokens=12))[0]
            for i, prompt in enumerate(_PROMPTS[:3])
        ]
        monkeypatch.setattr(ModelRunner, "logits", broken_once)
        while llm.engine.has_work:
            llm.engine.step()
        llm.engine.cache.check_invariants()
        got = [request.output_token_ids for request in requests]
        failed = [out for out in llm.engine.take_outputs() if out.failure is not None]
    assert [(out.request_id, out.finish_reason) for out in failed] == [("1", "error")]
    assert isinstance(failed[0].failure.error(), InvalidOperation)
    monkeypatch.undo()
    with _open(overlap=False) as llm:
        params = [SamplingParams(seed=i, max_tokens=12) for i in range(3)]
        outs = llm.generate(_PROMPTS[:3], params)
    expected = [list(out.outputs[0].token_ids) for out in outs]
    assert [got[0], got[2]] == [expected[0], expected[2]]
    assert got[1] == expected[1][: len(got[1])]
    assert len(got[1]) < 12


def test_hybrids_wait_for_each_step() -> None:
    with pytest.raises(InvalidConfig, match="state"):
        LLM(zoo.tiny_model("lfm2"), device="cpu", overlap=True, **zoo.with_defaults({}))


def test_a_request_preempted_before_its_last_token_is_known_ends_all_the_same() -> None:
    reference = zoo.tiny_model("llama", attention="sdpa")
    prompts = zoo.random_prompts([14, 14])
    with _open(overlap=True, kv_memory=2 * 4096, look_ahead_tokens=0) as llm:
        long, short = (
            zoo.add(llm.engine, str(i), prompt, zoo.greedy(count))[0]
            for i, (prompt, count) in enumerate(zip(prompts, (10, 3), strict=True))
        )
        for _ in range(3):
            llm.engine.step()
        assert short.is_complete
        assert short.num_pending == 1
        llm.engine.step()  # `long` needs the second page
        assert llm.stats().num_preemptions == 1
        assert short.is_finished
        while llm.engine.has_work:
            llm.engine.step()
        for request, prompt in zip((long, short), prompts, strict=True):
            expected = zoo.generate_alone(reference, prompt, request.max_tokens)
            assert request.output_token_ids == expected
        llm.engine.cache.check_invariants()
        zoo.assert_idle(llm)


def test_a_shortage_is_told_once_nothing_is_pending_and_loses_nothing() -> None:
    (prompt,) = zoo.random_prompts([14])
    with _open(overlap=True, kv_memory=2 * 4096, look_ahead_tokens=0) as llm:
        (request,) = zoo.add(llm.engine, "0", prompt, zoo.greedy(8))
        pool = llm.engine.cache.pool
        llm.engine.step()
        elsewhere = pool.reserve(1)
        for _ in range(2):
            llm.engine.step()
        assert (request.num_output_tokens, request.num_pending) == (2, 1)
        llm.engine.step()  # no page for the next, but what was under way
        assert (request.num_output_tokens, request.num_pending) == (3, 0)
        llm.engine.step()
        assert request.num_output_tokens == 3
        assert llm.engine.scheduler.shortage is not None
        assert llm.engine.scheduler.shortage[0] is request
        assert isinstance(llm.engine.scheduler.shortage[1], OutOfPages)
        pool.cancel(elsewhere)
        while llm.engine.has_work:
            llm.engine.step()
        reference = zoo.tiny_model("llama", attention="sdpa")
        assert request.output_token_ids == zoo.generate_alone(reference, prompt, 8)
