"""Adapters come, go and give way; and no key or value of one is seen under another."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import borrowing
import lora
import pytest
import torch
import zoo
from vkv import LLM, AsyncLLM, MemoryLimit, SamplingParams
from vkv.allocator.transfer import kv_dir
from vkv.runtime.adapters import products
from vkv.runtime.engine.memory.extra_weights import ExtraWeights, Lacking
from vkv.runtime.engine.memory.segments import segment_server
from vkv.runtime.request.request import Batch
from vkv.runtime.request.spec import AdapterKey, RequestSpec
from vkv.vmem.errors import (
    BadAdapter,
    InvalidSamplingParams,
    OutOfPages,
    StepFailed,
    UnknownAdapter,
    UsageError,
    VkvError,
)

_PROMPT = zoo.random_prompts([48])[0]
_NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home, model = tmp_path_factory.mktemp("adapters"), zoo.tiny_model("llama")
    return {
        name: lora.save_adapter(home / name, model, seed=i, rank=16)
        for i, name in enumerate(_NAMES)
    }


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str | None, list[int]]:
    """Sixteen tokens after the prompt, by adapter."""
    found: dict[str | None, list[int]] = {}
    for name in (None, *_NAMES):
        model = zoo.tiny_model("llama")
        if name is not None:
            lora.merge(model, folders[name])
        found[name] = zoo.generate_alone(model, _PROMPT, 16)
    assert len({tuple(tokens) for tokens in found.values()}) == 5
    return found


def _llm(folders: dict[str, Path], **options: Any) -> LLM:
    llm = LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults(options))
    for name, folder in folders.items():
        llm.load_adapter(name, folder)
    return llm


@pytest.fixture
def llm(folders: dict[str, Path]) -> Iterator[LLM]:
    with _llm(folders) as llm:
        yield llm
        llm.engine.cache.check_invariants()


def _ask(llm: LLM, adapter: str | None, prompt: Any = None) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt's were found."""
    given = _PROMPT if prompt is None else prompt
    (out,) = llm.generate([given], zoo.greedy(16), adapter=adapter)
    assert out.error is None, out.error
    return list(out.outputs[0].token_ids), out.num_cached_tokens or 0


def _taken(llm: LLM) -> int:
    limit = llm.engine.cache.pool.shared_limit
    assert limit is not None
    return limit.taken_bytes


# -- nothing is shared ---------------------------------------------------------------------------


def test_equal_prompts_share_no_prefix_across_adapters(
    llm: LLM, expected: dict[str | None, list[int]]
) -> None:
    for name in (None, *_NAMES):
        assert _ask(llm, name) == (expected[name], 0)
    for name in (None, *_NAMES):
        tokens, num_cached = _ask(llm, name)
        assert tokens == expected[name]
        assert num_cached > 0


def test_equal_prompts_at_once_share_no_prefix(
    llm: LLM, expected: dict[str | None, list[int]]
) -> None:
    names = [None, *_NAMES] * 2
    first = llm.generate([_PROMPT], zoo.greedy(1), adapter="b")[0]
    assert first.error is None
    outs = llm.generate([_PROMPT] * len(names), zoo.greedy(16), adapter=names)
    for name, out in zip(names, outs, strict=True):
        assert list(out.outputs[0].token_ids) == expected[name]


def test_a_salt_that_looks_like_an_adapter_finds_nothing(
    llm: LLM, expected: dict[str | None, list[int]]
) -> None:
    _ask(llm, "a")
    (known,) = [one for one in llm.stats().adapters if one.name == "a"]
    key = AdapterKey(known.name, known.digest)
    spec = RequestSpec(request_id="", prompt_token_ids=[1], params=SamplingParams(), adapter=key)
    for salt in (spec.kv_variant, key.digest, "a"):
        prompt = {"prompt_token_ids": _PROMPT, "cache_salt": salt}
        assert _ask(llm, None, prompt) == (expected[None], 0)
    salted = {"prompt_token_ids": _PROMPT, "cache_salt": "x"}
    assert _ask(llm, "a", salted) == (expected["a"], 0)
    assert _ask(llm, "a", salted)[1] > 0


def test_variants_are_never_the_same() -> None:
    keys = [None, AdapterKey("a", "1"), AdapterKey("a", "2"), AdapterKey("b", "1")]
    salts = ["", "x", "\x1f", "\x1fN", "\x1fA1\x1fa\x1f", "\x1fNx"]
    found = {
        RequestSpec(
            request_id="", prompt_token_ids=[1], params=SamplingParams(), variant=salt, adapter=key
        ).kv_variant
        for key in keys
        for salt in salts
    }
    assert len(found) == len(keys) * len(salts)


def test_files_are_for_one_adapter(
    folders: dict[str, Path],
    expected: dict[str | None, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_dir, "_LEAST_TOKENS", 20)
    with _llm(folders, kv_dir=tmp_path) as llm:
        _ask(llm, "a")
    with _llm(folders, kv_dir=tmp_path) as llm:
        assert _ask(llm, "b") == (expected["b"], 0)
        assert _ask(llm, None) == (expected[None], 0)
        tokens, num_cached = _ask(llm, "a")
        assert tokens == expected["a"]
        assert num_cached > 0


def test_sessions_are_for_one_adapter(
    folders: dict[str, Path], expected: dict[str | None, list[int]], tmp_path: Path
) -> None:
    with _llm(folders) as llm:
        llm.save_session(tmp_path / "one.kv", _PROMPT, adapter="a")
    with _llm(folders) as llm:
        assert llm.open_session(tmp_path / "one.kv").is_usable
        assert _ask(llm, None) == (expected[None], 0)
        assert _ask(llm, "b") == (expected["b"], 0)
        assert _ask(llm, "a")[1] > 0


def test_swapped_memory_is_for_one_adapter(
    folders: dict[str, Path], expected: dict[str | None, list[int]]
) -> None:
    with _llm(folders, swap_memory="8MiB", max_parked=1) as llm:
        for name in ("a", "b", None, "c", "a", "b", None):
            assert _ask(llm, name)[0] == expected[name]


def test_another_adapter_of_the_same_name_finds_nothing(
    llm: LLM, folders: dict[str, Path], expected: dict[str | None, list[int]]
) -> None:
    _ask(llm, "a")
    with pytest.raises(UsageError, match="another adapter has the name 'a'"):
        llm.load_adapter("a", folders["b"])
    llm.load_adapter("a", folders["a"])  # which is harmless
    llm.unload_adapter("a")
    llm.load_adapter("a", folders["b"])
    assert _ask(llm, "a") == (expected["b"], 0)


# -- coming and going ----------------------------------------------------------------------------


def test_an_adapter_in_use_stays_until_its_requests_end(
    llm: LLM, expected: dict[str | None, list[int]]
) -> None:
    stream = llm.stream(_PROMPT, zoo.greedy(16), adapter="a")
    tokens = list(next(stream).token_ids)
    llm.unload_adapter("a")
    with pytest.raises(UnknownAdapter, match=r"no adapter 'a' \(there are b, c, d\)"):
        llm.generate([_PROMPT], adapter="a")
    (leaving,) = [one for one in llm.stats().adapters if one.is_leaving]
    assert (leaving.name, leaving.num_requests, leaving.is_here) == ("a", 1, True)
    for delta in stream:
        tokens += delta.token_ids
    assert tokens == expected["a"]
    assert "a" not in {one.name for one in llm.stats().adapters}


def test_unknown_names_are_refused(llm: LLM) -> None:
    with pytest.raises(UnknownAdapter, match=r"no adapter 'z' \(there are a, b, c, d\).*load_ad"):
        llm.generate([_PROMPT], adapter="z")
    with pytest.raises(UnknownAdapter, match="no adapter 'z'"):
        llm.unload_adapter("z")
    with pytest.raises(InvalidSamplingParams, match="2 adapters for 1 prompts"):
        llm.generate([_PROMPT], adapter=["a", "b"])
    with _llm({}) as bare, pytest.raises(UnknownAdapter, match="none is loaded"):
        bare.generate([_PROMPT], adapter="a")


def test_adapters_of_the_config(
    folders: dict[str, Path], expected: dict[str | None, list[int]]
) -> None:
    options = zoo.with_defaults({"adapters": folders})
    with LLM(zoo.tiny_model("llama"), device="cpu", **options) as llm:
        assert _ask(llm, "c")[0] == expected["c"]
    model = zoo.tiny_model("llama")
    with pytest.raises(BadAdapter, match="no folder"):
        LLM(model, device="cpu", **zoo.with_defaults({"adapters": {"a": "/none"}}))


def test_a_callers_model_is_left_as_it_was(folders: dict[str, Path]) -> None:
    model = zoo.tiny_model("llama")
    before = zoo.full_logits(model, _PROMPT)
    with LLM(model, device="cpu", **zoo.with_defaults({})) as llm:
        llm.load_adapter("a", folders["a"])
        _ask(llm, "a")
    model.set_attn_implementation("eager")
    assert torch.equal(zoo.full_logits(model, _PROMPT), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_asyncio(folders: dict[str, Path], expected: dict[str | None, list[int]]) -> None:
    async def ask(llm: AsyncLLM, name: str | None) -> list[int]:
        tokens: list[int] = []
        async for out in llm.generate(_PROMPT, zoo.greedy(16), adapter=name):
            tokens = list(out.outputs[0].token_ids)
        return tokens

    async def main() -> None:
        options = zoo.with_defaults({})
        async with AsyncLLM(zoo.tiny_model("llama"), device="cpu", **options) as llm:
            for name in ("a", "b"):
                await llm.load_adapter(name, folders[name])
            names = ["a", None, "b", "a"]
            found = await asyncio.gather(*(ask(llm, name) for name in names))
            assert found == [expected[name] for name in names]
            await llm.unload_adapter("a")
            with pytest.raises(UnknownAdapter):
                await ask(llm, "a")

    asyncio.run(main())


def test_a_changed_model_is_adapted_anew(llm: LLM, folders: dict[str, Path]) -> None:
    _ask(llm, "a")
    model, merged = llm.loaded.model, zoo.tiny_model("llama")
    for one in (model, merged):
        layer: Any = one.get_submodule("model.layers.0.mlp")
        with torch.no_grad():
            layer.down_proj = torch.nn.Linear(48, 32, bias=False)
            layer.down_proj.weight.copy_(torch.linspace(-1, 1, 48 * 32).view(32, 48))
    lora.merge(merged, folders["a"])
    assert _ask(llm, "a") == (zoo.generate_alone(merged, _PROMPT, 16), 0)
    layer = model.get_submodule("model.layers.0.mlp")
    with torch.no_grad():
        layer.down_proj.weight.mul_(0.5)  # seen, and the adapters stay
    assert _ask(llm, "b")[1] == 0


# -- memory --------------------------------------------------------------------------------------


def _adapter_bytes(folders: dict[str, Path]) -> int:
    with _llm({"a": folders["a"]}) as llm:
        return llm.stats().adapters[0].num_bytes


def test_memory_counts_under_the_limit_and_goes_back(
    llm: LLM, expected: dict[str | None, list[int]]
) -> None:
    assert _taken(llm) == 0
    assert not any(one.is_here for one in llm.stats().adapters)  # until they are needed
    _ask(llm, "a")
    num_bytes = llm.stats().adapters[0].num_bytes
    pages = llm.stats().kv.physical_bytes
    assert _taken(llm) == num_bytes + pages
    assert [one.is_here for one in llm.stats().adapters] == [True, False, False, False]
    llm.trim()
    assert _taken(llm) == llm.stats().kv.physical_bytes == 0
    assert _ask(llm, "a")[0] == expected["a"]
    llm.unload_adapter("a")
    assert _taken(llm) == llm.stats().kv.physical_bytes


def test_adapters_used_longest_ago_give_way(
    folders: dict[str, Path], expected: dict[str | None, list[int]]
) -> None:
    limit = 2 * _adapter_bytes(folders) + (40 << 10)
    with _llm(folders, kv_memory=limit) as llm:
        for name in ("a", "b", "c", "a", "d", "d", "b"):
            assert _ask(llm, name)[0] == expected[name]
            here = {one.name for one in llm.stats().adapters if one.is_here}
            assert name in here
            assert len(here) <= 2
            assert _taken(llm) <= limit


def test_a_batch_of_more_adapters_than_fit_takes_turns(
    folders: dict[str, Path], expected: dict[str | None, list[int]]
) -> None:
    limit = 2 * _adapter_bytes(folders) + (50 << 10)
    with _llm(folders, kv_memory=limit, overlap=False) as llm:
        names = [*_NAMES, None, *_NAMES]
        outs = llm.generate([_PROMPT] * len(names), zoo.greedy(16), adapter=names)
        for name, out in zip(names, outs, strict=True):
            assert out.error is None, out.error
            assert list(out.outputs[0].token_ids) == expected[name]
        zoo.assert_idle(llm)
        assert _taken(llm) <= limit


def test_parked_memory_gives_way_to_an_adapter(
    folders: dict[str, Path], expected: dict[str | None, list[int]]
) -> None:
    limit = _adapter_bytes(folders) + (200 << 10)
    with _llm(folders, kv_memory=limit, max_seqs=4) as llm:
        for prompt in zoo.random_prompts([200] * 4, seed=3):
            _ask(llm, None, prompt)
        parked = llm.stats().pages_parked
        assert _ask(llm, "a")[0] == expected["a"]
        assert llm.stats().pages_parked < parked


def test_caches_under_one_limit_have_idle_adapters_give_way(
    folders: dict[str, Path], expected: dict[str | None, list[int]]
) -> None:
    limit = MemoryLimit(_adapter_bytes(folders) + (48 << 10))
    with _llm(folders, kv_memory=limit) as one, _llm({}, kv_memory=limit) as other:
        assert _ask(one, "a")[0] == expected["a"]
        for prompt in zoo.random_prompts([220] * 3, seed=4):
            _ask(other, None, prompt)
        assert limit.taken_bytes <= limit.num_bytes
        assert not one.stats().adapters[0].is_here
        assert _ask(one, "a")[0] == expected["a"]


def test_lent_memory_gives_way_to_an_adapter(tmp_path: Path) -> None:
    """Which lasts longer than a shortage may: who has lent it has time to take it away."""
    model = borrowing.model()
    folder = lora.save_adapter(tmp_path / "a", model)
    with borrowing.make(model, kv_memory=borrowing.POOL, shortage_wait_s=0.1) as llm:
        llm.load_adapter("a", folder)
        server = segment_server(llm.loaded, llm.engine)
        assert server is not None
        cache = llm.engine.cache
        slot = cache.open()
        cache.grow(slot, 64 * 32)  # all but a page
        server.lend(slot, 0, 64 * 32)
        cache.close(slot)
        (out,) = llm.generate([[1, 2, 3]], zoo.greedy(4), adapter="a")
        assert out.error is None
        assert not server.loans
        assert server.num_called_back == 1
        server.close()


class _Lacking(ExtraWeights):
    """Weights of some requests that there is no memory for yet."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def provide(self, batch: Batch) -> tuple[Batch, Lacking]:
        items = [item for item in batch.items if item.request.key[0] not in self.names]
        gone = [item.request for item in batch.items if item.request.key[0] in self.names]
        return Batch(tuple(items)), [(one, OutOfPages("no memory")) for one in gone]


@pytest.mark.parametrize("overlap", [False, True])
def test_nobody_is_let_in_before_one_that_lacks_its_weights(overlap: bool) -> None:
    with _llm({}, overlap=overlap, max_seqs=3) as llm:
        engine = llm.engine
        engine.extras = lacking = _Lacking({"lacks"})
        specs = (
            RequestSpec(request_id=name, prompt_token_ids=[1, 2], params=zoo.greedy(30))
            for name in ("lacks", "has", "comes")
        )
        (request,), (neighbour,) = engine.add(next(specs)), engine.add(next(specs))
        for _ in range(20):
            engine.step()
        (newcomer,) = engine.add(next(specs))
        while not neighbour.is_finished:
            engine.step()
            assert newcomer.slot is None
        assert request.num_output_tokens == 0
        engine.step()
        assert newcomer.slot is None
        assert engine.scheduler.shortage is not None
        assert engine.scheduler.shortage[0] is request
        lacking.names.clear()
        while engine.has_work:
            engine.step()
        assert len(request.output_token_ids) == len(newcomer.output_token_ids) == 30


def test_who_lacks_its_weights_and_goes_holds_nobody_back() -> None:
    with _llm({}, max_seqs=3) as llm:
        engine = llm.engine
        engine.extras = _Lacking({"lacks"})
        for name in ("lacks", "comes"):
            spec = RequestSpec(request_id=name, prompt_token_ids=[1, 2], params=zoo.greedy(3))
            (request,) = engine.add(spec)
            for _ in range(20 if name == "lacks" else 1):
                engine.step()
        assert request.slot is None
        engine.abort("lacks")
        engine.step()
        assert request.slot is not None
        while engine.has_work:
            engine.step()


def test_an_adapter_that_never_fits_is_refused(folders: dict[str, Path]) -> None:
    refused = pytest.raises(BadAdapter, match="raise it")
    with _llm({}, kv_memory=_adapter_bytes(folders) - 1, max_len=32) as llm, refused:
        llm.load_adapter("a", folders["a"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(12, "Cannot allocate memory"), OutOfPages),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfPages),
        (ZeroDivisionError("a mistake"), StepFailed),
    ],
    ids=repr,
)
def test_one_that_cannot_be_read_harms_nobody(
    error: Exception,
    told: type[VkvError],
    llm: LLM,
    expected: dict[str | None, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise error

    _ask(llm, "b")
    before = _taken(llm)
    monkeypatch.setattr(products, "empty_apart", fail)
    monkeypatch.setattr(llm.loop, "_shortage_wait_s", 0.05)
    outs = llm.generate([_PROMPT] * 3, zoo.greedy(16), adapter=["b", "a", None])
    assert [out.error is None for out in outs] == [True, False, True]
    assert type(outs[1].error) is told
    assert list(outs[0].outputs[0].token_ids) == expected["b"]
    assert list(outs[2].outputs[0].token_ids) == expected[None]
    llm.trim()
    monkeypatch.undo()
    assert _taken(llm) <= before
    assert _ask(llm, "a")[0] == expected["a"]


def test_a_folder_is_found_wherever_the_process_goes(
    llm: LLM,
    folders: dict[str, Path],
    expected: dict[str | None, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = folders["a"].parent
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    llm.unload_adapter("a")
    llm.unload_adapter("b")
    llm.load_adapter("a", "a")
    llm.load_adapter("b", "~/b")
    monkeypatch.chdir(tmp_path)
    assert [_ask(llm, name)[0] for name in ("a", "b")] == [expected["a"], expected["b"]]


def test_one_that_lacks_memory_for_long_fails_alone(folders: dict[str, Path]) -> None:
    limit = MemoryLimit(_adapter_bytes(folders) + (64 << 10))
    with _llm(folders, kv_memory=limit, shortage_wait_s=0.05, max_len=64) as llm:
        assert limit.take(64 << 10)  # by a neighbour that gives nothing up
        (out,) = llm.generate([[1, 2, 3]], zoo.greedy(4), adapter="a")
        assert isinstance(out.error, OutOfPages)
        limit.take(-(64 << 10))
        (out,) = llm.generate([[1, 2, 3]], zoo.greedy(4), adapter="a")
        assert out.error is None
        zoo.assert_idle(llm)
