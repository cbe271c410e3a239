"""Tiny random models of many architectures, sharp enough that a wrong key or value shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from vkv import LLM, RequestOutput, SamplingParams
from vkv.bench.soak import tiny
from vkv.bench.soak.tiny import VOCAB_SIZE, sharpen
from vkv.runtime.engine.engine import Engine
from vkv.runtime.request.outputs import Logprob
from vkv.runtime.request.request import Request
from vkv.runtime.request.spec import RequestSpec

torch.set_num_threads(1)  # more threads only hinder operations as tiny as these

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MANY_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_LATENT: dict[str, Any] = {  # multi-head latent attention: keys and values differ in size
    "num_key_value_heads": 4,
    "head_dim": 4,  # of the rotary part
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_WINDOW = 13  # far shorter than the tests' sequences, and no multiple of anything
_ALTERNATING: dict[str, Any] = {
    "sliding_window": _WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}

# What sets an architecture apart, over `_SIZES`; the name is its `model_type`.
REQUIRED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": _WINDOW},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        **_ALTERNATING,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 30.0,
    },
    "gpt_oss": {**_ALTERNATING, **_MOE, "rope_scaling": None},
    "deepseek_v3": {**_LATENT, **_ROUTED, "num_hidden_layers": 3},
}
OTHERS: dict[str, dict[str, Any]] = {
    "afmoe": {**_ALTERNATING, **_MANY_EXPERTS},
    "biogpt": {"hidden_dropout_prob": 0.0},
    "cohere2": _ALTERNATING,
    "ctrl": {"dff": 48},
    "deepseek_v2": {**_LATENT, **_ROUTED, "topk_method": "group_limited_greedy"},
    "exaone4": _ALTERNATING,
    "gemma3_text": {**_ALTERNATING, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **_ALTERNATING,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "glm4": {},
    "glm4_moe": _ROUTED,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "minimax_m2": _MOE,
    "mixtral": _MOE,
    "nemotron": {},
    "olmo2": {},
    "olmo3": _ALTERNATING,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": _WINDOW},
    "qwen3_moe": _MANY_EXPERTS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {"sliding_window": _WINDOW},
}
# Some of their layers keep recurrent or convolution state.
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_MAMBA,
        **_MOE,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_intermediate_size": 24,
        "attention_multiplier": 0.3,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "time_step_min": 1e-12,  # transformers clamps to it in prompts only, not in decodes
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
    },
    "qwen3_next": {
        **_MANY_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 24,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
ARCHITECTURES = REQUIRED | OTHERS


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The config of a tiny model of `model_type`, which need not be in the tables above."""
    known = (ARCHITECTURES | HYBRIDS).get(model_type, {})
    return AutoConfig.for_model(model_type, **{**_SIZES, **known, **changes})


def tiny_model(
    model_type: str,
    *,
    seed: int = 0,
    attention: str = "eager",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """A sharp tiny model; the same arguments give the same weights."""
    config = tiny_config(model_type, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    sharpen(model, seed=seed)
    return model.to(dtype).eval()


def gemma3() -> PreTrainedModel:
    """A tiny Gemma 3 with its vision tower."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    sizes = {**tiny_config("gemma3_text").to_dict(), "eos_token_id": 5}
    model = tiny_model(
        "gemma3", text_config=sizes, vision_config=vision, mm_tokens_per_image=4, eos_token_id=5
    )
    model.generation_config.eos_token_id = 5
    return model


_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable character, and the last of the vocabulary as end of text."""
    return tiny.letter_tokenizer(_TEMPLATE)


def save_checkpoint(folder: Path) -> None:
    """The tiny llama as users have it: config, weights and tokenizer in a folder."""
    tiny_model("llama", eos_token_id=VOCAB_SIZE - 1).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)


def greedy(max_tokens: int = 12, **options: Any) -> SamplingParams:
    """Exactly `max_tokens` of the likeliest tokens."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def add(
    engine: Engine, request_id: str, prompt: Sequence[int], params: SamplingParams
) -> list[Request]:
    """Queue a prompt with an engine that no loop drives."""
    spec = RequestSpec(request_id=request_id, prompt_token_ids=prompt, params=params)
    return engine.add(spec)


def take_scores(engine: Engine) -> dict[str, list[dict[int, Logprob]]]:
    """Log probabilities of each request's output tokens, as the engine gave them out."""
    scores: dict[str, list[dict[int, Logprob]]] = {}
    for output in engine.take_outputs():
        scores.setdefault(output.request_id, []).extend(output.logprobs)
    return scores


def assert_idle(llm: LLM) -> None:
    """No request is left, and no page but those parked."""
    stats = llm.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.pages_held == stats.pages_parked


def random_prompts(lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    """A prompt of random tokens for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def generate_alone(
    model: PreTrainedModel, prompt: Sequence[int], num_tokens: int, **options: Any
) -> list[int]:
    """The reference: `model.generate`, greedy, one prompt."""
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return out[0, len(prompt) :].tolist()


@torch.inference_mode()
def full_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Logits after every token of one sequence, by one plain forward: float32 [tokens, vocab]."""
    ids = torch.tensor([list(tokens)], device=model.device)
    return model(ids, use_cache=False).logits[0].float()


def explain_difference(
    model: PreTrainedModel, prompt: Sequence[int], got: Sequence[int], expected: Sequence[int]
) -> str:
    """Where two outputs part, and how close the reference's two likeliest tokens were there."""
    step = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    if step is None:
        return f"{len(got)} tokens instead of {len(expected)}"
    top = full_logits(model, [*prompt, *expected[:step]])[-1].topk(2).values
    return (
        f"output token {step} of {len(expected)} (prompt {len(prompt)}) is {got[step]}, not "
        f"{expected[step]}; the reference's top two logits are {top[0] - top[1]:.2e} apart"
    )


def check_generate(
    llm: LLM, model_type: str, lengths: Sequence[int], counts: Sequence[int]
) -> None:
    """Each output of random prompts is what `model.generate` makes of its prompt alone."""
    reference = tiny_model(model_type, attention="eager")
    prompts = random_prompts(lengths)
    outs = llm.generate(prompts, [greedy(count) for count in counts])
    for prompt, out, count in zip(prompts, outs, counts, strict=True):
        expected = generate_alone(reference, prompt, count)
        got = list(out.outputs[0].token_ids)
        assert got == expected, explain_difference(reference, prompt, got, expected)
    llm.engine.cache.check_invariants()
    assert_idle(llm)


def check_scores(
    prompts: Sequence[Sequence[int]],
    outs: Sequence[RequestOutput],
    plain: PreTrainedModel,
    exact: PreTrainedModel,
) -> None:
    """Each output token's score is as near to that of `exact`, in float32, as `plain` itself comes.

    `plain` computes in the type of the outputs, and no bug is as small as what that moves scores
    by between two batch shapes. The outputs hold `logprobs`.
    """
    for prompt, out in zip(prompts, outs, strict=True):
        tokens = list(out.outputs[0].token_ids)
        scores = out.outputs[0].logprobs
        assert scores is not None
        got = torch.tensor([table[t].logprob for table, t in zip(scores, tokens, strict=True)])
        sequence, own = [*prompt, *tokens], torch.tensor(tokens)[:, None]
        rounded, true = (
            full_logits(model, sequence[:-1])[len(prompt) - 1 :]
            .log_softmax(-1)
            .cpu()
            .gather(1, own)[:, 0]
            for model in (plain, exact)
        )
        allowed = 2 * (rounded - true).abs().max() + 0.05
        assert (got - true).abs().max() <= allowed


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Engine options for tiny models: rows of a few tokens, so that memory really moves."""
    defaults = {"page_bytes": 4096, "layers_per_range": 64, "max_len": 256, "kv_memory": "8MiB"}
    return {**defaults, **options}
