"""Blocks come when they are needed, give way where memory is short, and go."""

import asyncio
import gc
import json
import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import chains
import pytest
import torch
import zoo
from vkv import LLM, AsyncLLM, MemoryLimit, SamplingParams, StructuredOutputsParams
from vkv.runtime.blocks.zoo import BlockZoo
from vkv.runtime.chains import copies
from vkv.runtime.model.extras.overlays import overlays_of
from vkv.runtime.request.spec import RequestSpec
from vkv.vmem.errors import (
    BadCheckpoint,
    ChainMismatch,
    InvalidConfig,
    InvalidSamplingParams,
    OutOfPages,
    UnknownModel,
)

_PROMPT = zoo.random_prompts([24])[0]


def _llm(tenants: BlockZoo, **options: Any) -> LLM:
    return LLM(tenants, model=chains.BASE, **zoo.with_defaults(options))


def _ask(llm: LLM, *names: str) -> list[Any]:
    return llm.generate([_PROMPT] * len(names), zoo.greedy(8), model=list(names))


def _taken(llm: LLM) -> int:
    limit = llm.engine.cache.pool.shared_limit
    assert limit is not None
    return limit.taken_bytes


def test_equal_blocks_are_one_object(tenants: BlockZoo, alone: chains.Alone) -> None:
    with _llm(tenants) as llm:
        before = _taken(llm)
        assert not any(block.num_bytes for block in llm.stats().blocks)
        for names in (["middle"], ["kin"], ["head", "early", "words"]):
            chains.check_alone(_ask(llm, *names), names, alone)
        stats = llm.stats()
        assert all(one.is_here for one in stats.models)
        kept = sum(block.num_bytes for block in stats.blocks)
        assert kept < sum(one.own_bytes for one in stats.models)
        parked = stats.pages_held * stats.page_bytes
        assert _taken(llm) == before + kept + parked
        assert llm.trim() >= kept
        assert _taken(llm) == before
        chains.check_alone(_ask(llm, "kin"), ["kin"], alone)
        llm.sleep()
        assert _taken(llm) == before
        llm.wake()
        chains.check_alone(_ask(llm, "kin"), ["kin"], alone)


def test_the_model_is_left_as_it_was(tenants: BlockZoo) -> None:
    limit = MemoryLimit("8MiB")
    llm = _llm(tenants, kv_memory=limit)
    model = llm.loaded.model
    _ask(llm, *chains.LLAMA)
    assert any(True for module in model.modules() for _ in overlays_of(module))
    llm.close()
    assert not any(True for module in model.modules() for _ in overlays_of(module))
    assert limit.taken_bytes == 0
    llm.close()


def test_models_that_do_not_fit_together_take_turns(tenants: BlockZoo, alone: chains.Alone) -> None:
    """Blocks of one go for those of another; recordings with them do not survive them."""
    with _llm(tenants) as llm:
        _ask(llm, *chains.LLAMA)
        largest = max(one.own_bytes for one in llm.stats().models)
    names = ["kin", "early", "words", chains.BASE, "kin", "head"]
    with _llm(tenants, kv_memory=largest + 80_000, max_parked=1, max_seqs=8) as llm:
        for _ in range(2):
            chains.check_alone(_ask(llm, *names), names, alone)
        kept = sum(block.num_bytes for block in llm.stats().blocks)
        assert kept <= largest + 80_000
        assert not all(one.is_here for one in llm.stats().models)
        zoo.assert_idle(llm)


def test_recordings_go_with_the_blocks_that_they_read(
    tenants: BlockZoo, alone: chains.Alone
) -> None:
    names, prompts = ["kin", "early", "words", chains.BASE], zoo.random_prompts([4, 4, 4, 4])
    with _llm(tenants, max_parked=0) as llm:
        recordings = llm.engine.runner.recordings
        assert recordings is not None
        for _ in range(2):
            before = recordings.num_replays
            outs = llm.generate(prompts, zoo.greedy(16), model=names)
            chains.check_alone(outs, names, alone)
            assert recordings.num_replays > before + 4
            weights = _weights_beside(llm)
            assert weights
            llm.trim()
            gc.collect()
            assert not any(weight() is not None for weight in weights)
            assert not any(block.num_bytes for block in llm.stats().blocks)
            del outs
            junk = [torch.full((4096,), float("nan")) for _ in range(64)]  # where blocks were
            del junk


def _weights_beside(llm: LLM) -> list[weakref.ref[torch.Tensor]]:
    """Parameters of the blocks that are in memory for other models than the engine's own."""
    memory = llm.engine.extras._chains._memory  # type: ignore[union-attr]
    modules = [module for place in memory for module in memory[place].modules.values()]
    return [weakref.ref(one) for module in modules for one in module.parameters()]


def test_one_that_never_fits_fails_alone(tenants: BlockZoo, alone: chains.Alone) -> None:
    with _llm(tenants, kv_memory=50_000, max_parked=0) as llm:
        outs = _ask(llm, "kin", chains.BASE)
        assert isinstance(outs[0].error, InvalidConfig)
        assert "'kin' has 61" in str(outs[0].error)
        chains.check_alone(outs[1:], [chains.BASE], alone)
        zoo.assert_idle(llm)


def test_a_system_without_memory_harms_nobody_else(
    tenants: BlockZoo, alone: chains.Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("none left")

    with _llm(tenants, shortage_wait_s=0.0) as llm:
        before = _taken(llm)
        with monkeypatch.context() as patch:
            patch.setattr(copies, "read_block", fail)
            outs = _ask(llm, "early", chains.BASE)
        assert isinstance(outs[0].error, OutOfPages)
        chains.check_alone(outs[1:], [chains.BASE], alone)
        llm.trim()
        assert _taken(llm) == before
        chains.check_alone(_ask(llm, "early"), ["early"], alone)


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "damaged"])
def test_a_block_that_cannot_be_read_fails_its_models(
    tenants: BlockZoo, alone: chains.Alone, tmp_path: Path, is_gone: bool
) -> None:
    shutil.copytree(tenants.path, tmp_path / "zoo", symlinks=True)
    copied = BlockZoo(tmp_path / "zoo")
    with _llm(copied) as llm:
        block = next(one for one in llm.stats().blocks if "kin" in one.models)
        path = tmp_path / "zoo" / "blocks" / f"{block.digest}.safetensors"
        if is_gone:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:200])
        names = ["kin", "early", chains.BASE]
        outs = _ask(llm, *names)
        assert isinstance(outs[0].error, BadCheckpoint)
        assert path.name in str(outs[0].error)
        chains.check_alone(outs[1:], names[1:], alone)
        zoo.assert_idle(llm)


def test_a_changed_model_takes_no_more_for_the_others(
    tenants: BlockZoo, alone: chains.Alone
) -> None:
    with _llm(tenants) as llm:
        chains.check_alone(_ask(llm, "early"), ["early"], alone)
        norm: Any = llm.loaded.model.model.norm.weight  # type: ignore[union-attr]
        with torch.no_grad():
            norm.mul_(1.5)
        outs = _ask(llm, "early", chains.BASE)
        assert isinstance(outs[0].error, InvalidConfig)
        assert outs[1].error is None


# -- which there are -----------------------------------------------------------------------------


def test_names(tenants: BlockZoo, family: dict[str, Path]) -> None:
    with _llm(tenants) as llm:
        with pytest.raises(UnknownModel, match="'nobody' here; there are base, early, head"):
            llm.generate("", model="nobody")
        with pytest.raises(InvalidSamplingParams, match="2 models for 1 prompts"):
            llm.generate([[1]], model=["head", "kin"])
    few = LLM(tenants, model="early", models=["head"], **zoo.with_defaults({}))
    with few as llm, pytest.raises(UnknownModel, match="there are early, head"):
        llm.generate([[1]], model="kin")
    single = LLM(family["early"], **zoo.with_defaults({}))
    with single as llm, pytest.raises(UnknownModel, match="one, without a name"):
        llm.generate([[1]], model="early")
    with pytest.raises(InvalidConfig, match="is no model of a zoo"):
        LLM(family["early"], models=["head"])
    with pytest.raises(UnknownModel, match="has no model 'nobody'"):
        LLM(tenants, model=chains.BASE, models=["nobody"])


def test_models_that_cannot_run_together(
    family: dict[str, Path], alone: chains.Alone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = {name: family[name] for name in (chains.BASE, "early")}
    other = chains.save_family(tmp_path, "llama", {}, num_hidden_layers=3, rope_theta=77.0)
    tenants = chains.make_zoo(tmp_path, {**folders, "other": other[chains.BASE]})
    with caplog.at_level(logging.WARNING), _llm(tenants) as llm:
        assert llm.config.models == ("early",)
        assert "other is not served here" in caplog.text
        chains.check_alone(_ask(llm, "early"), ["early"], alone)
    with pytest.raises(ChainMismatch, match="rope"):
        _llm(tenants, models=["early", "other"])
    with LLM(tenants, model="other", **zoo.with_defaults({})) as llm:
        assert llm.config.models == ()


def test_each_model_ends_and_samples_as_it_says(family: dict[str, Path], tmp_path: Path) -> None:
    folders = {}
    for name, more in ((chains.BASE, {}), ("early", {"eos_token_id": 5, "max_new_tokens": 7})):
        folders[name] = shutil.copytree(family[name], tmp_path / name)
        (folders[name] / "generation_config.json").write_text(json.dumps(more))
    tenants = chains.make_zoo(tmp_path, folders)
    with _llm(tenants) as llm:
        early = llm.engine.extras.voices["early"]
        assert early is not None
        assert early.eos_token_ids == {5}
        outs = llm.generate([[1, 2, 3]] * 2, model=["early", chains.BASE])
        assert len(outs[0].outputs[0].token_ids) <= 7
        assert len(outs[1].outputs[0].token_ids) > 7
        (request,) = llm.engine.add(_spec(early.key))
        request.token_ids.append(5)
        assert llm.engine._ends(request.chain) == {5}
        llm.engine.abort(request.key[0])


def test_a_grammar_ends_as_its_model_does(family: dict[str, Path], tmp_path: Path) -> None:
    folders, ends = {}, {chains.BASE: 5, "early": 6}
    for name, end in ends.items():
        folders[name] = shutil.copytree(family[name], tmp_path / name)
        (folders[name] / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    names = [*ends, *ends]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=4,
            structured_outputs=StructuredOutputsParams(regex="[a-z]*"),
            logit_bias={end: 100},
        )
        for end in (5, 6, 6, 5)  # each one's own, and the other's
    ]
    with _llm(chains.make_zoo(tmp_path, folders), tokenizer=zoo.letter_tokenizer()) as llm:
        outs = [out.outputs[0] for out in llm.generate([_PROMPT] * 4, params, model=names)]
    assert [list(out.token_ids) for out in outs[:2]] == [[5], [6]]
    assert {out.finish_reason for out in outs[:2]} == {"stop"}
    assert all(len(out.token_ids) == 4 and out.text.islower() for out in outs[2:])


def _spec(key: Any) -> Any:
    return RequestSpec(
        request_id="x", prompt_token_ids=[1], params=SamplingParams(max_tokens=4), chain=key
    )


def test_asyncio(tenants: BlockZoo, alone: chains.Alone) -> None:
    names = [chains.BASE, "kin", "early"]

    async def last(llm: AsyncLLM, name: str) -> Any:
        async for out in llm.generate(_prompt(), zoo.greedy(8), model=name):
            found = out
        return found

    async def run() -> list[Any]:
        async with AsyncLLM(tenants, model=chains.BASE, **zoo.with_defaults({})) as llm:
            return await asyncio.gather(*(last(llm, name) for name in names))

    chains.check_alone(asyncio.run(run()), names, alone)


def _prompt() -> Any:
    return {"prompt_token_ids": _PROMPT}
