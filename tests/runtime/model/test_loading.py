"""Unmodified models over our slots say what `model.generate` says, token for token."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from vkv import LLM, SamplingParams
from vkv.runtime.engine.engine import Engine
from vkv.runtime.model.loading import load_model
from vkv.runtime.request.outputs import Logprob
from vkv.runtime.request.request import Request
from vkv.vmem.errors import InvalidConfig, InvalidOperation, UnsupportedModel

# Prompts far longer than a window, a page or a step's budget, and as short as they come.
PROMPT_LENGTHS = (3, 41, 18, 1, 75, 26)
OUTPUT_LENGTHS = (24, 9, 30, 17, 12, 21)
ARRIVAL_STEPS = (0, 0, 2, 5, 9, 14)


@cache
def _reference_tokens(model_type: str) -> list[list[int]]:
    """What `model.generate` makes of each prompt, alone."""
    model = zoo.tiny_model(model_type)
    return [
        zoo.generate_alone(model, prompt, num_tokens)
        for prompt, num_tokens in zip(
            zoo.random_prompts(PROMPT_LENGTHS), OUTPUT_LENGTHS, strict=True
        )
    ]


def _llm(model: PreTrainedModel, **options: Any) -> LLM:
    return LLM(model, device="cpu", **{"max_seqs": 4, **zoo.with_defaults(options)})


def _greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=zoo.VOCAB_SIZE
    )


Tables = list[dict[int, Logprob]]  # for each output token, the scores of all tokens


def _scores(tables: Tables) -> torch.Tensor:
    """All log probabilities of every step, [num_output_tokens, vocab]."""
    return torch.tensor([[table[i].logprob for i in range(zoo.VOCAB_SIZE)] for table in tables])


def _reference_scores(model: PreTrainedModel, request: Request) -> torch.Tensor:
    """The same by one plain forward over the finished sequence."""
    logits = zoo.full_logits(model, request.token_ids[:-1])
    return logits[request.num_prompt_tokens - 1 :].log_softmax(-1)


def _run_staggered(engine: Engine) -> list[tuple[Request, Tables]]:
    """Add each request at its own step, so that they join and leave a batch under way."""
    prompts = zoo.random_prompts(PROMPT_LENGTHS)
    requests: list[Request] = []
    step = 0
    while len(requests) < len(prompts) or engine.has_work:
        while len(requests) < len(prompts) and ARRIVAL_STEPS[len(requests)] <= step:
            index = len(requests)
            requests += zoo.add(engine, str(index), prompts[index], _greedy(OUTPUT_LENGTHS[index]))
        engine.step()
        step += 1
    engine.cache.check_invariants()
    scores = zoo.take_scores(engine)
    return [(request, scores[request.key[0]]) for request in requests]


def _assert_same(model_type: str, **options: Any) -> None:
    """Compare tokens with `model.generate`, and all scores with a plain forward."""
    with _llm(zoo.tiny_model(model_type), **options) as llm:
        requests = _run_staggered(llm.engine)
    model = zoo.tiny_model(model_type)
    for (request, tables), expected in zip(requests, _reference_tokens(model_type), strict=True):
        prompt = request.token_ids[: request.num_prompt_tokens]
        got = request.output_token_ids
        assert got == expected, zoo.explain_difference(model, prompt, got, expected)
        torch.testing.assert_close(
            _scores(tables), _reference_scores(model, request), rtol=1e-4, atol=1e-4
        )


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by GPT-BigCode
@pytest.mark.parametrize("model_type", zoo.ARCHITECTURES | zoo.HYBRIDS)
def test_tokens_and_scores_equal_plain_transformers(model_type: str) -> None:
    _assert_same(model_type, max_batch_tokens=11)


@pytest.mark.parametrize("model_type", zoo.REQUIRED)
def test_the_paged_baseline_says_the_same(model_type: str) -> None:
    _assert_same(model_type, kv="paged", max_batch_tokens=32)


@pytest.mark.parametrize("model_type", ["gemma2", "deepseek_v3"])
def test_every_geometry_of_slots_says_the_same(model_type: str) -> None:
    _assert_same(model_type, layers_per_range=1, split_kv=True, max_batch_tokens=32)


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma2"])
def test_the_reference_backend_says_the_same(model_type: str) -> None:
    _assert_same(model_type, attention="reference", max_batch_tokens=32)


def test_a_step_of_one_token_is_enough() -> None:
    _assert_same("llama", max_batch_tokens=1)


def test_bfloat16_is_no_less_exact_than_plain_transformers() -> None:
    exact = zoo.tiny_model("llama")
    plain = zoo.tiny_model("llama", dtype=torch.bfloat16)
    with _llm(zoo.tiny_model("llama", dtype=torch.bfloat16), max_batch_tokens=11) as llm:
        requests = _run_staggered(llm.engine)
    ours = theirs = 0.0
    for request, tables in requests:
        truth = _reference_scores(exact, request)
        ours += (_scores(tables) - truth).square().mean().item()
        theirs += (_reference_scores(plain, request) - truth).square().mean().item()
    assert 0 < ours < 1.5 * theirs


# -- the tests above can fail ------------------------------------------------------------------


def _tokens_of(model_type: str, *, tamper: Any) -> list[int]:
    """Decode 12 tokens after a prompt of 40, with `tamper(engine, request)` in between."""
    (prompt,) = zoo.random_prompts([40])
    with _llm(zoo.tiny_model(model_type), max_batch_tokens=64) as llm:
        (request,) = zoo.add(llm.engine, "0", prompt, _greedy(12))
        llm.engine.step()
        tamper(llm.engine, request)
        while llm.engine.has_work:
            llm.engine.step()
    return request.output_token_ids


def _exchange_rows(engine: Engine, request: Request) -> None:
    """Let the keys of recent tokens, all within any window, stand before other values."""
    assert request.slot is not None
    for layer in range(len(engine.cache.layout.layers)):
        keys, _ = engine.cache.layer(layer)
        recent = keys[request.slot.index, 31:40]
        recent.copy_(recent.flip(0))


def _shift_positions(engine: Engine, request: Request) -> None:
    """Number the tokens to come one too high."""

    def shift(_module: object, args: Any, options: dict[str, Any]) -> Any:
        return args, {**options, "position_ids": options["position_ids"] + 1}

    engine.runner.forward.model.register_forward_pre_hook(shift, with_kwargs=True)


@pytest.mark.parametrize("tamper", [_exchange_rows, _shift_positions])
@pytest.mark.parametrize("model_type", zoo.REQUIRED)
def test_wrong_rows_and_positions_change_tokens(model_type: str, tamper: Any) -> None:
    untouched = _tokens_of(model_type, tamper=lambda *_: None)
    assert _tokens_of(model_type, tamper=tamper) != untouched


def test_models_are_sharp_enough_to_tell_tokens_apart() -> None:
    """Rounding moves logits by about 1e-5; the likeliest token leads by far more."""
    for model_type in zoo.REQUIRED:
        model = zoo.tiny_model(model_type)
        for prompt, output in zip(
            zoo.random_prompts(PROMPT_LENGTHS), _reference_tokens(model_type), strict=True
        ):
            logits = zoo.full_logits(model, [*prompt, *output[:-1]])[len(prompt) - 1 :]
            top = logits.topk(2).values
            assert (top[:, 0] - top[:, 1]).min() > 1e-4, model_type


# -- refusals ----------------------------------------------------------------------------------

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TWO_LAYERS: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "interface"),
        ("falcon", {**_TWO_LAYERS, "num_attention_heads": 4}, "interface"),
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "interface"),
        ("mamba", _TWO_LAYERS, "recurrent state only"),
        ("rwkv", _TWO_LAYERS, "recurrent state"),
        ("llama4_text", {**_SMALL, "num_local_experts": 2}, "chunked_attention"),
        ("diffllama", _SMALL, "layer 0 attends twice"),
        ("doge", _SMALL, "masks them its own way"),
        ("bert", _SMALL, "not causal"),
        (
            "bart",
            {
                "vocab_size": 64,
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "decoder_attention_heads": 4,
                "decoder_ffn_dim": 32,
            },
            "positions of its own",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    model_type: str, changes: dict[str, Any], reason: str
) -> None:
    config = AutoConfig.for_model(model_type, **changes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModel, match=reason):
        _llm(model)


def test_a_long_rotary_embedding_is_held_to_its_original_length() -> None:
    """Past it, one long request in a batch would change the frequencies of all others."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    model = zoo.tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    with pytest.raises(InvalidConfig, match=r"max_len is 256.*64 positions.*lower max_len"):
        _llm(model)
    with _llm(model, max_len=None) as llm:
        assert llm.engine.cache.max_len == 64


def test_a_window_that_only_the_cache_of_transformers_has_bounds_the_length() -> None:
    """Moshi's attention sees everything; `generate` forgets what lies behind the window."""
    config = tiny_configs.config_of("moshi")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    zoo.sharpen(model)
    window = tiny_configs.WINDOW
    (prompt,) = zoo.random_prompts([5])
    expected = zoo.generate_alone(model, prompt, window - 5, eos_token_id=None)
    with pytest.raises(InvalidConfig, match=f"takes {window} positions here; lower max_len"):
        _llm(model)
    with _llm(model, max_len=None) as llm:
        assert llm.max_len == window
        (out,) = llm.generate([prompt], zoo.greedy(window - 5))
    assert list(out.outputs[0].token_ids) == expected


def test_a_prepared_model_says_how_to_use_it_elsewhere() -> None:
    model = zoo.tiny_model("llama")
    with _llm(model):
        pass
    with pytest.raises(InvalidOperation, match="set_attn_implementation"):
        model(torch.tensor([[1, 2]]))
    model.set_attn_implementation("sdpa")
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_model_whose_attention_is_switched_under_an_open_llm() -> None:
    """Its attention would see the tokens of a step alone, and none before them."""
    model = zoo.tiny_model("llama")
    with _llm(model) as llm:
        before = _generate(llm, [[1, 2, 3]])
        model.set_attn_implementation("sdpa")
        (out,) = llm.generate([[4, 5, 6]], SamplingParams(max_tokens=4))
        assert isinstance(out.error, InvalidOperation)
        assert "was switched to 'sdpa' while vkv.LLM" in str(out.error)
    with _llm(model) as llm:
        assert _generate(llm, [[1, 2, 3]]) == before


@pytest.mark.parametrize("name", ["float31", "int8", torch.int8])
def test_unknown_dtypes_are_refused(name: Any) -> None:
    with pytest.raises(InvalidConfig, match="bfloat16"):
        _llm_with_dtype(name)


def _llm_with_dtype(dtype: Any) -> LLM:
    return LLM(zoo.tiny_model("llama"), device="cpu", dtype=dtype, max_len=64)


def _generate(llm: LLM, prompts: Sequence[list[int]]) -> list[tuple[int, ...]]:
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs]


def test_weights_and_cache_take_the_dtype_asked_for() -> None:
    with _llm_with_dtype("bfloat16") as llm:
        assert {p.dtype for p in llm.loaded.model.parameters()} == {torch.bfloat16}
        assert llm.engine.cache.layer(0)[0].dtype == torch.bfloat16
        assert len(_generate(llm, zoo.random_prompts([5]))[0]) == 4


@pytest.mark.parametrize("given_as", ["folder", "object"])
def test_a_dtype_rounds_what_transformers_rounds(given_as: str, tmp_path: Path) -> None:
    """Not rotary frequencies, nor a router's bias: tokens far on would be at other positions."""
    model = zoo.tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    source = model if given_as == "object" else tmp_path
    cpu = torch.device("cpu")
    ours = load_model(source, device=cpu, dtype="bfloat16", pack_weights=False).model
    expected = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    assert sum(tensor.dtype == torch.float32 for tensor in expected.values()) == 4
    found = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("v_head.summary.weight", True),
        ("model.layers.0.self_attn.q_proj.rotation", False),
        ("score.weight", False),
    ],
)
def test_tensors_without_a_place_are_refused(tmp_path: Path, name: str, harmless: bool) -> None:
    zoo.tiny_model("llama").save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file(held | {name: torch.ones(4)}, tmp_path / "model.safetensors", {"format": "pt"})
    if harmless:
        assert load_model(tmp_path, device=torch.device("cpu")).vocab_size == zoo.VOCAB_SIZE
        return
    with pytest.raises(UnsupportedModel, match=rf"no place for, among them {re.escape(name)}"):
        load_model(tmp_path, device=torch.device("cpu"))
