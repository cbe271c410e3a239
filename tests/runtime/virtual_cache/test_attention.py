"""`attn_implementation="vkv"` outside the engine: what `eager` gives, read where it lies."""

import copy
import functools
import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_configs
import torch
import vkv
import zoo
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers import models as models_of_transformers
from transformers.cache_utils import Cache
from virtual_zoo import VIRTUAL
from vkv.runtime.virtual_cache import attention
from vkv.vmem.errors import UnsupportedAttention

PAGE = 4096
HAS_KERNELS = attention.NativeBackend.unavailable_reason() is None
NUM_TOKENS = 12
# Of those that ask for attention by name: plain, windows, chunks, soft caps, sinks, recurrent
# state beside it, keys and values of other sizes.
NAMES = [
    "llama",
    "qwen3_moe",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "llama4_text",
    "deepseek_v3",
    "falcon_h1",
    "gpt2",
]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt_lookup": {"prompt_lookup_num_tokens": 4},
    "chunked_prefill": {"prefill_chunk_size": 9},
}


@functools.cache
def models(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights with `eager` attention and with ours."""
    theirs = zoo.tiny_model(name, **VIRTUAL[name])
    theirs.set_attn_implementation("eager")
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation(vkv.ATTENTION)
    return theirs, ours


def virtual(model: PreTrainedModel) -> vkv.VirtualCache:
    return vkv.VirtualCache(model.config, max_len=128, page_bytes=PAGE)


def prompts(batch: int, *, repeating: bool = False) -> torch.Tensor:
    if repeating:
        return torch.tensor(zoo.random_prompts([9]) * 4).view(1, -1).repeat(batch, 1)
    return torch.tensor(zoo.random_prompts([33] * batch))


@torch.inference_mode()
def generate(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None, **options: Any
) -> torch.Tensor:
    return model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        pad_token_id=0,
        **{"attention_mask": torch.ones_like(ids), "do_sample": False, **options},
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, bool]]:
    """How often attention was computed in each way, and whether for one token a sequence."""
    counts: Counter[tuple[str, bool]] = Counter()
    for name in ("_natively", "_folded", "_eagerly", "sdpa_attention_forward"):
        way = getattr(attention, name)

        def counted(*args: Any, name: str = name, way: Any = way, **kwargs: Any) -> Any:
            query = next(arg for arg in args if isinstance(arg, torch.Tensor))
            counts[name, query.shape[2] == 1] += 1
            return way(*args, **kwargs)

        monkeypatch.setattr(attention, name, counted)
    return counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_generate_gives_the_tokens_of_eager_attention(name, mode, calls):
    theirs, ours = models(name)
    lookup = mode == "prompt_lookup"
    if lookup and name == "falcon_h1":
        pytest.skip("transformers cannot undo tokens in recurrent state")
    ids = prompts(1 if lookup else 2, repeating=lookup)
    expected = generate(theirs, ids, None, **MODES[mode])
    assert torch.equal(generate(ours, ids, virtual(ours), **MODES[mode]), expected)
    if not HAS_KERNELS:
        return
    if name != "llama4_text":  # whose chunks only a mask knows
        assert {way for way, is_decode in calls if is_decode} == {"_natively"}
    if name == "llama":  # which asks for no mask
        assert {way for way, _ in calls} == {"_natively"}


@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_is_masked(name):
    theirs, ours = models(name)
    ids, mask = prompts(3), torch.ones(3, 33, dtype=torch.long)
    mask[0, :20] = mask[1, :3] = 0
    expected = generate(theirs, ids, None, attention_mask=mask)
    assert torch.equal(generate(ours, ids, virtual(ours), attention_mask=mask), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static", "none", "turns"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_any_cache_will_do(name, kind):
    theirs, ours = models(name)
    ids = prompts(2)
    if kind == "turns":  # a chunk of several tokens behind what is there
        first, second = (generate(m, ids, None) for m in (theirs, ours))
        assert torch.equal(first, second)
        cache = virtual(ours)
        generate(ours, ids, cache)
        more = torch.cat([first, prompts(2)[:, :7]], dim=1)
        expected = generate(theirs, more, None)
        assert torch.equal(generate(ours, more, cache), expected)
        return
    caches: dict[str, Cache | None] = {
        "dynamic": DynamicCache(config=ours.config),
        "static": StaticCache(config=ours.config, max_cache_len=80),
        "none": None,
    }
    options = {"use_cache": False} if kind == "none" else {"disable_compile": True}
    expected = generate(theirs, ids, None)
    assert torch.equal(generate(ours, ids, caches[kind], **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("num_queries", [1, 5, 40])
def test_each_way_gives_the_same(dtype, softcap, sinks, num_queries, monkeypatch):
    torch.manual_seed(0)
    query = torch.randn(2, 8, num_queries, 16, dtype=dtype)
    key, value = torch.randn(2, 2, 40, 16, dtype=dtype), torch.randn(2, 2, 40, 24, dtype=dtype)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    asked = {"softcap": softcap, "s_aux": torch.randn(8) if sinks else None, "scaling": 0.4}
    double = [t.double() for t in (query, key, value)]
    monkeypatch.setattr(attention, "_has_kernels", lambda: False)
    expected, _ = attention.vkv_attention(module, *double, None, **asked)
    without, _ = attention.vkv_attention(module, query, key, value, None, **asked)
    monkeypatch.undo()
    ours, _ = attention.vkv_attention(module, query, key, value, None, **asked)
    mask = attention._causal(query, key).expand(2, 1, -1, -1)
    masked, _ = attention.vkv_attention(module, query, key, value, mask, **asked)
    assert ours.shape == (2, num_queries, 8, 24)
    bound = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    for found in (ours, without, masked):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=bound, rtol=bound)


def test_kernels_are_looked_for_when_they_are_used(monkeypatch):
    """Not at import: that may compile them, into a folder that the environment names."""
    asked = []

    def unavailable_reason() -> str:
        asked.append(1)
        return "none here"

    monkeypatch.setattr(attention.NativeBackend, "unavailable_reason", unavailable_reason)
    importlib.reload(attention)
    assert not asked
    states = torch.randn(3, 1, 2, 4, 16)
    for _ in range(2):
        attention.vkv_attention(torch.nn.Module(), *states, None)
    assert len(asked) == 1
    monkeypatch.undo()
    attention._has_kernels.cache_clear()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("batches", [(1, 3, 3), (3, 1, 1), (3, 3, 1)])
def test_one_sequence_serves_for_all_of_a_batch(softcap, num_queries, batches, monkeypatch):
    shapes = (8, num_queries, 16), (2, 40, 16), (2, 40, 24)
    states = [torch.randn(batch, *shape) for batch, shape in zip(batches, shapes, strict=True)]
    whole = [part.expand(3, -1, -1, -1).contiguous() for part in states]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    for _ in range(2):
        expected, _ = attention.vkv_attention(module, *whole, None, softcap=softcap)
        out, _ = attention.vkv_attention(module, *states, None, softcap=softcap)
        torch.testing.assert_close(out, expected, atol=0, rtol=0)
        monkeypatch.setattr(attention, "_has_kernels", lambda: False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", [torch.jit.trace, lambda f, args: make_fx(f)(*args)])
def test_a_traced_graph_has_attention_and_its_mask_in_it(trace):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    first, second = (tuple(torch.randn(2, heads, 6, 16) for heads in (8, 2, 2)) for _ in range(2))

    masks: list[torch.Tensor | None] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(2, 6, dtype=torch.bool)
        masks.append(attention.vkv_mask(2, 6, 6, attention_mask=seen))
        return attention.vkv_attention(module, query, key, value, None)[0]

    graph = trace(attend, first)
    assert masks[0] is not None
    expected = attention.vkv_attention(module, *second, None)[0]
    torch.testing.assert_close(graph(*second), expected)


@pytest.mark.parametrize("num_queries", [1, 5])
def test_a_position_bias_is_added_or_refused_by_name(num_queries):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    query, key, value = (torch.randn(2, 3, n, 16) for n in (num_queries, 9, 9))
    bias = torch.randn(2, 3, num_queries, 9)
    logits = (query @ key.mT / 4 + bias).masked_fill(~attention._causal(query, key), -torch.inf)
    out, _ = attention.vkv_attention(module, query, key, value, None, position_bias=bias)
    torch.testing.assert_close(out.transpose(1, 2), logits.softmax(-1) @ value)
    for others in ({"softcap": 2.0}, {"s_aux": torch.randn(3)}):
        with pytest.raises(UnsupportedAttention, match=r'position_bias .* use "eager"'):
            attention.vkv_attention(module, query, key, value, None, position_bias=bias, **others)


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_what_a_dense_mask_does_not_say_is_refused_by_name(name):
    """Which keys an indexer chose, which models put into the mask for "eager" and "sdpa" alone."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    states = (torch.randn(2, 3, n, 16) for n in (5, 9, 9))
    asked = {name: torch.zeros(2, 5, 4, dtype=torch.long)}
    with pytest.raises(UnsupportedAttention, match=rf'Module asks for {name}, .* use "eager"'):
        attention.vkv_attention(module, *states, attention_mask=None, **asked)


@pytest.mark.parametrize("name", ["bloom", "codegen", "xglm", "bigbird_pegasus"])
def test_models_that_do_not_take_such_masks_are_refused(name):
    """Attention of their own, or layers that do not say that they are causal."""
    config = tiny_configs.config_of(name)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=vkv.ATTENTION).eval()
    ids = prompts(1)
    with pytest.raises(UnsupportedAttention, match=r'works neither with "sdpa" .* use "eager"'):
        model(ids)


def test_no_model_passes_attention_what_is_not_known_here():
    """A version of `transformers` with another keyword is noticed, before it is left out."""
    known = {
        *inspect.signature(attention.vkv_attention).parameters,
        *attention._NOT_COMPUTED,
        *("position_bias", "softcap", "s_aux"),
        *("sliding_window", "position_ids"),  # in the mask; in queries and keys
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),  # flash attention's
        *("deterministic", "output_attentions"),
    }
    found: set[str] = set()
    for path in Path(models_of_transformers.__file__).parent.glob("*/modeling_*.py"):
        for call in re.findall(r"= attention_interface\(\n(.*?)\n +\)\n", path.read_text(), re.S):
            found.update(re.findall(r"^ +(\w+)=", call, re.M))
    assert {"scaling", "position_bias", "indices"} <= found <= known


def test_a_model_that_chooses_keys_is_refused_before_it_attends_to_all():
    model = zoo.tiny_model(
        "minimax_m3_vl_text",
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    ids = prompts(1)
    assert generate(model, ids, virtual(model)).shape == (1, 33 + NUM_TOKENS)
    model.set_attn_implementation(vkv.ATTENTION)
    with pytest.raises(UnsupportedAttention, match=r'asks for block_indices, .* use "eager"'):
        generate(model, ids, virtual(model))


@pytest.mark.skipif(not HAS_KERNELS, reason="no C compiler, no built kernels")
def test_an_empty_batch_has_an_empty_result():
    module = torch.nn.Module()
    module.is_causal = True
    shapes = (0, 5, 8, 16), (0, 5, 2, 16), (0, 5, 2, 24)
    states = (torch.randn(shape).transpose(1, 2) for shape in shapes)  # heads side by side
    out, _ = attention.vkv_attention(module, *states, None)
    assert out.shape == (0, 5, 8, 24)


def test_gradients_flow_as_through_sdpa():
    theirs, ours = (copy.deepcopy(model) for model in models("llama"))
    theirs.set_attn_implementation("sdpa")
    found = []
    for model in (theirs, ours):
        ids = prompts(2)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_a_model_with_this_name_is_served_by_the_engine():
    _, ours = models("llama")
    ids = zoo.random_prompts([20])
    expected = generate(ours, torch.tensor(ids), None)[0, 20:].tolist()
    model = copy.deepcopy(ours)
    with vkv.LLM(model, max_len=64) as llm:
        (output,) = llm.generate(ids, zoo.greedy(NUM_TOKENS))
    assert list(output.outputs[0].token_ids) == expected
    model.set_attn_implementation(vkv.ATTENTION)  # the engine's own is left behind
    assert generate(model, torch.tensor(ids), virtual(model))[0, 20:].tolist() == expected
