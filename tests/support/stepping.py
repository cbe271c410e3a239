"""A scheduler over slots of few pages, and steps without a model."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vkv import LayerGeometry, PagedKVCache, SamplingParams
from vkv.allocator import PagedLayout
from vkv.runtime.request.request import Request, RequestState, ScheduledRequest
from vkv.runtime.request.sampling_state import SamplingState
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.scheduling.policies import POLICIES
from vkv.runtime.scheduling.scheduler import Scheduler

BLOCK = 4  # tokens of a page, so that pages can be counted by hand


def make_scheduler(num_pages: int = 100, *, max_batch_tokens: int = 8, **options: Any) -> Scheduler:
    """A scheduler over a cache of `num_pages` pages of 4 tokens.

    `options`: `policy` by name, its `order`, and those of `Scheduler`.
    """
    geometry = LayerGeometry(num_kv_heads=1, key_dim=1, value_dim=1)
    layout = PagedLayout((geometry,), torch.float32, max_len=400, block_tokens=BLOCK)
    max_seqs = options.pop("max_seqs", 8)
    max_parked = options.pop("max_parked", max_seqs)
    cache = PagedKVCache(
        layout,
        num_pages * layout.page_bytes,
        num_slots=max_seqs + max_parked,
        max_parked=max_parked,
    )
    policy = POLICIES[options.pop("policy", "splitfuse")](options.pop("order", None))
    return Scheduler(cache, policy, max_seqs=max_seqs, max_batch_tokens=max_batch_tokens, **options)


_numbers = iter(range(10**9))


def make_request(
    prompt: int | Sequence[int],
    max_tokens: int = 8,
    *,
    leader: Request | None = None,
    waited_s: float = 0.0,
    **of_spec: Any,
) -> Request:
    """A request with a prompt of its own: `prompt` tokens that no other request has.

    It came `waited_s` ago.
    """
    first = next(_numbers) * 1000
    tokens = list(range(first, first + prompt)) if isinstance(prompt, int) else list(prompt)
    params = SamplingParams(max_tokens=max_tokens)
    spec = RequestSpec(request_id=str(first), prompt_token_ids=tokens, params=params, **of_spec)
    request = Request(
        spec,
        max_tokens=max_tokens,
        sampling=SamplingState(params, tokens),
        leader=leader.key if leader else None,
    )
    request.queued_time_s -= waited_s
    return request


def add(scheduler: Scheduler, *prompts: int, **options: Any) -> list[Request]:
    """Queue requests with prompts of so many tokens."""
    requests = [make_request(prompt, **options) for prompt in prompts]
    for request in requests:
        scheduler.add(request)
    return requests


def _complete(scheduler: Scheduler, items: Sequence[ScheduledRequest]) -> None:
    """What the engine does after the model: count, append, finish. Tokens are their position."""
    for item in items:
        request, samples = item.request, item.samples
        request.num_computed += item.num_tokens
        if samples:
            request.token_ids.append(request.num_tokens)
            scheduler.accounts.generated(request)
            if request.num_output_tokens == request.max_tokens:
                scheduler.finish(request)


def step(scheduler: Scheduler) -> list[tuple[Request, int]]:
    """One step, checked; returns who computed how many tokens."""
    batch = scheduler.schedule().items
    num_tokens = sum(item.num_tokens for item in batch)
    alone = scheduler.policy.name == "prefill_first" and len(batch) == 1
    assert 0 < num_tokens <= (scheduler.max_batch_tokens if not alone else num_tokens)
    assert len(scheduler.running) <= scheduler.max_seqs
    assert len({item.request for item in batch}) == len(batch)
    for item in batch:
        assert item.request.state is RequestState.RUNNING
        assert item.request.slot is not None
        assert item.request.slot.num_tokens >= item.start + item.num_tokens
        assert item.samples == (item.start + item.num_tokens == item.request.num_tokens)
    shares = [(item.request, item.num_tokens) for item in batch]
    _complete(scheduler, batch)
    scheduler.cache.check_invariants()
    return shares


def steps(scheduler: Scheduler) -> Iterator[list[tuple[Request, int]]]:
    """Steps until nothing is left to do."""
    while scheduler.has_work:
        yield step(scheduler)
