"""Masks of grammars over some rows of a batch, on a CPU and as on other devices."""

import math
from typing import Any

import pytest
import torch
import vocabularies
from grammar_walks import Walker, allowed
from vkv import SamplingParams, StructuredOutputsParams
from vkv.runtime.execution import logit_masks
from vkv.runtime.execution.logit_masks import mask_logits
from vkv.runtime.execution.sampler import sample
from vkv.runtime.request.sampling_state import SamplingState

_VOCAB_SIZE = 519  # no whole number of words


@pytest.fixture(scope="module")
def walker() -> Walker:
    return Walker.of(vocabularies.byte_level(), [1, 2], _VOCAB_SIZE)


def _state(walker: Walker, outputs: dict[str, Any] | None, **options: Any) -> SamplingState:
    if outputs is None:
        return SamplingState(SamplingParams(**options))
    structured = StructuredOutputsParams(**outputs)
    params = SamplingParams(structured_outputs=structured, **options)
    return SamplingState(params, grammar=walker.grammars.start(structured))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ready", [True, False])
def test_masks_are_those_of_the_rows(
    walker: Walker, monkeypatch: pytest.MonkeyPatch, ready: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(logit_masks, "is_ready", lambda device: ready)
    states = [
        _state(walker, None),
        _state(walker, {"regex": "[a-z]+"}),
        _state(walker, None, allowed_token_ids=[7]),
        _state(walker, {"choice": ["yes", "no"]}, allowed_token_ids=range(300)),
    ]
    logits = torch.randn(len(states), _VOCAB_SIZE).to(dtype)
    before = logits.clone()
    masked = mask_logits(logits, states)
    assert torch.equal(logits, before)
    expected = logits.clone()
    for row, state in enumerate(states):
        keep = set(range(_VOCAB_SIZE)) if state.grammar is None else set(allowed(state.grammar))
        keep &= set(state.params.allowed_token_ids or range(_VOCAB_SIZE))
        expected[row, [i for i in range(_VOCAB_SIZE) if i not in keep]] = -math.inf
    assert torch.equal(masked.to(dtype), expected)


def test_a_broken_row_fails_and_no_other(walker: Walker) -> None:
    states = [_state(walker, {"regex": "[a-z]+"}, seed=1), _state(walker, {"regex": "[0-9]"})]
    logits = torch.randn(2, _VOCAB_SIZE)
    logits[0, 5] = math.nan
    broken, whole = sample(logits, states)
    assert not broken.is_finite
    assert whole.is_finite
    assert states[0].num_output_tokens == 0
    assert states[1].is_complete


def test_without_grammars_nothing_is_copied(walker: Walker) -> None:
    logits = torch.randn(2, _VOCAB_SIZE)
    assert mask_logits(logits, [_state(walker, None)] * 2) is logits
    assert not _state(walker, None).looks_back
    assert _state(walker, {"regex": "a"}).looks_back
