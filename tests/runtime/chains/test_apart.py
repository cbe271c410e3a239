"""Nothing of one model is seen under another, but where it is the same."""

import random
from pathlib import Path
from typing import Any

import chains
import lora
import migrating
import pytest
import zoo
from rerun import record_by_rerun
from vkv import LLM, SamplingParams
from vkv.allocator.transfer import kv_dir
from vkv.runtime.blocks.zoo import BlockZoo
from vkv.runtime.request.spec import AdapterKey, ChainKey, RequestSpec
from vkv.vmem.errors import UnknownModel, UsageError

_PROMPT = zoo.random_prompts([48])[0]
_NAMES = [chains.BASE, *chains.LLAMA]
# Those of a line have equal blocks up to the last layer's attention.
_KINDS = (("base", "head"), ("middle", "kin"), ("early",), ("words",))


def _llm(tenants: BlockZoo, **options: Any) -> LLM:
    return LLM(tenants, model=chains.BASE, **zoo.with_defaults(options))


def _ask(llm: LLM, name: str, alone: chains.Alone, prompt: Any = None) -> int:
    """Checks the tokens; returns how many of the prompt's were found."""
    (out,) = llm.generate([_PROMPT if prompt is None else prompt], zoo.greedy(12), model=name)
    chains.check_alone([out], [name], alone)
    return out.num_cached_tokens or 0


def test_equal_prompts_share_keys_where_these_are_equal(
    tenants: BlockZoo, alone: chains.Alone
) -> None:
    for order in (_KINDS, tuple(kind[::-1] for kind in _KINDS[::-1])):
        with _llm(tenants) as llm:
            for kind in order:
                found = [_ask(llm, name, alone) for name in kind]
                assert found[0] == 0, kind
                assert all(found[1:]), kind


def test_equal_prompts_at_once(tenants: BlockZoo, alone: chains.Alone) -> None:
    """A running request gives its beginning to others: of its own kind alone."""
    with _llm(tenants, max_seqs=12) as llm:
        names = _NAMES * 2
        outs = llm.generate([_PROMPT] * len(names), zoo.greedy(12), model=names)
        chains.check_alone(outs, names, alone)


def test_salts_and_names_that_look_like_another(tenants: BlockZoo, alone: chains.Alone) -> None:
    with _llm(tenants) as llm:
        _ask(llm, "early", alone)
        (key,) = [voice.key for voice in llm.engine.extras.voices.values() if _is(voice, "early")]
        spec = RequestSpec(request_id="", prompt_token_ids=[1], params=SamplingParams(), chain=key)
        for salt in (spec.kv_variant, key.kv, key.digest, "early"):
            salted = {"prompt_token_ids": _PROMPT, "cache_salt": salt}
            assert _ask(llm, chains.BASE, alone, salted) == 0
        salted = {"prompt_token_ids": _PROMPT, "cache_salt": "x"}
        assert _ask(llm, "early", alone, salted) == 0
        assert _ask(llm, "early", alone, salted) > 0


def _is(voice: Any, name: str) -> bool:
    return voice is not None and voice.key.name == name


def test_variants_are_never_the_same() -> None:
    chain = [None, ChainKey("a", "1", "11"), ChainKey("a", "2", "22")]
    adapter = [None, AdapterKey("a", "1"), AdapterKey("11", "1")]
    salts = ["", "x", "\x1f", "\x1fN", "\x1fC11\x1f", "\x1fA1\x1fa\x1f"]
    found = {
        RequestSpec(
            request_id="", prompt_token_ids=[1], params=SamplingParams(), variant=salt, **who
        ).kv_variant
        for who in ([{"chain": one} for one in chain] + [{"adapter": one} for one in adapter[1:]])
        for salt in salts
    }
    assert len(found) == 5 * len(salts)
    same = ChainKey("head", "3", "")  # as the engine's own
    spec = RequestSpec(request_id="", prompt_token_ids=[1], params=SamplingParams(), chain=same)
    assert spec.kv_variant == ""


def test_files_and_swapped_memory_are_for_one_kind(
    tenants: BlockZoo, alone: chains.Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_dir, "_LEAST_TOKENS", 20)
    with _llm(tenants, kv_dir=tmp_path) as llm:
        _ask(llm, "middle", alone)
    with _llm(tenants, kv_dir=tmp_path) as llm:
        assert [_ask(llm, name, alone) for name in (chains.BASE, "early")] == [0, 0]
        assert _ask(llm, "kin", alone) > 0
    with _llm(tenants) as llm:
        llm.save_session(tmp_path / "one.kv", _PROMPT, model="early")
    with _llm(tenants) as llm:
        assert llm.open_session(tmp_path / "one.kv").is_usable
        assert [_ask(llm, name, alone) for name in (chains.BASE, "words")] == [0, 0]
        assert _ask(llm, "early", alone) > 0
    with _llm(tenants, swap_memory="8MiB", max_parked=1) as llm:
        for name in ("early", "middle", chains.BASE, "words", "early", "kin", "head"):
            _ask(llm, name, alone)


# -- moves ---------------------------------------------------------------------------------------


def _specs(rig: migrating.Rig, count: int = 12) -> list[RequestSpec]:
    prompts = zoo.random_prompts([33, 20, 47, 9] * 3)
    voices = list(next(iter(rig.loops.values())).engine.extras.voices.values())
    return [
        RequestSpec(
            request_id=str(i),
            prompt_token_ids=prompts[0] if i % 2 else prompts[i],
            params=SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
            chain=(voice := voices[i % len(voices)]) and voice.key,
            seed=i,
        )
        for i in range(count)
    ]


def _check(rig: migrating.Rig, specs: list[RequestSpec], alone: chains.Alone) -> None:
    for spec in specs:
        stream = rig.streams[spec.request_id, 0]
        assert stream.error is None, stream.error
        name = chains.BASE if spec.chain is None else spec.chain.name
        assert stream.token_ids == alone.tokens(name, spec.prompt_token_ids, 20), name


def test_moves_at_random_steps_keep_models(tenants: BlockZoo, alone: chains.Alone) -> None:
    draw, source = random.Random(0), tenants.chain(chains.BASE).folder
    with migrating.rig(source, 3, models=tuple(chains.LLAMA)) as rig:  # type: ignore[arg-type]
        specs = _specs(rig)
        rig.add(specs)
        while rig.unfinished:
            rig.move_some(draw, 0.3)
            rig.turn()
        rig.finish()
        assert rig.migrations.arbiter.counts.moved >= 8
        _check(rig, specs, alone)


def test_an_engine_without_the_model_refuses_and_it_goes_on(
    tenants: BlockZoo, alone: chains.Alone
) -> None:
    source = tenants.chain(chains.BASE).folder
    few = {1: {"models": ("head",)}}
    with migrating.rig(source, 2, each=few, models=tuple(chains.LLAMA)) as rig:  # type: ignore[arg-type]
        specs = [one for one in _specs(rig) if one.chain and one.chain.name in ("early", "kin")]
        for spec in specs:
            rig.streams[spec.request_id, 0] = migrating.Stream()
            rig.migrations.add(spec, "a")
        rig.turn()
        for spec in specs:
            rig.migrations.migrate((spec.request_id, 0), "b")
        rig.finish()
        assert rig.migrations.arbiter.counts.moved == 0
        _check(rig, specs, alone)


def test_another_model_of_the_name_is_refused(tenants: BlockZoo) -> None:
    with _llm(tenants) as llm:
        params = SamplingParams(max_tokens=1)
        key = ChainKey("early", "0", "0")
        spec = RequestSpec(request_id="1", prompt_token_ids=[1], params=params, chain=key)
        with pytest.raises(UnknownModel, match="another here"):
            llm.engine.add(spec)


# -- beside adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_padded", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_adapters_of_the_first_model_take_turns_with_others(
    tenants: BlockZoo,
    family: dict[str, Path],
    alone: chains.Alone,
    tmp_path: Path,
    flash_standin: str,
    is_padded: bool,
) -> None:
    """A GPU replays decodes in few sizes. Padding is the first model's own, and there may be no
    place to spare for it, where it would write its keys and values over those of a request."""
    base = chains.reference(family[chains.BASE])
    adapter = lora.save_adapter(tmp_path / "a", base, seed=3)
    prompts = zoo.random_prompts([17, 9, 30, 12, 7, 8, 21])
    names = [chains.BASE, "kin", None, "early", None, "head", "words"]
    adapters = [None, None, "a", None, "a", None, None]
    with _llm(tenants, attention=flash_standin if is_padded else "auto") as llm:
        llm.load_adapter("a", adapter)
        if is_padded:
            record_by_rerun(llm)
        outs = llm.generate(prompts, zoo.greedy(24), model=names, adapter=adapters)
        with pytest.raises(UsageError, match="leave one of them out"):
            llm.generate([[1]], model="kin", adapter="a")
    merged = chains.reference(family[chains.BASE])
    lora.merge(merged, adapter)
    for prompt, name, one, out in zip(prompts, names, adapters, outs, strict=True):
        if one is None:
            chains.check_alone([out], [name or chains.BASE], alone)
        else:
            expected = zoo.generate_alone(merged, prompt, 24)
            assert list(out.outputs[0].token_ids) == expected
