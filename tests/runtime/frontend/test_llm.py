"""The front door: what it gives, in batches, chats and streams."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import vkv
import zoo
from transformers import PreTrainedModel
from vkv import LLM, SamplingParams
from vkv.runtime.request.outputs import Logprob
from vkv.vmem.errors import InvalidPrompt, InvalidSamplingParams, RequestTooLong


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return zoo.tiny_model("llama", attention="sdpa")


def test_the_pinned_surface(llama_folder: Path, reference: PreTrainedModel) -> None:
    prompts = ["hello there", [1, 2, 3, 4]]
    with vkv.LLM(
        str(llama_folder), device="cpu", kv_memory="64MiB", max_seqs=8, max_len=256, dtype="float32"
    ) as llm:
        outs = llm.generate(prompts, zoo.greedy())
        stats = llm.stats()
        assert llm.trim() == stats.physical_bytes
        assert llm.stats().pages_held == llm.stats().physical_bytes == 0
        assert llm.attention_backend == "native"
        assert llm.device == torch.device("cpu")
        tokenizer = llm.tokenizer
    assert tokenizer is not None
    assert [out.prompt for out in outs] == ["hello there", None]
    for out in outs:
        completion = out.outputs[0]
        expected = zoo.generate_alone(reference, out.prompt_token_ids, 12)
        assert list(completion.token_ids) == expected
        assert completion.text == tokenizer.decode(expected)
        assert completion.finish_reason == "length"
        assert out.finished
        assert out.metrics is not None
        assert 0 < (out.metrics.first_token_latency or 0) <= (out.metrics.e2e_latency_s or 0)
    assert dataclasses.is_dataclass(stats)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.pages_held = 0  # type: ignore[misc]
    assert stats.tokens_held == sum(len(out.prompt_token_ids) + 11 for out in outs)
    assert 0 < stats.physical_bytes <= stats.virtual_bytes
    assert stats.pages_held == stats.pages_parked > 0
    assert stats.num_preemptions == stats.prefix_hit_tokens == 0
    assert 0 < stats.mapping_time_s < stats.step_time_s
    assert stats.driver_calls["map"] > 0


def test_an_empty_batch_is_empty(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_a_batch_longer_than_the_slots_keeps_its_order(llm: LLM) -> None:
    prompts = zoo.random_prompts([5 + i for i in range(20)])
    outs = llm.generate(prompts, [zoo.greedy(1 + i % 7) for i in range(20)])
    assert [list(out.prompt_token_ids) for out in outs] == prompts
    assert [len(out.outputs[0].token_ids) for out in outs] == [1 + i % 7 for i in range(20)]
    zoo.assert_idle(llm)


def test_without_a_limit_an_output_fills_its_slot(llm: LLM) -> None:
    (out,) = llm.generate(
        [1, 2, 3], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    )
    assert len(out.outputs[0].token_ids) == 256 - 3
    assert out.outputs[0].finish_reason == "length"


def test_without_a_limit_an_output_fills_what_the_pool_can_hold(llama_folder: Path) -> None:
    options = zoo.with_defaults({"kv_memory": 5 * 4096})
    with LLM(llama_folder, device="cpu", **options) as llm:
        everything = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        (out,) = llm.generate([1, 2, 3], everything)
        # 80 tokens fit, and the last one is never computed.
        assert len(out.outputs[0].token_ids) == 80 + 1 - 3


def test_the_end_token_ends_and_is_not_shown(llm: LLM) -> None:
    bias = {zoo.VOCAB_SIZE - 1: 100.0}
    (out,) = llm.generate("ab", SamplingParams(temperature=0, logit_bias=bias))
    assert out.outputs[0].token_ids == (zoo.VOCAB_SIZE - 1,)
    assert (out.outputs[0].text, out.outputs[0].finish_reason) == ("", "stop")
    assert out.outputs[0].stop_reason is None
    (out,) = llm.generate("ab", SamplingParams(temperature=0, logit_bias=bias, min_tokens=3))
    assert len(out.outputs[0].token_ids) == 4


def test_stop_strings_and_tokens(llm: LLM) -> None:
    (whole,) = llm.generate("stop here", zoo.greedy(20))
    text, tokens = whole.outputs[0].text, whole.outputs[0].token_ids
    assert len(set(text)) > 5
    wanted = text[7:9]
    (out,) = llm.generate("stop here", zoo.greedy(20, stop=wanted))
    completion = out.outputs[0]
    assert completion.text == text[: text.index(wanted)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", wanted)
    assert len(completion.token_ids) == text.index(wanted) + 2
    (out,) = llm.generate("stop here", zoo.greedy(20, stop=wanted, include_stop_str_in_output=True))
    assert out.outputs[0].text == text[: text.index(wanted) + 2]
    (out,) = llm.generate("stop here", zoo.greedy(20, stop_token_ids=[tokens[5]]))
    assert out.outputs[0].stop_reason == tokens[5]
    assert out.outputs[0].token_ids == tokens[: tokens.index(tokens[5]) + 1]
    zoo.assert_idle(llm)


def test_seeds_repeat_in_any_company(llm: LLM) -> None:
    params = SamplingParams(seed=11, n=2, max_tokens=15, ignore_eos=True)
    (alone,) = llm.generate("dice", params)
    others = [SamplingParams(seed=i, max_tokens=9) for i in range(9)]
    crowd = llm.generate(
        [*zoo.random_prompts([30, 4, 9]), "dice", *zoo.random_prompts([8] * 6, seed=1)],
        [*others[:3], params, *others[3:]],
    )
    assert [o.token_ids for o in crowd[3].outputs] == [o.token_ids for o in alone.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids
    assert [o.index for o in alone.outputs] == [0, 1]
    (other,) = llm.generate("dice", SamplingParams(seed=12, max_tokens=15, ignore_eos=True))
    assert other.outputs[0].token_ids != alone.outputs[0].token_ids


def _assert_table(
    table: dict[int, Logprob], scores: torch.Tensor, token: int, num_top: int
) -> None:
    """One position's reported log probabilities against all of them, [vocab]."""
    likeliest = scores.topk(num_top).indices.tolist()
    assert next(iter(table)) == token
    assert set(table) == {token, *likeliest}
    for token_id, entry in table.items():
        assert entry.logprob == pytest.approx(scores[token_id].item(), abs=1e-4)
        assert entry.rank == 1 + int((scores > scores[token_id]).sum())


@pytest.mark.parametrize("max_batch_tokens", [512, 7])
def test_log_probabilities_are_those_of_a_direct_forward(
    llama_folder: Path, reference: PreTrainedModel, max_batch_tokens: int
) -> None:
    (prompt,) = zoo.random_prompts([30])
    options = zoo.with_defaults({"max_batch_tokens": max_batch_tokens})
    with LLM(llama_folder, device="cpu", **options) as llm:
        params = SamplingParams(
            seed=3, max_tokens=10, ignore_eos=True, logprobs=3, prompt_logprobs=2, n=2
        )
        llm.generate(prompt, zoo.greedy(1))  # parks the prompt's rows, which must not be taken over
        (out,) = llm.generate(prompt, params)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == 30
    assert out.num_cached_tokens == 0
    scores = zoo.full_logits(reference, prompt).log_softmax(-1)
    for position, table in enumerate(out.prompt_logprobs[1:], start=1):
        assert table is not None
        _assert_table(table, scores[position - 1], prompt[position], 2)
    for completion in out.outputs:
        assert completion.logprobs is not None
        sequence = [*prompt, *completion.token_ids]
        scores = zoo.full_logits(reference, sequence).log_softmax(-1)[29:]
        for step, table in enumerate(completion.logprobs):
            _assert_table(table, scores[step], completion.token_ids[step], 3)
            assert table[completion.token_ids[step]].decoded_token is not None
        total = sum(
            t[i].logprob for t, i in zip(completion.logprobs, completion.token_ids, strict=True)
        )
        assert completion.cumulative_logprob == pytest.approx(total)


def test_a_progress_bar_shows_if_asked(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["one", "two"], zoo.greedy(), progress=True)
    assert "generating" in capsys.readouterr().err
    llm.generate(["one", "two"], zoo.greedy())
    assert capsys.readouterr().err == ""


def test_a_model_without_tokenizer(reference: PreTrainedModel) -> None:
    model = zoo.tiny_model("llama")
    with LLM(model, device="cpu", **zoo.with_defaults({})) as llm:
        (out,) = llm.generate([1, 2, 3], zoo.greedy(logprobs=1))
        assert list(out.outputs[0].token_ids) == zoo.generate_alone(reference, [1, 2, 3], 12)
        assert out.outputs[0].text == ""
        assert [delta.text for delta in llm.stream([1, 2, 3], zoo.greedy(3))] == [""] * 3
        with pytest.raises(InvalidPrompt, match=r"no tokenizer.*token ids.*tokenizer="):
            llm.generate("text")
        with pytest.raises(InvalidPrompt, match="chat template"):
            llm.chat([{"role": "user", "content": "hi"}])
        with pytest.raises(InvalidSamplingParams, match=r"stop.*needs a tokenizer.*stop_token_ids"):
            llm.generate([1, 2], SamplingParams(stop="x"))
    with LLM(model, tokenizer=zoo.letter_tokenizer(), device="cpu", **zoo.with_defaults({})) as llm:
        assert len(llm.generate("text", zoo.greedy(5))[0].outputs[0].text) == 5


# -- chat and stream ---------------------------------------------------------------------------


def test_chat_renders_the_template_and_reuses_the_turn_before(llm: LLM) -> None:
    messages = [{"role": "user", "content": "how are you"}]
    (first,) = llm.chat(messages, zoo.greedy(20))
    (same,) = llm.generate("u:how are you;a:", zoo.greedy(20))
    assert same.outputs[0].text == first.outputs[0].text
    messages += [
        {"role": "assistant", "content": first.outputs[0].text},
        {"role": "user", "content": "and now"},
    ]
    (second,) = llm.chat(messages, zoo.greedy(20))
    assert (second.num_cached_tokens or 0) >= len(first.prompt_token_ids) + 19
    assert llm.stats().prefix_hit_tokens >= second.num_cached_tokens  # type: ignore[operator]
    (alone,) = llm.chat(messages, zoo.greedy(20))
    with LLM(llm.loaded.model, tokenizer=llm.tokenizer, device="cpu", prefix_reuse=False,
             **zoo.with_defaults({})) as fresh:  # fmt: skip
        (computed,) = fresh.chat(messages, zoo.greedy(20))
    assert alone.outputs[0].token_ids == second.outputs[0].token_ids
    assert computed.outputs[0].token_ids == second.outputs[0].token_ids


def test_several_conversations_at_once(llm: LLM) -> None:
    one, other = ([{"role": "user", "content": text}] for text in ("a", "b"))
    both = llm.chat([one, other], zoo.greedy(6))
    assert [out.outputs[0].token_ids for out in both] == [
        llm.chat(conversation, zoo.greedy(6))[0].outputs[0].token_ids
        for conversation in (one, other)
    ]


def test_chat_without_parameters_goes_on_to_the_end(llm: LLM) -> None:
    (out,) = llm.chat([{"role": "user", "content": "long"}])
    assert out.outputs[0].finish_reason == "stop" or len(out.outputs[0].token_ids) > 200


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "content"),
        (["hello"], "role"),
        ([{"role": "system", "content": "x"}], "no system"),
    ],
)
def test_bad_conversations_are_refused(llm: LLM, messages: Any, words: str) -> None:
    with pytest.raises(InvalidPrompt, match=words):
        llm.chat(messages)


def test_a_stream_is_the_output_in_pieces(llm: LLM) -> None:
    (whole,) = llm.generate("stream", zoo.greedy(15))
    pieces = list(llm.stream("stream", zoo.greedy(15)))
    assert "".join(map(str, pieces)) == whole.outputs[0].text
    assert sum((piece.token_ids for piece in pieces), ()) == whole.outputs[0].token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * 14 + ["length"]
    chat = llm.stream([{"role": "user", "content": "x"}], zoo.greedy(4))
    assert sum(len(piece.token_ids) for piece in chat) == 4


def test_a_stream_left_early_gives_everything_back(llm: LLM) -> None:
    stream = llm.stream("stream", zoo.greedy(100))
    next(stream)
    assert llm.stats().num_running == 1
    stream.close()  # type: ignore[attr-defined]
    zoo.assert_idle(llm)
    assert llm.stats().pages_held == 0


def test_a_stream_never_begun_leaves_nothing(llm: LLM) -> None:
    stream = llm.stream("stream", zoo.greedy(100))
    del stream
    zoo.assert_idle(llm)
    with pytest.raises(RequestTooLong):
        llm.stream("x" * 300)  # at once, not when the loop begins
    with pytest.raises(InvalidSamplingParams, match="n = 2"):
        llm.stream("x", SamplingParams(n=2))
