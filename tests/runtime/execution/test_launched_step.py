"""Draws behind a guess: they follow the model, not the guess."""

from dataclasses import replace

import pytest
import torch
from vkv import SamplingParams
from vkv.runtime.execution.launched_step import sample_drafted
from vkv.runtime.execution.sampler import choose
from vkv.runtime.request.request import Request, ScheduledRequest
from vkv.runtime.request.sampling_state import SamplingState
from vkv.runtime.request.spec import RequestSpec

_NUM_DRAWS = 100_000
_AT_ONCE = 2_000
_GUESS = 2  # of which the model thinks a third
_CHI_SQUARE_7 = 24.32  # exceeded once in a thousand times, with 7 degrees of freedom


def _items(first: int, params: SamplingParams) -> list[ScheduledRequest]:
    items = []
    for seed in range(first, first + _AT_ONCE):
        spec = RequestSpec(request_id=str(seed), prompt_token_ids=(0,), params=params, seed=seed)
        state = SamplingState(params, (0,), seed=seed)
        request = Request(spec, max_tokens=9, sampling=state)
        items.append(ScheduledRequest(request, 1, draft=(_GUESS,)))
    return items


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_both_tokens_follow_their_distributions(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    logits = torch.tensor([[0.3, 0.1, 1.5, -0.4, 0.9, 0.0, -1.0, 0.5], [0.0] * 6 + [1.0, 1.5]])
    counts = torch.zeros(2, 8, dtype=torch.float64)
    for first in range(0, _NUM_DRAWS, _AT_ONCE):
        items = _items(first, params)
        rows = range(0, 2 * _AT_ONCE, 2)
        for tokens in sample_drafted(logits.repeat(_AT_ONCE, 1), rows, items):
            assert (len(tokens) == 2) == (tokens[0].token_id == _GUESS)
            for place, token in enumerate(tokens):
                counts[place, token.token_id] += 1
    assert counts[0].sum() == _NUM_DRAWS
    assert counts[1].sum() == counts[0, _GUESS] > _NUM_DRAWS / 4
    for row, count in zip(logits.double(), counts, strict=True):
        expected = (row / temperature).softmax(0) * count.sum()
        assert ((count - expected) ** 2 / expected).sum() < _CHI_SQUARE_7


def test_guesses_by_the_same_chance_change_no_distribution_and_are_right_often() -> None:
    """A model that guesses adds the same noise to other logits, so its guess knows of the draw."""
    temperature = 0.8
    params = SamplingParams(temperature=temperature)
    logits = torch.tensor([[0.3, 0.1, 1.5, -0.4, 0.9, 0.0, -1.0, 0.5], [0.0] * 6 + [1.0, 1.5]])
    thought = torch.tensor([[0.5, -0.2, 1.1, -0.1, 0.6, 0.3, -1.3, 0.9]])
    counts = torch.zeros(2, 8, dtype=torch.float64)
    for first in range(0, _NUM_DRAWS, _AT_ONCE):
        items = _items(first, params)
        forks = [item.request.sampling.fork(params) for item in items]
        guesses = choose(thought.repeat(_AT_ONCE, 1), forks)[0].tolist()
        items = [replace(item, draft=(g,)) for item, g in zip(items, guesses, strict=True)]
        rows = range(0, 2 * _AT_ONCE, 2)
        for tokens in sample_drafted(logits.repeat(_AT_ONCE, 1), rows, items):
            for place, token in enumerate(tokens):
                counts[place, token.token_id] += 1
    draws, ideas = ((row / temperature).softmax(0) for row in (logits[0], thought[0]))
    most = torch.minimum(draws, ideas).sum()  # as often as two that know of each other can agree
    alone = (draws * ideas).sum()  # as often as they do by chance
    share = counts[1].sum() / _NUM_DRAWS
    assert alone + 0.75 * (most - alone) < share < most + 0.01
    for row, count in zip(logits.double(), counts, strict=True):
        expected = (row / temperature).softmax(0) * count.sum()
        assert ((count - expected) ** 2 / expected).sum() < _CHI_SQUARE_7
