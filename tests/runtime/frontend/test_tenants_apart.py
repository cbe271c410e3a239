"""Nobody is given, finds or could see what is another tenant's; `tests/attacks/tenants.py` is the
long form."""

import logging
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
import zoo
from vkv import LLM, SamplingParams
from vkv.allocator.transfer import kv_dir
from vkv.runtime.request.request import Request
from vkv.runtime.request.sampling_state import SamplingState
from vkv.runtime.request.spec import AdapterKey, RequestSpec
from vkv.runtime.speculation import PromptLookup


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return planted.save_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def alone(adapters: dict[str, Path]) -> planted.Alone:
    return planted.Alone(adapters)


def _llm(adapters: dict[str, Path] | None = None, **options: Any) -> LLM:
    options = zoo.with_defaults({"max_seqs": 8, **options})
    return LLM(zoo.tiny_model("llama"), device="cpu", adapters=adapters, **options)


_LITTLE = {"kv_memory": "192KiB", "max_parked": 3}


@pytest.mark.parametrize(
    "options",
    [
        {},
        _LITTLE,
        {**_LITTLE, "swap_memory": "8MiB"},
        {**_LITTLE, "movable": True, "overlap": True},
        {"speculative": "ngram", "kv": "paged", "attention": "paged_sdpa"},
    ],
    ids=["as it is", "little memory", "host memory", "movable", "paged"],
)
def test_equal_prompts_of_several_tenants(
    adapters: dict[str, Path], alone: planted.Alone, options: dict[str, Any]
) -> None:
    with _llm(adapters, **options) as llm:
        found = planted.run(llm, alone, count=60)
        assert found.num_found > 0
        assert found.num_foreign_rows == 0
        if options is _LITTLE:
            assert llm.stats().num_preemptions > 0


def test_without_clearing_others_rows_show(adapters: dict[str, Path], alone: planted.Alone) -> None:
    """The test above can fail: this is what it looks for."""
    with _llm(adapters, **_LITTLE, sanitize="never") as llm:
        assert planted.run(llm, alone, count=60).num_foreign_rows > 0


def test_files_are_their_tenants(
    adapters: dict[str, Path],
    alone: planted.Alone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second engine finds what the first saved, each tenant its own."""
    monkeypatch.setattr(kv_dir, "_LEAST_TOKENS", 20)
    prompt = zoo.random_prompts([64], seed=1)[0]
    saved = [planted.Tenant(salt="ann"), planted.Tenant(adapter="french")]
    with _llm(adapters, kv_dir=tmp_path) as llm:
        for tenant in saved:
            _ask(llm, tenant, prompt)
    with _llm(adapters, kv_dir=tmp_path) as llm:
        for tenant in planted.TENANTS:
            tokens, num_found = _ask(llm, tenant, prompt)
            assert tokens == alone.tokens(tenant.adapter, prompt, 4)
            own = planted.Tenant(tenant.salt, tenant.adapter)
            assert (num_found > 0) == (own in saved), tenant
            if tenant.name:
                llm.trim()
            saved.append(own)


def _ask(llm: LLM, tenant: planted.Tenant, prompt: list[int]) -> tuple[list[int], int]:
    given: Any = {"prompt_token_ids": prompt, "cache_salt": tenant.salt or None}
    (out,) = llm.generate([given], zoo.greedy(4), adapter=tenant.adapter, tenant=tenant.name)
    assert out.error is None, out.error
    return list(out.outputs[0].token_ids), out.num_cached_tokens or 0


def test_one_tenant_clears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes of its memory: recycled, taken over, preempted."""
    with _llm(kv_memory="160KiB", max_parked=3) as llm:
        backing: Any = llm.engine.cache._backing
        cleared: list[Any] = []
        for name in ("_clear_pages", "_clear_behind"):
            clear = getattr(backing, name)
            monkeypatch.setattr(
                backing, name, lambda *a, clear=clear: (cleared.append(a), clear(*a))
            )
        prompts = zoo.random_prompts([70, 12, 44, 60, 25, 80, 33, 51] * 2)
        llm.generate(prompts, zoo.greedy(40))
        assert llm.stats().num_preemptions > 0
        assert not cleared
        llm.generate(prompts[:4], zoo.greedy(4), tenant="another")
        assert cleared


def test_guesses_are_made_of_a_requests_own_tokens() -> None:
    """What one tenant's text said again and again, another's is not guessed to say."""
    stem = zoo.random_prompts([12], seed=5)[0]
    params, lookup = zoo.greedy(8), PromptLookup()
    says, begins = (
        Request(
            RequestSpec(request_id=name, prompt_token_ids=tokens, params=params, variant=name),
            max_tokens=8,
            sampling=SamplingState(params, tokens),
        )
        for name, tokens in (("ann", stem * 4), ("bob", stem))
    )
    for _ in range(2):
        drafts = lookup.draft({says: 4, begins: 4})
        assert (drafts[says], drafts[begins]) == (stem[:4], [])


def test_owners_are_never_the_same() -> None:
    keys = [None, AdapterKey("a", "1"), AdapterKey("a", "2")]
    texts = ["", "x", "y", "\x1f", "\x1fNx"]
    owners = {
        RequestSpec(
            request_id="",
            prompt_token_ids=[1],
            params=SamplingParams(),
            variant=salt,
            tenant=tenant,
            adapter=key,
        ).owner
        for key in keys
        for salt in texts
        for tenant in texts
    }
    assert len(owners) == len(keys) * len(texts) ** 2


def test_no_log_line_and_no_error_has_anothers_text(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong beside it, and to itself."""
    caplog.set_level(logging.DEBUG)
    secret = "xylophones at midnight"
    with LLM(device="cpu", max_seqs=4, max_len=256) as llm:
        tokens = [str(token) for token in llm.generate([secret])[0].prompt_token_ids or ()]
        run = llm.engine.runner.launch

        def fails(*args: Any, **options: Any) -> Any:
            raise RuntimeError("the device is gone")

        asked: list[Any] = [secret, "hello", secret * 60, {"prompt_token_ids": [10**6]}]
        outs = [llm.generate([one], SamplingParams(max_tokens=4))[0] for one in asked[:2]]
        for one in asked[2:]:
            with pytest.raises(ValueError, match=r"max_len|token id") as refused:
                llm.generate([one])
            assert secret not in str(refused.value)
        monkeypatch.setattr(llm.engine.runner, "launch", fails)
        outs += llm.generate([secret, "hello"])
        assert all(out.error is not None for out in outs[2:])
        monkeypatch.setattr(llm.engine.runner, "launch", run)
        outs += llm.generate(["hello"])
        assert outs[-1].error is None
    said = caplog.text + "".join(str(out.error) for out in outs if out.error)
    assert "the device is gone" in said
    assert secret not in said
    assert ", ".join(tokens) not in said


def test_memory_that_was_parked_before_a_second_tenant_came_is_cleared() -> None:
    prompt, other = zoo.random_prompts([200, 20])
    with _llm(max_parked=1, kv_memory="160KiB", max_seqs=2) as llm:
        llm.generate([prompt], zoo.greedy(4))
        stream = llm.stream({"prompt_token_ids": other, "cache_salt": "bob"}, zoo.greedy(8))
        next(stream)
        (request,) = llm.engine.scheduler.running
        slot, cache = request.slot, llm.engine.cache
        assert slot is not None
        backed = cache.geometry.tokens_backed([len(pages) for pages in slot.pages])
        behind = cache.layer(1)[0][slot.index, slot.num_tokens + 1 : backed]
        assert len(behind) > 0
        assert not torch.any(behind)
        stream.close()
