"""Requests whose keys and values are moved away and back at random steps, and what they say."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import zoo
from transformers import PreTrainedModel
from vkv import LLM, SamplingParams
from vkv.runtime.engine.engine import Engine
from vkv.runtime.engine.stats import SwapStats
from vkv.runtime.request.spec import RequestSpec


@dataclass
class Outcome:
    """Tokens by request and output, and what was moved for them."""

    tokens: dict[tuple[str, int], list[int]]
    num_forced: int
    swap: SwapStats | None


def run(
    model: PreTrainedModel,
    specs: Sequence[RequestSpec],
    *,
    num_moves: int = 0,
    seed: int = 0,
    asynchronous: bool = True,
    device: str = "cpu",
    **options: Any,
) -> Outcome:
    """Run all requests together, of which some lose their slots until there were `num_moves`."""
    with LLM(model, device=device, **zoo.with_defaults(options)) as llm:
        engine = llm.engine
        if engine.scheduler.tiers.swapping is not None:
            engine.scheduler.tiers.swapping.always = True
            engine.scheduler.tiers.swapping.asynchronous = asynchronous
        requests = [request for spec in specs for request in engine.add(spec)]
        num_forced = _drive(engine, num_moves, random.Random(seed))
        swap = engine.stats().swap
        engine.cache.check_invariants()
        if engine.scheduler.tiers.swapping is not None:
            engine.scheduler.tiers.swapping.tier.far.check_invariants()
    failures = [output for output in engine.take_outputs() if output.failure is not None]
    assert not failures, failures
    return Outcome({r.key: r.output_token_ids for r in requests}, num_forced, swap)


def _drive(engine: Engine, num_moves: int, draw: random.Random) -> int:
    """Step to the end; before most steps some requests lose slots, and the cache what it parks.

    What is parked would be found without the tier, so it goes, more often than not.
    """
    num_forced = 0
    while engine.has_work:
        running = engine.scheduler.running
        count = draw.choice((0, 1, 2, 4)) if num_forced < num_moves else 0
        victims = draw.sample(running, min(count, len(running)))
        for request in victims:
            engine.scheduler.preempt(request)
        num_forced += len(victims)
        if victims and draw.random() < 0.7:
            if draw.random() < 0.5 and engine.scheduler.tiers.swapping is not None:
                engine.scheduler.tiers.swapping.wait()
            engine.cache.trim()
        engine.step()
        if draw.random() < 0.1:
            engine.cache.check_invariants()
    return num_forced


def specs(
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 24,
    mixed: bool = True,
    variants: Mapping[int, str] | None = None,
) -> list[RequestSpec]:
    """Greedy, seeded and penalised requests in turn; every fifth has two outputs."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9},
        {"temperature": 0, "frequency_penalty": 0.5, "logprobs": 1},
        {"temperature": 0.7, "seed": 9, "min_tokens": 5},
        {"temperature": 0.9, "seed": 3, "n": 2},
    ]
    return [
        RequestSpec(
            request_id=str(index),
            prompt_token_ids=list(prompt),
            params=SamplingParams(
                max_tokens=max_tokens,
                ignore_eos=True,
                **(kinds[index % len(kinds)] if mixed else kinds[0]),
            ),
            variant=(variants or {}).get(index, ""),
        )
        for index, prompt in enumerate(prompts)
    ]
