"""Unmodified models over our slots say what `model.generate` says, token for token."""

from collections.abc import Iterator, Sequence

import pytest
import torch
import zoo
from vkv import LLM, SamplingParams
from vkv.runtime.engine import Engine
from vkv.runtime.request import Request

# Prompts far longer than a window, a page or a step's budget, and as short as they come.
PROMPT_LENGTHS = (3, 41, 18, 1, 75, 26)
OUTPUT_LENGTHS = (24, 9, 30, 17, 12, 21)
ARRIVAL_STEPS = (0, 0, 2, 5, 9, 14)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _run_staggered(
    engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[Request]:
    """Add each request at its own step, so that they join and leave a batch under way."""
    requests: list[Request] = []
    step = 0
    while len(requests) < len(prompts) or engine.has_work:
        while len(requests) < len(prompts) and ARRIVAL_STEPS[len(requests)] <= step:
            index = len(requests)
            requests += engine.add_request(str(index), prompts[index], params[index])
        engine.step()
        step += 1
    engine.cache.check_invariants()
    return requests


def _assert_same_tokens(
    model_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_batch_tokens: int = 11,
    **options: object,
) -> None:
    """Compare tokens with `model.generate`, and all scores with a plain forward."""
    reference = zoo.tiny_model(model_type)
    prompts = zoo.random_prompts(PROMPT_LENGTHS)
    greedy = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=zoo.VOCAB_SIZE)
        for n in OUTPUT_LENGTHS
    ]
    with LLM(
        zoo.tiny_model(model_type),
        device="cpu",
        max_batch_tokens=max_batch_tokens,
        max_seqs=4,
        **zoo.with_defaults(options),
    ) as llm:
        requests = _run_staggered(llm._engine, prompts, greedy)
    for prompt, request in zip(prompts, requests, strict=True):
        got = request.output_token_ids
        expected = zoo.generate_alone(reference, prompt, len(got))
        assert got == expected, zoo.explain_difference(reference, prompt, got, expected)
        scores = zoo.full_logits(reference, [*prompt, *got]).log_softmax(-1)
        torch.testing.assert_close(
            _scores(request), scores[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-4
        )


def _scores(request: Request) -> torch.Tensor:
    """All log probabilities of every step, [num_output_tokens, vocab]."""
    rows = [[table[i].logprob for i in range(zoo.VOCAB_SIZE)] for table in request.logprobs]
    return torch.tensor(rows)


@pytest.mark.parametrize("model_type", zoo.REQUIRED)
def test_tokens_and_scores_equal_plain_transformers(model_type: str) -> None:
    _assert_same_tokens(model_type)


@pytest.mark.parametrize("model_type", zoo.REQUIRED)
def test_the_paged_baseline_says_the_same(model_type: str) -> None:
    _assert_same_tokens(model_type, kv="paged", max_batch_tokens=32)
