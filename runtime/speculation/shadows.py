"""Requests that go ahead of others, by another model: what they say is a guess of what those will.

A shadow draws with the randomness of its request, and under its parameters, penalties, bars and
grammar. So where the other model is as sure of a token as the one that verifies, both draw it.

Source: arXiv:1611.01144 for the noise that both add; the same for both couples them.
"""

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from ..execution.model_runner import ModelRunner
from ..request.request import Batch, Request, ScheduledRequest


def shadow_of(request: Request) -> Request:
    """A request that asks for the same tokens, of whatever model guesses them, and nothing else."""
    params = request.params
    if params.logprobs is not None or params.prompt_logprobs is not None:
        params = replace(params, logprobs=None, prompt_logprobs=None)
    return Request(
        msgspec.structs.replace(request.spec, params=params, adapter=None, chain=None),
        max_tokens=request.max_tokens,
        sampling=request.sampling.fork(params),
        index=request.key[1],
    )


def go_ahead(
    runner: ModelRunner, counts: Mapping[Request, int], wanted: Mapping[Request, int]
) -> dict[Request, list[int]]:
    """What shadows say next: so many tokens at most as are `wanted` of each.

    First they compute `counts` tokens; one that has more is not asked for any. Their slots are
    backed for all of it. One that would end says no more; its end is not among the tokens.
    """
    items = [ScheduledRequest(shadow, count) for shadow, count in counts.items()]
    said: dict[Request, list[int]] = {shadow: [] for shadow in wanted}
    while items:
        launched = runner.launch(Batch(tuple(items)))
        for item in items:
            item.request.num_computed += item.num_tokens
        items = []
        for shadow, (token, *_) in zip(launched.requests, launched.wait(), strict=True):
            state = shadow.sampling
            if shadow not in wanted or not token.is_finite or state.may_stop_at(token.token_id):
                continue
            shadow.token_ids.append(token.token_id)
            said[shadow].append(token.token_id)
            if len(said[shadow]) < wanted[shadow] and not state.is_complete:
                items.append(ScheduledRequest(shadow, 1))
    return said
