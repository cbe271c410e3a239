"""Several models in one batch: each request has the tokens of its model run alone."""

from pathlib import Path
from typing import Any

import chains
import pytest
import torch
import zoo
from guessing import guess_restlessly
from vkv import LLM
from vkv.runtime.blocks.zoo import BlockZoo

_NAMES = [chains.BASE, *chains.LLAMA]
_TIED = {"head": ("model.norm",), "words": ("embed_tokens",), "early": ("layers.0.self_attn",)}
_SOME = {"early": ("layers.0.self_attn",), "late": ("layers.1.mlp", "lm_head")}
_GPT2 = {"early": ("h.0.attn",), "late": ("h.1.",), "words": ("wte",)}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
}
_FAMILIES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "tied": ("llama", _TIED, {"tie_word_embeddings": True}),
    "experts": ("mixtral", _SOME, {}),
    "shared experts": ("qwen2_moe", _SOME, _EXPERTS),
    "norms of heads": ("qwen3", _SOME, {}),
    "scaled words": ("gemma2", {**_SOME, "words": ("embed_tokens",)}, {}),
    "transposed": ("gpt2", _GPT2, {}),
    "parallel": ("gpt_neox", {"early": ("layers.0.attention",), "late": ("layers.1.",)}, {}),
    "gptq": ("llama", _SOME, {"int4": "gptq"}),
    "experts in 4 bits": ("mixtral", _SOME, {"int4": "compressed-tensors"}),
}


def _ask(llm: LLM, names: list[str], lengths: list[int], counts: list[int]) -> Any:
    prompts = zoo.random_prompts(lengths)
    return llm.generate(prompts, [zoo.greedy(count) for count in counts], model=names)


@pytest.mark.parametrize("records", [False, None], ids=["kernel by kernel", "recorded"])
def test_five_models_in_one_batch(
    tenants: BlockZoo, alone: chains.Alone, records: bool | None
) -> None:
    """Prompts come in chunks, with others' decodes between them; and again from recordings."""
    options = zoo.with_defaults(
        {"max_seqs": 12, "max_batch_tokens": 24, "record_decodes": records, "max_parked": 0}
    )
    names = _NAMES * 2
    lengths, counts = [5 + 7 * i for i in range(len(names))], [10 + i for i in range(len(names))]
    with LLM(tenants, model=chains.BASE, **options) as llm:
        for order in (names, names[::-1], names):
            chains.check_alone(_ask(llm, order, lengths, counts), order, alone)
            zoo.assert_idle(llm)
        for _ in range(2):  # of which most steps are alike
            outs = _ask(llm, _NAMES, [3] * len(_NAMES), [20] * len(_NAMES))
            chains.check_alone(outs, _NAMES, alone)
        stats = llm.stats()
        assert (stats.num_replays > 20) == (records is None)
        shared = {block.place: block for block in stats.blocks if len(block.models) > 1}
        assert shared.keys() == {"attention of layer 1", "feed-forward of layer 1", "head"}
        head = shared["head"]  # several models' rows in one call
        assert head.num_rows > 2 * head.num_calls
        llm.engine.cache.check_invariants()


@pytest.mark.parametrize("kind", _FAMILIES)
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    model_type, parts, changes = _FAMILIES[kind]
    family = chains.save_family(tmp_path, model_type, parts, **changes)
    tenants = chains.make_zoo(tmp_path, family)
    alone = chains.Alone(family)
    names = [*family] * 2
    with LLM(tenants, model=chains.BASE, **zoo.with_defaults({"max_batch_tokens": 24})) as llm:
        outs = _ask(llm, names, [5 + 9 * i for i in range(len(names))], [8] * len(names))
        tokens = chains.check_alone(outs, names, alone)
        assert len({tuple(some) for some in tokens}) == len(names)
    alone.close()


def test_equal_blocks_in_two_places_of_a_model(tmp_path: Path) -> None:
    """Of one kind, in no layer: embeddings of tokens and of positions that are the same."""
    changes = {"max_position_embeddings": zoo.VOCAB_SIZE}
    family = chains.save_family(tmp_path, "gpt2", {"twin": ()}, **changes)
    twin = zoo.tiny_model("gpt2", **changes)
    with torch.no_grad():
        numbers = torch.randn(twin.transformer.wte.weight.shape)
        for part in (twin.transformer.wte, twin.transformer.wpe):
            part.weight.copy_(numbers)
    twin.save_pretrained(family["twin"])
    options = {"max_len": 64}
    alone = chains.Alone(family, **options)
    with LLM(
        chains.make_zoo(tmp_path, family), model=chains.BASE, **zoo.with_defaults(options)
    ) as llm:
        names = ["twin", chains.BASE]
        chains.check_alone(_ask(llm, names, [9, 9], [8, 8]), names, alone)
    alone.close()


def test_any_model_may_be_the_engines_own(tenants: BlockZoo, alone: chains.Alone) -> None:
    with LLM(tenants.path, model="kin", **zoo.with_defaults({})) as llm:
        names = [*_NAMES]
        outs = _ask(llm, names, [11] * len(names), [8] * len(names))
        chains.check_alone(outs, names, alone)
        (out,) = llm.generate([[1, 2, 3]], zoo.greedy(8))
        chains.check_alone([out], ["kin"], alone)
        own = {one.name: one.own_bytes for one in llm.stats().models}
        assert own["middle"] < own[chains.BASE]  # which shares less with it
    with LLM(tenants, **zoo.with_defaults({})) as llm:
        assert llm.config.models
        assert len(llm.config.models) == 5


def test_repeatable_to_the_bit(tenants: BlockZoo, family: dict[str, Path]) -> None:
    """Scores of a model's rows do not depend on other models' beside them."""
    options = zoo.with_defaults({"repeatable": True, "dtype": "bfloat16", "max_batch_tokens": 24})
    prompts = zoo.random_prompts([30, 9, 30, 17])
    names = ["kin", chains.BASE, "head", "early"]
    params = zoo.greedy(12, logprobs=2)
    with LLM(tenants, model=chains.BASE, **options) as llm:
        together = llm.generate(prompts, params, model=names)
    for name, prompt, out in zip(names, prompts, together, strict=True):
        with LLM(family[name], **options) as llm:
            (expected,) = llm.generate([prompt], params)
        assert out.outputs[0].logprobs == expected.outputs[0].logprobs, name


def test_plain_modules_and_all_logits(tenants: BlockZoo, alone: chains.Alone) -> None:
    """Weights that are not packed, and prompts all of whose rows go through the head."""
    params = zoo.greedy(6, prompt_logprobs=1)
    prompts = zoo.random_prompts([9, 14, 5])
    names = [chains.BASE, "head", "kin"]
    with LLM(tenants, model=chains.BASE, **zoo.with_defaults({"pack_weights": False})) as llm:
        outs = llm.generate(prompts, params, model=names)
        chains.check_alone(outs, names, alone)
    for name, prompt, out in zip(names, prompts, outs, strict=True):
        model = chains.reference(alone.folder(name))
        scores = zoo.full_logits(model, prompt).log_softmax(-1)
        assert out.prompt_logprobs is not None
        first, *tables = out.prompt_logprobs
        assert first is None
        for position, (token, table) in enumerate(zip(prompt[1:], tables, strict=True)):
            assert table is not None
            found = torch.tensor(table[token].logprob)
            assert torch.isclose(found, scores[position, token], atol=1e-3)


def test_preempted_and_swapped_requests_keep_their_models(
    tenants: BlockZoo, alone: chains.Alone
) -> None:
    names = _NAMES + _NAMES[:3]
    for more in ({}, {"swap_memory": "8MiB"}):
        options = zoo.with_defaults({"max_seqs": 8, "kv_memory": "320KiB", "max_parked": 2, **more})
        with LLM(tenants, model=chains.BASE, **options) as llm:
            outs = _ask(llm, names, [40] * len(names), [60] * len(names))
            chains.check_alone(outs, names, alone)
            assert llm.stats().num_preemptions > 0
            llm.engine.cache.check_invariants()


def test_speculation_and_seeds(tenants: BlockZoo, family: dict[str, Path]) -> None:
    """Guessed tokens are verified by the model that they are guessed for, whoever guesses them."""
    repeating = [[3, 4, 5, 6] * 6, [7, 8, 9] * 7]
    names = ["kin", chains.BASE, "head", "early"]
    found = []
    for guesser in (None, "ngram", "surrogate", str(family[chains.BASE])):
        options = zoo.with_defaults({"speculative": guesser})
        with LLM(tenants, model=chains.BASE, **options) as llm:
            if guesser is not None:
                guess_restlessly(llm)
            outs = llm.generate(repeating * 2, zoo.greedy(20), model=names)
            found.append([list(out.outputs[0].token_ids) for out in outs])
            assert bool(llm.stats().num_accepted) == (guesser is not None)
    assert found == found[:1] * 4
