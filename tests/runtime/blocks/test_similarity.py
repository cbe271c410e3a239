"""Blocks are measured by what they compute, and stand in for others only where that is wanted."""

import logging
from pathlib import Path
from typing import Any

import fine_tunes
import pytest
import torch
import zoo as tiny
from vkv import LLM
from vkv.runtime.blocks import similarity
from vkv.runtime.blocks.chain import Chain
from vkv.runtime.blocks.similarity import Comparison, compare, load_plain, stand_ins
from vkv.runtime.blocks.zoo import BlockZoo
from vkv.vmem.errors import InvalidPrompt

_PROMPTS = tiny.random_prompts((9, 17, 30))


@pytest.fixture
def zoo(tmp_path: Path) -> BlockZoo:
    base = fine_tunes.save_model(tmp_path / "base")
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(base)
    return zoo


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe", "glm4"])
def test_blocks_are_as_alike_as_their_outputs(tmp_path: Path, model_type: str) -> None:
    base = fine_tunes.save_model(tmp_path / "base", model_type)
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(base)
    zoo.add(fine_tunes.save_tuned(base, tmp_path / "near", layers=[1], noise=0.01, only="mlp"))
    far = fine_tunes.save_tuned(
        base, tmp_path / "far", layers=[0], noise=9.0, only="attn", also="lm_head"
    )
    zoo.add(far)
    one = zoo.chain("base")
    near = compare(one, zoo.chain("near"), _PROMPTS)
    same = one.same_as(zoo.chain("near"))
    assert same.count(False) == 1
    for is_same, found in zip(same, near.blocks, strict=True):
        assert found is not None
        assert found.mean == found.lowest == 1.0 if is_same else 0.99 < found.mean < 1.0
        assert found.lowest <= found.mean
    assert 0.98 < near.vocabulary.mean < 1.0
    apart = compare(one, zoo.chain("far"), _PROMPTS)
    for block, found in zip(one.blocks, apart.blocks, strict=True):
        assert found is not None
        is_far = block.kind == "head" or (block.kind, block.layer) == ("attention", 0)
        assert (found.mean < 0.9) if is_far else (found.mean == 1.0), block.place
    assert apart.vocabulary.mean < 0.9


def test_a_block_is_measured_on_the_inputs_of_its_place(zoo: BlockZoo, tmp_path: Path) -> None:
    """By hand: layer 1's own part of the stream, with that one block exchanged."""
    own = fine_tunes.save_tuned(tmp_path / "base", tmp_path / "own", layers=[0, 1], noise=0.2)
    zoo.add(own)
    one, other = zoo.chain("base"), zoo.chain("own")
    found = dict(zip(one.places, compare(one, other, _PROMPTS[:1]).blocks, strict=True))
    mine, mixed, theirs = load_plain(one), load_plain(one), load_plain(other)
    mixed.model.layers[1].mlp = theirs.model.layers[1].mlp
    mixed.model.layers[1].post_attention_layernorm = theirs.model.layers[1].post_attention_layernorm
    seen: list[torch.Tensor] = []
    for model in (mine, mixed):
        model.model.layers[1].register_forward_hook(
            lambda _, args, out: seen.append((out[0] if isinstance(out, tuple) else out) - args[0])
        )
        with torch.no_grad():
            model(torch.tensor([_PROMPTS[0]]), use_cache=False)
    expected = torch.cosine_similarity(*seen, dim=-1)
    alike = found["feed_forward", 1, 0]
    assert alike is not None
    assert alike.mean == pytest.approx(expected.mean().item(), abs=1e-5)
    assert alike.lowest == pytest.approx(expected.min().item(), abs=1e-5)


def test_similar_blocks_stand_in_and_say_so(
    zoo: BlockZoo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = fine_tunes.save_tuned(tmp_path / "base", tmp_path / "near", layers=[1], noise=0.01)
    tensors = fine_tunes.load_file(own / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["lm_head.weight"])
    fine_tunes.save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    draft = zoo.draft(own)
    similar = stand_ins(zoo, draft, _PROMPTS, 0.98)
    assert [draft.blocks[index].place for index in sorted(similar.instead)] == [
        "attention of layer 1",
        "feed-forward of layer 1",
    ]
    assert similar.vocabulary is not None
    assert 0.9 < similar.vocabulary.mean < 1.0
    added = zoo.add(own, instead=similar.instead)
    assert added.num_new == 1, "the head"
    chain, base = zoo.chain("near"), zoo.chain("base")
    for index, block in enumerate(chain.blocks):
        if index in similar.instead:
            assert block.digest == base.blocks[index].digest
            assert block.approximated is not None
            assert block.approximated.of == "base"
            assert block.approximated.digest == draft.blocks[index].digest
            assert block.approximated.similarity == similar.instead[index].similarity >= 0.98
        else:
            assert block == draft.blocks[index]
    with (
        caplog.at_level(logging.WARNING, "vkv"),
        LLM(zoo, model="near", kv_memory="8MiB", max_len=64) as llm,
    ):
        assert llm.generate([[1, 2, 3]], tiny.greedy(3))[0].error is None
    assert "near is approximated: 2 of its 7 blocks" in caplog.text
    zoo.remove("base")
    assert zoo.verify() == [], "what near uses is still there"


def test_nothing_is_taken_for_equal_unless_asked(zoo: BlockZoo, tmp_path: Path) -> None:
    own = fine_tunes.save_tuned(tmp_path / "base", tmp_path / "near", layers=[1], noise=1e-4)
    assert stand_ins(zoo, zoo.draft(own), _PROMPTS, 1.0).instead == {}
    assert zoo.add(own).num_new == 2
    assert all(block.approximated is None for block in zoo.chain("near").blocks)
    with pytest.raises(InvalidPrompt):
        compare(zoo.chain("base"), zoo.chain("near"), [[1]])


def test_an_embedding_stands_in_only_if_all_rows_are_alike(zoo: BlockZoo, tmp_path: Path) -> None:
    own = fine_tunes.save_tuned(tmp_path / "base", tmp_path / "own", also="embed", noise=0.01)
    alike = stand_ins(zoo, zoo.draft(own), _PROMPTS, 0.98)
    assert list(alike.instead) == [0]
    tensors = fine_tunes.load_file(own / "model.safetensors")
    unseen = min(set(range(tiny.VOCAB_SIZE)) - {token for one in _PROMPTS for token in one})
    tensors["model.embed_tokens.weight"][unseen] *= -1
    fine_tunes.save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    assert stand_ins(zoo, zoo.draft(own), _PROMPTS, 0.98).instead == {}


def test_what_was_measured_is_not_measured_again(
    zoo: BlockZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(2):  # whose second layer is the base's
        folder = tmp_path / f"other-{index}"
        zoo.add(fine_tunes.save_tuned(tmp_path / "base", folder, layers=[0], seed=index))
    asked: list[str] = []

    def counted(one: Chain, other: Chain, *rest: Any, **options: Any) -> Comparison:
        asked.append(other.name)
        return compare(one, other, *rest, **options)

    monkeypatch.setattr(similarity, "compare", counted)
    own = fine_tunes.save_tuned(tmp_path / "base", tmp_path / "near", layers=[1], noise=0.01)
    assert len(stand_ins(zoo, zoo.draft(own), _PROMPTS, 0.98).instead) == 2
    assert asked == ["base"]
