"""The front door: what it gives, what it refuses and how, and what it leaves behind."""

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vkv
import zoo
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from vkv import LLM, SamplingParams
from vkv.runtime.outputs import Logprob
from vkv.vmem.errors import (
    BadCheckpoint,
    DriverUnavailable,
    InvalidConfig,
    InvalidOperation,
    InvalidPrompt,
    InvalidSamplingParams,
    RequestTooLarge,
    RequestTooLong,
    UnsupportedModel,
    VkvError,
)

_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
_LETTERS = [chr(32 + i) for i in range(zoo.VOCAB_SIZE - 1)]  # the printable part of ASCII


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable character, and the last of the vocabulary as end of text."""
    vocab = {letter: i for i, letter in enumerate(_LETTERS)} | {"<eos>": zoo.VOCAB_SIZE - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template=_TEMPLATE
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as users have it: config, weights and tokenizer in a folder."""
    path = tmp_path_factory.mktemp("llama")
    zoo.tiny_model("llama", eos_token_id=zoo.VOCAB_SIZE - 1).save_pretrained(path)
    letter_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return zoo.tiny_model("llama", attention="sdpa")


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", dtype="float32", **zoo.with_defaults({"max_seqs": 8})) as llm:
        yield llm
        llm._engine.cache.check_invariants()


def _greedy(max_tokens: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def _assert_idle(llm: LLM) -> None:
    stats = llm.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.pages_held == stats.pages_parked


# -- generating --------------------------------------------------------------------------------


def test_the_pinned_surface(folder: Path, reference: PreTrainedModel) -> None:
    prompts = ["hello there", [1, 2, 3, 4]]
    with vkv.LLM(
        str(folder), device="cpu", kv_memory="64MiB", max_seqs=8, max_len=256, dtype="float32"
    ) as llm:
        outs = llm.generate(prompts, _greedy())
        stats = llm.stats()
        assert llm.trim() == stats.physical_bytes
        assert llm.stats().pages_held == llm.stats().physical_bytes == 0
        assert llm.attention_backend == "sdpa"
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
        assert 0 < (out.metrics.ttft_s or 0) <= (out.metrics.e2e_latency_s or 0)
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
    outs = llm.generate(prompts, [_greedy(1 + i % 7) for i in range(20)])
    assert [list(out.prompt_token_ids) for out in outs] == prompts
    assert [len(out.outputs[0].token_ids) for out in outs] == [1 + i % 7 for i in range(20)]
    _assert_idle(llm)


def test_without_a_limit_an_output_fills_its_slot(llm: LLM) -> None:
    (out,) = llm.generate(
        [1, 2, 3], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    )
    assert len(out.outputs[0].token_ids) == 256 - 3
    assert out.outputs[0].finish_reason == "length"


def test_without_a_limit_an_output_fills_what_the_pool_can_hold(folder: Path) -> None:
    options = zoo.with_defaults({"kv_memory": 5 * 4096})
    with LLM(folder, device="cpu", **options) as llm:
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
    (whole,) = llm.generate("stop here", _greedy(20))
    text, tokens = whole.outputs[0].text, whole.outputs[0].token_ids
    assert len(set(text)) > 5
    wanted = text[7:9]
    (out,) = llm.generate("stop here", _greedy(20, stop=wanted))
    completion = out.outputs[0]
    assert completion.text == text[: text.index(wanted)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", wanted)
    assert len(completion.token_ids) == text.index(wanted) + 2
    (out,) = llm.generate("stop here", _greedy(20, stop=wanted, include_stop_str_in_output=True))
    assert out.outputs[0].text == text[: text.index(wanted) + 2]
    (out,) = llm.generate("stop here", _greedy(20, stop_token_ids=[tokens[5]]))
    assert out.outputs[0].stop_reason == tokens[5]
    assert out.outputs[0].token_ids == tokens[: tokens.index(tokens[5]) + 1]
    _assert_idle(llm)


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
    folder: Path, reference: PreTrainedModel, max_batch_tokens: int
) -> None:
    (prompt,) = zoo.random_prompts([30])
    options = zoo.with_defaults({"max_batch_tokens": max_batch_tokens})
    with LLM(folder, device="cpu", **options) as llm:
        params = SamplingParams(
            seed=3, max_tokens=10, ignore_eos=True, logprobs=3, prompt_logprobs=2, n=2
        )
        llm.generate(prompt, _greedy(1))  # parks the prompt's rows, which must not be taken over
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
    llm.generate(["one", "two"], _greedy(), progress=True)
    assert "generating" in capsys.readouterr().err
    llm.generate(["one", "two"], _greedy())
    assert capsys.readouterr().err == ""


def test_a_model_without_tokenizer(reference: PreTrainedModel) -> None:
    model = zoo.tiny_model("llama")
    with LLM(model, device="cpu", **zoo.with_defaults({})) as llm:
        (out,) = llm.generate([1, 2, 3], _greedy(logprobs=1))
        assert list(out.outputs[0].token_ids) == zoo.generate_alone(reference, [1, 2, 3], 12)
        assert out.outputs[0].text == ""
        assert [delta.text for delta in llm.stream([1, 2, 3], _greedy(3))] == [""] * 3
        with pytest.raises(InvalidPrompt, match=r"no tokenizer.*token ids.*tokenizer="):
            llm.generate("text")
        with pytest.raises(InvalidPrompt, match="chat template"):
            llm.chat([{"role": "user", "content": "hi"}])
        with pytest.raises(InvalidSamplingParams, match=r"stop.*needs a tokenizer.*stop_token_ids"):
            llm.generate([1, 2], SamplingParams(stop="x"))
    with LLM(model, tokenizer=letter_tokenizer(), device="cpu", **zoo.with_defaults({})) as llm:
        assert len(llm.generate("text", _greedy(5))[0].outputs[0].text) == 5


# -- chat and stream ---------------------------------------------------------------------------


def test_chat_renders_the_template_and_reuses_the_turn_before(llm: LLM) -> None:
    messages = [{"role": "user", "content": "how are you"}]
    (first,) = llm.chat(messages, _greedy(20))
    (same,) = llm.generate("u:how are you;a:", _greedy(20))
    assert same.outputs[0].text == first.outputs[0].text
    messages += [
        {"role": "assistant", "content": first.outputs[0].text},
        {"role": "user", "content": "and now"},
    ]
    (second,) = llm.chat(messages, _greedy(20))
    assert (second.num_cached_tokens or 0) >= len(first.prompt_token_ids) + 19
    assert llm.stats().prefix_hit_tokens >= second.num_cached_tokens  # type: ignore[operator]
    (alone,) = llm.chat(messages, _greedy(20))
    with LLM(llm._loaded.model, tokenizer=llm.tokenizer, device="cpu", prefix_reuse=False,
             **zoo.with_defaults({})) as fresh:  # fmt: skip
        (computed,) = fresh.chat(messages, _greedy(20))
    assert alone.outputs[0].token_ids == second.outputs[0].token_ids
    assert computed.outputs[0].token_ids == second.outputs[0].token_ids


def test_several_conversations_at_once(llm: LLM) -> None:
    one, other = ([{"role": "user", "content": text}] for text in ("a", "b"))
    both = llm.chat([one, other], _greedy(6))
    assert [out.outputs[0].token_ids for out in both] == [
        llm.chat(conversation, _greedy(6))[0].outputs[0].token_ids for conversation in (one, other)
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
    (whole,) = llm.generate("stream", _greedy(15))
    pieces = list(llm.stream("stream", _greedy(15)))
    assert "".join(map(str, pieces)) == whole.outputs[0].text
    assert sum((piece.token_ids for piece in pieces), ()) == whole.outputs[0].token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * 14 + ["length"]
    chat = llm.stream([{"role": "user", "content": "x"}], _greedy(4))
    assert sum(len(piece.token_ids) for piece in chat) == 4


def test_a_stream_left_early_gives_everything_back(llm: LLM) -> None:
    stream = llm.stream("stream", _greedy(100))
    next(stream)
    assert llm.stats().num_running == 1
    stream.close()  # type: ignore[attr-defined]
    _assert_idle(llm)
    assert llm.stats().pages_held == 0


def test_a_stream_never_begun_leaves_nothing(llm: LLM) -> None:
    stream = llm.stream("stream", _greedy(100))
    del stream
    _assert_idle(llm)
    with pytest.raises(RequestTooLong):
        llm.stream("x" * 300)  # at once, not when the loop begins
    with pytest.raises(InvalidSamplingParams, match="n = 2"):
        llm.stream("x", SamplingParams(n=2))


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ([1] * 256, None, RequestTooLong, r"256 tokens.*max_len is 256.*raise max_len"),
        ([], None, InvalidPrompt, "no tokens"),
        ("", None, InvalidPrompt, "no tokens"),
        ([5, 96], None, InvalidPrompt, r"token id 96.*\[0, 96\)"),
        ([-1], None, InvalidPrompt, "token id -1"),
        ([1.5], None, InvalidPrompt, "plain integers"),
        ([torch.tensor(3)], None, InvalidPrompt, "plain integers"),
        ([True], None, InvalidPrompt, "plain integers"),
        (7, None, InvalidPrompt, "neither"),
        (None, None, InvalidPrompt, "neither"),
        ([1], SamplingParams(stop_token_ids=[96]), InvalidSamplingParams, "stop_token_ids = 96"),
        ([1], SamplingParams(logit_bias={99: 1}), InvalidSamplingParams, "logit_bias = 99"),
        ([1], SamplingParams(logprobs=97), InvalidSamplingParams, "logprobs = 97"),
    ],
)
def test_impossible_requests_are_refused_before_anything_runs(
    llm: LLM, prompt: Any, params: SamplingParams | None, error: type[VkvError], words: str
) -> None:
    with pytest.raises(error, match=words):
        llm.generate(["fine", prompt], params)
    _assert_idle(llm)
    assert llm.stats().num_steps == 0
    assert isinstance(error("x"), ValueError)


def test_what_is_no_batch_is_refused(llm: LLM) -> None:
    for prompts in (None, 5, {"a": 1}, torch.tensor([1, 2])):
        with pytest.raises(InvalidPrompt, match="prompts is a"):
            llm.generate(prompts)  # type: ignore[arg-type]
    with pytest.raises(InvalidSamplingParams, match="2 sampling parameters for 3 prompts"):
        llm.generate(["a", "b", "c"], [SamplingParams()] * 2)
    with pytest.raises(InvalidSamplingParams, match="temperature"):
        SamplingParams(temperatur=0)  # type: ignore[call-arg]


def test_a_request_the_pool_could_never_hold(folder: Path) -> None:
    options = zoo.with_defaults({"kv_memory": 3 * 4096})
    with LLM(folder, device="cpu", **options) as llm:
        with pytest.raises(RequestTooLarge, match=r"40 prompt.*20 generated.*kv_memory or lower"):
            llm.generate([1] * 40, _greedy(20))
        with pytest.raises(RequestTooLarge):
            llm.generate([1] * 60, SamplingParams(max_tokens=None))
        assert len(llm.generate([1] * 40, _greedy(9))[0].outputs[0].token_ids) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_memory": 4095}, r"4095 bytes holds no page of 4096"),
        ({"kv_memory": "5000", "layers_per_range": 1}, r"cannot hold one row.*at least 8192"),
        ({"kv_memory": "lots"}, "'lots' is not an amount of memory"),
        ({"kv_memory": 0}, "0 is not an amount"),
        ({"kv_memory": True}, "True is not an amount"),
        ({"max_len": 4096}, r"max_len is 4096.*512 positions.*lower max_len"),
        ({"max_len": 0}, "max_len is 0"),
        ({"max_seqs": None}, "max_seqs is None"),
        ({"max_seqs": True}, "max_seqs is True"),
        ({"max_seqs": 2.0}, "max_seqs is 2.0"),
        ({"max_parked": -1}, "max_parked is -1"),
        ({"page_bytes": "64KiB"}, "page_bytes is '64KiB'"),
        ({"page_bytes": 5000}, "5000"),
        ({"split_kv": 1}, "split_kv is 1"),
        ({"kv": "contiguous"}, "'virtual' or 'paged'"),
        ({"sanitize": "always"}, "sanitize is 'always'"),
        ({"max_seq": 4}, "unknown option 'max_seq': did you mean 'max_seqs'"),
        ({"gpu": 1}, "unknown option 'gpu': known: max_seqs"),
        ({"device": "tpu"}, "'tpu'; use 'auto', 'cpu' or 'cuda'"),
        ({"device": "meta"}, "'meta'; use"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        LLM(zoo.tiny_model("llama"), **{"device": "cpu", **zoo.with_defaults(options)})


def test_a_missing_gpu_is_named() -> None:
    number = torch.cuda.device_count()
    with pytest.raises(DriverUnavailable, match=rf"cuda:{number}.*device='cpu'"):
        LLM(zoo.tiny_model("llama"), device=f"cuda:{number}")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(VkvError, match="flash_atn"):
        LLM(zoo.tiny_model("llama"), device="cpu", attention="flash_atn", **zoo.with_defaults({}))


# -- checkpoints -------------------------------------------------------------------------------


def _broken(folder: Path, path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def _edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config |= changes
    config = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))


def _remove(*names: str) -> Any:
    return lambda path: [(path / name).unlink() for name in names]


def _cut(name: str, size: int) -> Any:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


def _lose_a_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove("config.json"), "no config.json.*point at the folder"),
        (_remove("model.safetensors"), "weights.*check that the checkpoint is complete"),
        (_cut("config.json", 40), "config"),
        (_cut("model.safetensors", 3000), "weights"),
        (_cut("model.safetensors", 4), "weights"),
        (_cut("model.safetensors", 0), "weights"),
        (_cut("tokenizer.json", 50), "tokenizer"),
        (_lose_a_tensor, r"lacks 1 .*model.layers.1.self_attn.k_proj.weight"),
        (lambda path: _edit_config(path, hidden_size=64), "weights.*"),
        (lambda path: _edit_config(path, intermediate_size=32), "weights.*"),
        (lambda path: _edit_config(path, num_hidden_layers=3), "lacks"),
        (lambda path: _edit_config(path, hidden_size="wide"), "config"),
        (lambda path: _edit_config(path, num_attention_heads=0), "config|weights"),
        (lambda path: _edit_config(path, model_type=...), "config"),
        (lambda path: _edit_config(path, model_type="no_such_model"), "no_such_model"),
        (lambda path: (path / "config.json").write_text("[]"), "config"),
    ],
)  # fmt: skip
def test_damaged_checkpoints_are_refused(
    folder: Path, tmp_path: Path, damage: Any, words: str
) -> None:
    path = _broken(folder, tmp_path)
    damage(path)
    with pytest.raises(BadCheckpoint, match=f"(?s){words}"):
        LLM(path, device="cpu", **zoo.with_defaults({}))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nothing-here", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(BadCheckpoint, match="is not a folder; give a model folder or a hub id"):
        LLM(name, device="cpu")


def test_a_hub_id_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadCheckpoint, match=r"(?s)config of nobody/nothing"):
        LLM("nobody/nothing", device="cpu")


def test_an_architecture_that_generates_no_text(folder: Path, tmp_path: Path) -> None:
    path = _broken(folder, tmp_path)
    (path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UnsupportedModel, match="clip has no causal language model"):
        LLM(path, device="cpu")


def test_recurrent_state_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        LLM(tmp_path, device="cpu")


def test_a_checkpoint_without_tokenizer_takes_token_ids(folder: Path, tmp_path: Path) -> None:
    path = _broken(folder, tmp_path)
    _remove("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")(path)
    with LLM(path, device="cpu", **zoo.with_defaults({})) as llm:
        assert llm.tokenizer is None
        assert len(llm.generate([1, 2], _greedy(3))[0].outputs[0].token_ids) == 3


def test_a_missing_chat_template(folder: Path, tmp_path: Path) -> None:
    path = _broken(folder, tmp_path)
    _remove("chat_template.jinja")(path)
    with LLM(path, device="cpu", **zoo.with_defaults({})) as llm:
        with pytest.raises(InvalidPrompt, match=r"no chat template.*generate\(\)"):
            llm.chat([{"role": "user", "content": "hi"}])
        assert llm.generate("hi", _greedy(2))[0].finished


# -- interruption and the end ------------------------------------------------------------------


def _generate_forever(llm: LLM) -> None:
    while True:
        llm.generate(zoo.random_prompts([30, 50, 20, 60]), _greedy(150))


def test_ctrl_c_leaves_no_pages_behind(llm: LLM) -> None:
    """The signal arrives somewhere within the run, most likely in the middle of a step."""

    def interrupt() -> None:
        while not llm._engine.scheduler.running:
            time.sleep(0.001)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    for _ in range(3):
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            _generate_forever(llm)
        thread.join()
        _assert_idle(llm)
        llm.trim()
        assert llm.stats().pages_held == 0
        llm._engine.cache.check_invariants()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(llm.generate("on", _greedy(5))[0].outputs[0].token_ids) == 5


def test_an_interrupt_within_a_step_waits_for_its_end(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = llm._engine.runner.run
    completed = []

    def interrupted(batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        tokens = run(batch)
        completed.append(batch)
        return tokens

    monkeypatch.setattr(llm._engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("hello", _greedy(50))
    assert len(completed) == 1
    _assert_idle(llm)
    assert llm.stats().pages_held == 0


def test_an_interrupt_while_requests_are_queued_loses_none_of_them(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = llm._engine.add_request

    def interrupted(*args: Any) -> Any:
        requests = add(*args)
        os.kill(os.getpid(), signal.SIGINT)
        return requests

    monkeypatch.setattr(llm._engine, "add_request", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], _greedy(50))
    _assert_idle(llm)


def test_a_failing_step_gives_everything_back(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    run = llm._engine.runner.run

    def fail(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("a kernel failed")
        return run(batch)

    with monkeypatch.context() as patched:
        patched.setattr(llm._engine.runner, "run", fail)
        with pytest.raises(RuntimeError, match="a kernel failed"):
            llm.generate(["a", "bc", "def"], _greedy(50))
    _assert_idle(llm)
    assert llm.stats().pages_held == 0
    assert llm.generate("on", _greedy(5))[0].finished


def test_closing_gives_all_memory_back(folder: Path) -> None:
    llm = LLM(folder, device="cpu", **zoo.with_defaults({}))
    driver = llm._built.driver
    assert driver is not None
    llm.generate("hello", _greedy(30))
    stream = llm.stream("more", _greedy(30))
    next(stream)
    assert driver.num_pages > 0
    llm.close()
    llm.close()
    assert driver.num_pages == 0
    assert driver.num_mappings == 0
    with pytest.raises(InvalidOperation, match="closed while it generated"):
        next(stream)
    for use in (llm.stats, llm.trim, lambda: llm.generate("x"), lambda: llm.stream("x")):
        with pytest.raises(InvalidOperation, match="closed"):
            use()


def test_closing_under_a_running_batch_is_no_result(folder: Path) -> None:
    llm = LLM(folder, device="cpu", **zoo.with_defaults({}))

    def close() -> None:
        while not llm._engine.scheduler.running:
            time.sleep(0.001)
        llm.close()

    thread = threading.Thread(target=close)
    thread.start()
    with pytest.raises(InvalidOperation, match="closed"):
        _generate_forever(llm)
    thread.join()


def test_dropping_an_llm_closes_it(folder: Path) -> None:
    llm = LLM(folder, device="cpu", **zoo.with_defaults({}))
    driver = llm._built.driver
    assert driver is not None
    llm.generate("hello", _greedy(30))
    del llm
    assert driver.num_pages == 0
    with pytest.raises(TypeError):
        LLM(folder, "too", "many")  # type: ignore[misc]


def test_two_threads_share_an_llm(llm: LLM, reference: PreTrainedModel) -> None:
    prompts = zoo.random_prompts([10, 30, 25, 7, 50, 14, 22, 9])
    results: dict[int, list[int]] = {}
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for i in range(index, len(prompts), 3):
                (out,) = llm.generate(prompts[i], _greedy(40))
                results[i] = list(out.outputs[0].token_ids)
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert results == {i: zoo.generate_alone(reference, p, 40) for i, p in enumerate(prompts)}
    _assert_idle(llm)


def test_threads_join_each_others_batches(llm: LLM) -> None:
    """A thread that generates must not keep others waiting until it is done."""
    started = threading.Event()
    long_done = threading.Event()

    def long_run() -> None:
        for count, _ in enumerate(llm.stream("long", _greedy(250))):
            if count == 3:
                started.set()
        long_done.set()

    thread = threading.Thread(target=long_run)
    thread.start()
    started.wait()
    llm.generate("short", _greedy(2))
    assert not long_done.is_set()
    thread.join()
