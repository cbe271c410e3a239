"""Requests longer than the pool: their first tokens lie in the tier, and the tokens are the same."""

from collections.abc import Sequence
from typing import Any

import moved
import pytest
import zoo
from transformers import PreTrainedModel
from vkv import LLM
from vkv.runtime.request.spec import RequestSpec

_PAGE_BYTES = 8192  # of a layer's 32 tokens of the tiny llama
_POOL = 2 * (2048 * 256 + 2 * _PAGE_BYTES)  # both layers of 2048 tokens, about
_TIER = 16 << 20
_LONGEST = 12288


def _model(name: str = "llama", **changes: Any) -> PreTrainedModel:
    return zoo.tiny_model(name, max_position_embeddings=_LONGEST, **changes)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return _model()


def _specs(lengths: Sequence[int], **options: Any) -> list[RequestSpec]:
    return moved.specs(zoo.random_prompts(lengths), **options)


def _options(**options: Any) -> dict[str, Any]:
    return {"max_len": _LONGEST, "page_bytes": _PAGE_BYTES, "max_seqs": 8, **options}


def run(
    model: PreTrainedModel, specs: Sequence[RequestSpec], **options: Any
) -> tuple[dict[tuple[str, int], list[int]], Any]:
    """Tokens of all requests, run together, and the engine's stats."""
    with LLM(model, device="cpu", **zoo.with_defaults(_options(**options))) as llm:
        engine = llm.engine
        requests = [request for spec in specs for request in engine.add(spec)]
        while engine.has_work:
            engine.step()
            assert engine.scheduler.shortage is None, engine.scheduler.shortage
        failures = [output for output in engine.take_outputs() if output.failure is not None]
        assert not failures, failures
        stats = engine.stats()
        engine.cache.check_invariants()
        if engine.scheduler.tiers.swapping is not None:
            engine.scheduler.tiers.swapping.tier.far.check_invariants()
        return {r.key: r.output_token_ids for r in requests}, stats


def test_four_times_the_pool_and_its_neighbours(llama: PreTrainedModel) -> None:
    specs = _specs([8200, 30, 700, 5, 260], max_tokens=40)
    expected, _ = run(llama, specs)
    tokens, stats = run(llama, specs, kv_memory=_POOL, swap_memory=_TIER)
    assert tokens == expected
    assert stats.segments.moved.num_tokens >= 8200 - 1024 - 512
    assert stats.kv.pages_limit * stats.page_bytes * 4 <= 8200 * 2 * 256 + 4 * _PAGE_BYTES * 4
