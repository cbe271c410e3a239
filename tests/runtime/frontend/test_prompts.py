"""What a prompt and its parameters may be given as, through `LLM` and `AsyncLLM`."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from transformers import PreTrainedTokenizerFast
from vkv import LLM, AsyncLLM, RequestOutput, SamplingParams
from vkv.runtime.frontend.tokenizer import own_copy
from vkv.vmem.errors import InvalidConfig, InvalidPrompt, InvalidSamplingParams, UsageError

_HELLO = [ord(letter) - 32 for letter in "hello"]


def _tokens(out: RequestOutput) -> list[int]:
    return list(out.outputs[0].token_ids)


async def _last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    last = None
    async for output in outputs:
        last = output
    assert last is not None
    return last


def _alike(folder: Path, prompt: Any, params: SamplingParams) -> RequestOutput:
    """The output of a prompt, which `AsyncLLM` and a stream must give too."""
    options = zoo.with_defaults({"max_seqs": 4})

    async def ask() -> RequestOutput:
        async with AsyncLLM(folder, device="cpu", dtype="float32", **options) as llm:
            return await _last(llm.generate(prompt, params))

    with LLM(folder, device="cpu", dtype="float32", **options) as llm:
        (out,) = llm.generate(prompt, params)
        deltas = list(llm.stream(prompt, params))
    other = asyncio.run(ask())
    assert other.outputs == out.outputs
    assert (other.prompt, other.prompt_token_ids) == (out.prompt, out.prompt_token_ids)
    assert other.prompt_logprobs == out.prompt_logprobs
    assert "".join(map(str, deltas)) == out.outputs[0].text
    return out


# --- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": "hello"},
        {"prompt_token_ids": _HELLO},
        {"prompt_token_ids": np.array(_HELLO), "prompt": "hello", "multi_modal_data": None},
        np.array(_HELLO),
        torch.tensor(_HELLO),
        [np.int64(token) for token in _HELLO],
        list(torch.tensor(_HELLO)),
        tuple(_HELLO),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_a_prompt_may_come_in_many_forms(llm: LLM, prompt: Any) -> None:
    (plain,) = llm.generate("hello", zoo.greedy(6))
    (out,) = llm.generate(prompt, zoo.greedy(6))
    assert out.prompt_token_ids == plain.prompt_token_ids == tuple(_HELLO)
    assert {type(token) for token in out.prompt_token_ids} == {int}
    assert _tokens(out) == _tokens(plain)
    assert out.prompt == (prompt.get("prompt") if isinstance(prompt, dict) else None)
    both = llm.generate([prompt, "hello"], zoo.greedy(6))
    assert [_tokens(one) for one in both] == [_tokens(plain)] * 2


def test_an_array_of_two_dimensions_is_a_batch(llm: LLM) -> None:
    outs = llm.generate(np.array([_HELLO, _HELLO[::-1]]), zoo.greedy(3))
    assert [list(out.prompt_token_ids) for out in outs] == [_HELLO, _HELLO[::-1]]


def test_prefixes_are_shared_within_one_salt_alone(llm: LLM) -> None:
    text = "the same beginning, long enough for a page"

    def cached(**salt: str) -> int:
        (out,) = llm.generate({"prompt": text, **salt}, zoo.greedy(2))
        return out.num_cached_tokens or 0

    assert cached() == 0
    assert cached() > 0
    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="a") > 0


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (b"hello", r"bytes, and prompts are text.*decode"),
        ([b"hello"], "bytes, and prompts are text"),
        (bytearray(b"hello"), "bytearray"),
        ("caf\udce9", r"'caf\\udce9', character 3.*no UTF-8.*errors='replace'"),
        ({"prompt": "\ud800"}, r"'\\ud800', character 0"),
        ({"prompt": 5}, "a prompt's 'prompt' is 5; give a text"),
        ({"prompt": "x", "cache_salt": "\udce9"}, "'cache_salt' is no text"),
        ({"prompt_token_ids": [1], "prompt": "\udce9"}, "'prompt' is no text"),
        ({"prompt": "x", "cache_salt": 5}, "'cache_salt' is 5"),
        ({"prompt": "x", "multi_modal_data": {}}, "'multi_modal_data' is not understood"),
        ({"prompt_token_ids": "hello"}, "neither a text nor a list of token ids"),
        ({"promt": "x"}, "'promt' is not understood.*prompt, prompt_token_ids"),
        ({}, "is no prompt; use"),
        ({"role": "user", "content": "x"}, r"is a conversation.*use chat\(\)"),
        ([{"role": "user", "content": "x"}], r"is a conversation.*use chat\(\)"),
        ([[{"role": "user", "content": "x"}]], r"is a conversation.*use chat\(\)"),
        (np.array([1.5, 2.5]), "plain integers"),
        (["fine", None], "neither"),
        (iter(["x"]), "prompts is a list_iterator"),
    ],
)
def test_what_is_no_prompt_is_refused_with_a_remedy(llm: LLM, prompt: Any, words: str) -> None:
    with pytest.raises(InvalidPrompt, match=words):
        llm.generate(prompt)
    zoo.assert_idle(llm)


@pytest.mark.parametrize("prompt", [b"hello", "caf\udce9", {"role": "user", "content": "x"}, {}])
def test_a_stream_and_async_refuse_the_same(llama_folder: Path, llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidPrompt):
        llm.stream(prompt)

    async def ask() -> None:
        async with AsyncLLM(llama_folder, device="cpu", **zoo.with_defaults({})) as other:
            with pytest.raises(InvalidPrompt):
                other.generate(prompt)

    asyncio.run(ask())


@pytest.mark.parametrize("params", [{"temperature": 0}, 5, "greedy", [{"temperature": 0}]])
def test_what_are_no_parameters_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidSamplingParams, match=r"use SamplingParams\("):
        llm.generate(["hello"], params)
    with pytest.raises(InvalidSamplingParams, match=r"use SamplingParams\("):
        llm.chat([{"role": "user", "content": "x"}], params)


@pytest.mark.parametrize(
    ("most", "kept"), [(3, "llo"), (5, "hello"), (50, "hello"), (-1, "hello"), (1, "o")]
)
def test_a_prompt_is_cut_to_its_last_tokens(llm: LLM, most: int, kept: str) -> None:
    params = zoo.greedy(4, truncate_prompt_tokens=most)
    for prompt in ("hello", _HELLO):
        (out,) = llm.generate(prompt, params)
        assert list(out.prompt_token_ids) == [ord(letter) - 32 for letter in kept]
        assert _tokens(out) == _tokens(llm.generate(kept, zoo.greedy(4))[0])


def test_a_prompt_is_cut_to_what_the_slot_holds_beside_the_output(llm: LLM) -> None:
    long = "abcdefgh" * 100
    (out,) = llm.generate(long, zoo.greedy(16, truncate_prompt_tokens=-1))
    assert list(out.prompt_token_ids) == [ord(letter) - 32 for letter in long[-(256 - 16) :]]
    assert len(out.outputs[0].token_ids) == 16
    with pytest.raises(UsageError, match="max_len"):
        llm.generate(long, zoo.greedy(16))


def test_the_first_token_stays_if_the_tokenizer_put_it_there() -> None:
    tokenizer = zoo.letter_tokenizer()
    tokenizer.bos_token = "^"
    options = zoo.with_defaults({})
    with LLM(zoo.tiny_model("llama"), tokenizer=tokenizer, device="cpu", **options) as llm:
        (out,) = llm.generate("^hello", zoo.greedy(1, truncate_prompt_tokens=3))
        assert [chr(32 + token) for token in out.prompt_token_ids] == ["^", "l", "o"]


# --- parameters that meet text -----------------------------------------------------------------


def test_bad_words_do_not_come(llama_folder: Path) -> None:
    free = _alike(llama_folder, "stop here", zoo.greedy(20)).outputs[0].text
    pair = free[3:5]
    single = next(letter for letter in free if letter not in free[:5])
    out = _alike(llama_folder, "stop here", zoo.greedy(40, bad_words=[pair, single]))
    text = out.outputs[0].text
    assert text[:4] == free[:4]
    assert len(text) == 40
    assert pair not in text
    assert single not in text


def test_bad_words_are_spelt_at_the_beginning_and_behind_a_space(llm: LLM) -> None:
    spec = llm._front_end.request("x", SamplingParams(bad_words=["ab", " c"])).spec
    a, b, c = (ord(letter) - 32 for letter in "abc")
    assert set(spec.bad_words) == {(a, b), (0, a, b), (c,), (0, c)}


def test_only_allowed_tokens_come(llama_folder: Path) -> None:
    allowed = {ord(letter) - 32 for letter in "abc"}
    out = _alike(llama_folder, "stop here", zoo.greedy(12, allowed_token_ids=allowed))
    assert set(out.outputs[0].text) <= set("abc")
    assert len(out.outputs[0].text) == 12


def test_everything_barred_fails_that_request_alone(llm: LLM) -> None:
    eos = zoo.VOCAB_SIZE - 1
    impossible = SamplingParams(allowed_token_ids=[eos], min_tokens=2)
    outs = llm.generate(["hello", "hello"], [impossible, zoo.greedy(3)])
    assert [out.outputs[0].finish_reason for out in outs] == ["error", "length"]
    assert "allowed_token_ids" in str(outs[0].error)


def test_without_detokenizing_there_are_tokens_and_no_text(llama_folder: Path) -> None:
    params = zoo.greedy(5, detokenize=False, logprobs=1, prompt_logprobs=0)
    out = _alike(llama_folder, "hello", params)
    with LLM(llama_folder, device="cpu", dtype="float32", **zoo.with_defaults({})) as llm:
        (plain,) = llm.generate("hello", zoo.greedy(5))
    assert out.outputs[0].text == ""
    assert _tokens(out) == _tokens(plain)
    assert out.prompt == "hello"
    tables = [*(out.outputs[0].logprobs or ()), *(out.prompt_logprobs or ())[1:]]
    assert {entry.decoded_token for table in tables for entry in (table or {}).values()} == {None}


@pytest.mark.parametrize("skips_special", [True, False])
def test_a_stop_tokens_text_is_shown_if_asked(llama_folder: Path, skips_special: bool) -> None:
    plain = _alike(llama_folder, "stop here", zoo.greedy(20)).outputs[0]
    stop = plain.token_ids[5]
    place = plain.token_ids.index(stop)
    params = zoo.greedy(
        20,
        stop_token_ids=[stop],
        include_stop_str_in_output=True,
        skip_special_tokens=skips_special,
    )
    shown = _alike(llama_folder, "stop here", params).outputs[0]
    assert shown.text == plain.text[: place + 1]
    assert (shown.finish_reason, shown.stop_reason) == ("stop", stop)
    assert shown.token_ids == plain.token_ids[: place + 1]
    eos = zoo.VOCAB_SIZE - 1
    ended = SamplingParams(
        temperature=0,
        logit_bias={eos: 100.0},
        include_stop_str_in_output=True,
        skip_special_tokens=skips_special,
    )
    (completion,) = _alike(llama_folder, "ab", ended).outputs
    assert completion.text == ("" if skips_special else "<eos>")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_log_probabilities_name_their_tokens(llama_folder: Path) -> None:
    params = zoo.greedy(4, logprobs=2, prompt_logprobs=1)
    out = _alike(llama_folder, "hello", params)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    prompt = zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
    output = zip(out.outputs[0].token_ids, out.outputs[0].logprobs or (), strict=True)
    for token, table in (*prompt, *output):
        assert table is not None
        assert len(table) >= 2 or next(iter(table.values())).rank == 1
        for other, entry in table.items():
            letter = "<eos>" if other == zoo.VOCAB_SIZE - 1 else chr(32 + other)
            assert entry.decoded_token == letter
        assert next(iter(table)) == token


# --- the tokenizer -----------------------------------------------------------------------------


def test_what_is_done_to_the_callers_tokenizer_changes_no_prompt(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is llm.tokenizer
    assert tokenizer is not None
    (before,) = llm.generate("hello", zoo.greedy(1))
    tokenizer.add_tokens(["hello"])
    tokenizer.chat_template = "{{ 'x' }}"
    assert len(tokenizer("hello").input_ids) == 1
    (after,) = llm.generate("hello", zoo.greedy(1))
    assert after.prompt_token_ids == before.prompt_token_ids
    assert len(llm.render_chat([{"role": "user", "content": "hi"}])) == len("u:hi;a:")


def test_a_thread_that_truncates_cuts_no_prompt(llm: LLM) -> None:
    done = threading.Event()

    def truncate() -> None:
        while not done.is_set():
            assert llm.tokenizer is not None
            llm.tokenizer("some words", truncation=True, max_length=4)

    thread = threading.Thread(target=truncate)
    thread.start()
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            spec = llm._front_end.request("hello" * 8).spec
            assert spec.prompt_token_ids == _HELLO * 8
    finally:
        done.set()
        thread.join()


def _handed_in(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Sequence[int]:
    options = zoo.with_defaults({})
    with LLM(zoo.tiny_model("llama"), tokenizer=tokenizer, device="cpu", **options) as llm:
        tokenizer.add_tokens(["hello"])
        return llm.generate("hello", zoo.greedy(1))[0].prompt_token_ids


def test_a_tokenizer_handed_in_is_copied_and_neither_cuts_nor_pads(llama_folder: Path) -> None:
    tokenizer = zoo.letter_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    assert list(_handed_in(llama_folder, tokenizer)) == _HELLO
    assert tokenizer.backend_tokenizer.truncation is not None, "the caller's own is left alone"


def test_a_copy_neither_cuts_nor_pads_before_its_first_use() -> None:
    """Several threads may be the first, and a tokenizer refuses to change while it works."""
    tokenizer = zoo.letter_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    mine = own_copy(tokenizer)
    assert mine.backend_tokenizer.truncation is mine.backend_tokenizer.padding is None
    assert tokenizer.backend_tokenizer.truncation is not None


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (5, "tokenizer is a int; give a tokenizer of transformers, or its folder"),
        (zoo.letter_tokenizer().backend_tokenizer, "is a Tokenizer; wrap it"),
        (SimpleNamespace(tokenizer=zoo.letter_tokenizer()), r"\.tokenizer: pass that"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tokenizer: Any, words: str) -> None:
    for kind in (LLM, AsyncLLM):
        with pytest.raises(InvalidConfig, match=words):
            kind(zoo.tiny_model("llama"), tokenizer=tokenizer, device="cpu")


def test_a_tokenizer_that_cannot_be_copied_is_shared_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = zoo.letter_tokenizer()
    tokenizer.lock = threading.Lock()  # type: ignore[attr-defined]
    assert own_copy(tokenizer) is tokenizer
    assert "cannot be copied" in caplog.text


# --- metrics -----------------------------------------------------------------------------------


def test_metrics_say_when_a_request_came_ran_and_ended(llama_folder: Path) -> None:
    options = zoo.with_defaults({"max_seqs": 1})
    with LLM(llama_folder, device="cpu", **options) as llm:
        before, wall = time.monotonic(), time.time()
        outs = llm.generate(["hello", "there"], zoo.greedy(5))
        after = time.monotonic()
    for out in outs:
        metrics = out.metrics
        assert metrics is not None
        stamps = [
            before,
            metrics.arrival_ts,
            metrics.queued_ts,
            metrics.scheduled_ts,
            metrics.first_token_ts,
            metrics.last_token_ts,
            metrics.finished_ts,
            after,
        ]
        assert None not in stamps
        assert stamps == sorted(stamps)  # type: ignore[type-var]
        assert metrics.num_generation_tokens == 5
        assert metrics.arrival_time == pytest.approx(wall, abs=0.5)
        assert metrics.first_token_time == pytest.approx(
            metrics.arrival_time + (metrics.first_token_latency or 0)
        )
    first, second = (out.metrics for out in outs)
    assert first is not None
    assert second is not None
    # One slot: the second waits for the first one's end.
    assert (second.time_in_queue or 0) > (first.time_in_queue or 0)
    assert (second.scheduled_ts or 0) >= (first.finished_ts or 0)


def test_metrics_of_what_never_ran_have_no_times(llm: LLM) -> None:
    stream = llm.stream("hello", zoo.greedy(5))
    del stream
    request = llm._front_end.request("hello", zoo.greedy(5))
    request.abort()
    metrics = request.output().metrics
    assert metrics is not None
    assert (metrics.scheduled_ts, metrics.first_token_latency, metrics.finished_ts) == (None,) * 3
    assert metrics.num_generation_tokens == 0
