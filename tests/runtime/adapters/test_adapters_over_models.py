"""Adapters over linears of every kind: fused, transposed, in 4 bits, beside experts and state."""

from collections.abc import Sequence
from pathlib import Path

import lora
import pytest
import quantized
import torch
import zoo
from transformers import AutoModelForCausalLM, PreTrainedModel
from vkv import LLM
from vkv.vmem.errors import BadAdapter

_LENGTHS, _COUNT = (5, 19, 12, 30), 12


def _check(
    llm: LLM, base: PreTrainedModel, merged: PreTrainedModel, names: Sequence[str | None]
) -> None:
    prompts = zoo.random_prompts(_LENGTHS)
    for _ in range(2):  # the second time from recordings and prefixes, where there are some
        outs = llm.generate(prompts, zoo.greedy(_COUNT), adapter=names)
        for prompt, out, name in zip(prompts, outs, names, strict=True):
            assert out.error is None, out.error
            model = base if name is None else merged
            expected = zoo.generate_alone(model, prompt, _COUNT)
            got = list(out.outputs[0].token_ids)
            assert got == expected, zoo.explain_difference(model, prompt, got, expected)


@pytest.mark.parametrize("packs", [False, True], ids=["as it is", "packed"])
@pytest.mark.parametrize(
    ("model_type", "endings"),
    [
        ("llama", (*lora.ALL, "lm_head")),
        ("qwen2", lora.ALL),
        ("qwen3_moe", lora.ATTENTION),
        ("mixtral", lora.ATTENTION),
        ("gpt_oss", lora.ATTENTION),
        ("deepseek_v3", ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
        ("gemma2", lora.ALL),
        ("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        ("gpt2", ("c_attn", "c_proj", "c_fc")),
        ("gpt_neox", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
        ("lfm2", ("q_proj", "k_proj", "v_proj", "in_proj", "out_proj")),
        ("falcon_h1", lora.ALL),
    ],
)
def test_tokens_are_those_of_the_merged_model(
    model_type: str, endings: tuple[str, ...], packs: bool, tmp_path: Path
) -> None:
    base, merged = zoo.tiny_model(model_type), zoo.tiny_model(model_type)
    folder = lora.save_adapter(tmp_path / "a", base, endings=endings, rank=6, gain=0.7)
    lora.merge(merged, folder)
    options = zoo.with_defaults({"pack_weights": packs, "max_batch_tokens": 24})
    with LLM(zoo.tiny_model(model_type), device="cpu", **options) as llm:
        llm.load_adapter("one", folder)
        _check(llm, base, merged, ["one", None, "one", None])


@pytest.mark.parametrize("endings", [lora.ALL, ("up_proj",), ("gate_proj", "down_proj")], ids=str)
def test_gates_that_are_built_into_the_product(endings: tuple[str, ...], tmp_path: Path) -> None:
    """As they are where gate and up are a multiple of 32 wide."""
    base, merged, own = (zoo.tiny_model("llama", intermediate_size=64) for _ in range(3))
    folder = lora.save_adapter(tmp_path / "a", base, endings=endings, rank=6)
    lora.merge(merged, folder)
    with LLM(own, device="cpu", **zoo.with_defaults({"pack_weights": True})) as llm:
        llm.load_adapter("one", folder)
        _check(llm, base, merged, ["one", None, "one", None])


@pytest.mark.parametrize("kind", ["gptq", "awq"])
@pytest.mark.parametrize("act_order", [False, True])
def test_over_4_bits(kind: str, act_order: bool, tmp_path: Path, llama_folder: Path) -> None:
    if act_order and kind == "awq":
        pytest.skip("AWQ sorts no columns")
    four_bits, dense = quantized.quantize_folder(
        llama_folder, tmp_path, kind, act_order=act_order, symmetric=kind != "awq"
    )
    base, merged = (
        AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval() for _ in range(2)
    )
    folder = lora.save_adapter(tmp_path / "a", base, rank=6)
    lora.merge(merged, folder)
    with LLM(four_bits, device="cpu", dtype="float32", **zoo.with_defaults({})) as llm:
        llm.load_adapter("one", folder)
        _check(llm, base, merged, ["one", None, "one", None])


@pytest.mark.parametrize("packs", [False, True], ids=["as it is", "packed"])
def test_scores_in_bfloat16(packs: bool, tmp_path: Path) -> None:
    plain, exact = (zoo.tiny_model("llama", dtype=d) for d in (torch.bfloat16, torch.float32))
    folder = lora.save_adapter(tmp_path / "a", exact, rank=6, gain=0.7)
    for model in (plain, exact):
        lora.merge(model, folder)
    prompts = zoo.random_prompts(_LENGTHS)
    options = zoo.with_defaults({"pack_weights": packs})
    with LLM(zoo.tiny_model("llama", dtype=torch.bfloat16), device="cpu", **options) as llm:
        llm.load_adapter("one", folder)
        outs = llm.generate(prompts, zoo.greedy(_COUNT, logprobs=0), adapter="one")
    zoo.check_scores(prompts, outs, plain, exact)


def test_the_bases_bits_do_not_depend_on_adapters_beside_it(tmp_path: Path) -> None:
    """Nor an adapter's own on who else is in the batch."""
    model = zoo.tiny_model("llama", dtype=torch.bfloat16, intermediate_size=128)
    folder = lora.save_adapter(tmp_path / "a", model)
    (prompt, *others), names = zoo.random_prompts([9, 30, 14, 22]), ["one", None, "one"]
    options = zoo.with_defaults({"repeatable": True, "prefix_reuse": False})
    with LLM(model, device="cpu", **options) as llm:
        llm.load_adapter("one", folder)
        for name in (None, "one"):
            params = zoo.greedy(_COUNT, logprobs=3)
            (alone,) = llm.generate([prompt], params, adapter=name)
            together = llm.generate([prompt, *others], params, adapter=[name, *names])
            assert together[0].outputs[0].logprobs == alone.outputs[0].logprobs


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    model = zoo.tiny_model("qwen3_moe")
    folder = lora.save_adapter(tmp_path / "a", model, endings=("q_proj",))
    lora.change(
        folder, {"base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight": (8, 32)}
    )
    refused = pytest.raises(BadAdapter, match=r"mlp\.experts\.0\.up_proj, an expert of a mixture")
    with LLM(model, device="cpu", **zoo.with_defaults({})) as llm, refused:
        llm.load_adapter("one", folder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("way", ["unmerged", "peft merged", "peft unmerged"])
def test_tokens_are_those_of_the_adapted_model(way: str, tmp_path: Path) -> None:
    base, adapted = zoo.tiny_model("llama"), zoo.tiny_model("llama")
    folder = lora.save_adapter(tmp_path / "a", base, rank=16, gain=0.7)
    if way == "unmerged":
        lora.adapt(adapted, folder)
    else:
        peft = pytest.importorskip("peft", reason="compared with PEFT itself: pip install peft")
        wrapped = peft.PeftModel.from_pretrained(adapted, str(folder))
        adapted = wrapped.merge_and_unload() if way == "peft merged" else wrapped
    with LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({})) as llm:
        llm.load_adapter("one", folder)
        _check(llm, base, adapted, ["one", None, "one", None])
