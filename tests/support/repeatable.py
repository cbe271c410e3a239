"""The same requests alone, in batches, after their own prefix or preemption: all tokens equal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import zoo
from quantized import round_to_nearest
from torch import nn
from transformers import PreTrainedModel
from vkv import LLM, SamplingParams
from vkv.quant import Int4Linear
from vkv.quant.experts import Expert, Experts, FusedExperts

# Heads of whole vectors, as models have them, and sizes of which tiles have a rest.
_SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 96},
}


def build(name: str, dtype: torch.dtype, *, in_4_bits: bool) -> PreTrainedModel:
    """The same weights for the same arguments."""
    model = zoo.tiny_model(name, **_SIZES, **MODELS[name]).to(dtype)
    for layer, module in list(model.named_modules()) if in_4_bits else ():
        if type(module) is nn.Linear and layer != "lm_head":
            model.set_submodule(layer, _in_4_bits(module))
        elif (fused := FusedExperts.of(module)) is not None:
            model.set_submodule(layer, _experts_in_4_bits(fused))
    return model


def _in_4_bits(linear: nn.Linear) -> Int4Linear:
    weight = round_to_nearest(linear.weight.detach().float(), 32, symmetric=False)
    return Int4Linear(weight, linear.bias)


def _experts_in_4_bits(fused: FusedExperts) -> Experts:
    linears = [
        {role: _in_4_bits(fused.linear(role, index)) for role in fused.roles}
        for index in range(fused.num_experts)
    ]
    activation, interleaved = fused.activation(), fused.interleaved
    return Experts([Expert(one, activation, interleaved=interleaved) for one in linears])


def requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 1 to 200 tokens, a quarter of them greedy, the others drawn by a seed."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 200, (count,), generator=generator).tolist()
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.1},
    ]
    params = [
        SamplingParams(seed=i, max_tokens=8 + i % 25, ignore_eos=True, **kinds[i % 4])
        for i in range(count)
    ]
    return zoo.random_prompts(lengths, seed=count), params


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tokens_by_way(
    make: Callable[[], PreTrainedModel], count: int, *, token_bytes: int
) -> dict[str, list[list[int]]]:
    """Each request's tokens, by the way that they were computed; the first is one by one.

    `token_bytes`: of a token's keys and values.
    """
    prompts, params = requests(count)
    found: dict[str, list[list[int]]] = {}

    def run(name: str, num_threads: int, *, alone: bool = False, **options: Any) -> None:
        with threads(num_threads), LLM(make(), repeatable=True, max_len=512, **options) as llm:
            for attempt in range(2 if options.get("prefix_reuse", True) else 1):
                if alone:
                    outs = [llm.generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
                else:
                    outs = llm.generate(prompts, params)
                assert not any(out.error for out in outs)
                found[f"{name}, {attempt}"] = [list(o.outputs[0].token_ids) for o in outs]
            stats = llm.stats()
            assert "preempted" not in name or stats.num_preemptions, "nothing was preempted"
            reused = stats.prefix_hit_tokens
            assert ("after" in name) == bool(reused), f"{reused} tokens of prefixes were found"

    run("alone", 1, alone=True, max_seqs=1, prefix_reuse=False)
    run("alone, two threads", 2, alone=True, max_seqs=1, prefix_reuse=False)
    run("in batches", 1, max_seqs=32, prefix_reuse=False)
    run("in small chunks", 2, max_seqs=7, max_batch_tokens=24, prefix_reuse=False)
    run("not recorded", 1, max_seqs=5, prefix_reuse=False, record_decodes=False)
    run("after its own prefix", 1, max_seqs=8, max_parked=count)
    run("preempted", 2, max_seqs=8, max_parked=0, prefix_reuse=False, kv_memory=300 * token_bytes)
    return found


def check(name: str, dtype: torch.dtype, *, in_4_bits: bool, count: int) -> None:
    """Raises AssertionError with the first difference."""
    heads = _SIZES["num_hidden_layers"] * _SIZES["num_key_value_heads"]
    token_bytes = 2 * heads * _SIZES["head_dim"] * dtype.itemsize
    make = partial(build, name, dtype, in_4_bits=in_4_bits)
    found = tokens_by_way(make, count, token_bytes=token_bytes)
    alone = found["alone, 0"]
    for way, tokens in found.items():
        off = [i for i, (a, b) in enumerate(zip(tokens, alone, strict=True)) if a != b]
        assert not off, f"{way}: {len(off)} of {count} requests differ, the first is {off[0]}"
