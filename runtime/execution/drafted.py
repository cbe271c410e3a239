"""Tokens behind a draft: those that would have come without it."""

from collections.abc import Sequence

import torch

from ..request.request import ScheduledRequest
from .sampler import SampledToken, sample
from .upload import select_rows


def sample_drafted(
    logits: torch.Tensor, firsts: Sequence[int], items: Sequence[ScheduledRequest]
) -> list[list[SampledToken]]:
    """The tokens of items of which `firsts` are the first rows to sample from: those that would
    have come without a draft, as far as the draft goes with them.

    Each is chosen from its own logits with its own random numbers, by a state that knows those
    before it, and the next row is looked at only if the draft has guessed it.
    """
    sampled: list[list[SampledToken]] = [[] for _ in items]
    going, step = list(range(len(items))), 0
    while going:
        states = [items[i].request.sampling for i in going]
        rows = select_rows(logits, [firsts[i] + step for i in going])
        for i, token in zip(going, sample(rows, states), strict=True):
            sampled[i].append(token)
        going = [i for i in going if _is_guessed(items[i], step, sampled[i][-1])]
        step += 1
    return sampled


def _is_guessed(item: ScheduledRequest, step: int, token: SampledToken) -> bool:
    """Whether what follows a sampled token was computed, and is to be sampled, too."""
    if step >= len(item.draft) or not token.is_finite or item.draft[step] != token.token_id:
        return False
    state = item.request.sampling
    return not state.is_complete and not state.may_stop_at(token.token_id)
