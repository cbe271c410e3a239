"""Sampling against slow, obvious references, and the refusals of impossible parameters."""

import copy
import dataclasses
import math
import pickle
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vkv.runtime.cpu_kernels import kernels as native_kernels
from vkv.runtime.execution.sampler import (
    SampledToken,
    SamplingState,
    choose,
    gumbel_noise,
    prompt_logprobs,
    sample,
)
from vkv.runtime.request.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from vkv.runtime.request.sampling_params import SamplingParams
from vkv.vmem.errors import InvalidSamplingParams

VOCAB = 24


def random_logits(rows: int = 1, vocab: int = VOCAB, *, seed: int = 0, scale: float = 2.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sample_one(logits: torch.Tensor, state: SamplingState) -> SampledToken:
    (token,) = sample(logits[None], [state])
    return token


def draw_many(logits: torch.Tensor, params: SamplingParams, num: int = 4000) -> Counter[int]:
    """How often each token comes in `num` independent draws: one step of `num` sequences."""
    states = [SamplingState(params, index=i) for i in range(num)]
    return Counter(token.token_id for token in sample(logits.expand(num, -1), states))


def reference_probabilities(logits: Sequence[float], params: SamplingParams) -> np.ndarray:
    """temperature, top_k, top_p, min_p, one after another, each renormalised, in float64."""
    scaled = np.asarray(logits, dtype=np.float64) / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    if params.top_k:
        probs[probs < np.sort(probs)[::-1][: params.top_k][-1]] = 0.0
        probs /= probs.sum()
    if params.top_p < 1:
        held = 0.0
        for token_id in np.argsort(-probs, kind="stable"):
            probability = probs[token_id]
            if held >= params.top_p:
                probs[token_id] = 0.0
            held += probability
        probs /= probs.sum()
    probs[probs < params.min_p * probs.max()] = 0.0
    return probs / probs.sum()


def assert_distributed(counts: Counter[int], probs: np.ndarray) -> None:
    """No token outside the support, and a chi-square no larger than four deviations allow."""
    support = [int(i) for i in np.argsort(-probs, kind="stable") if probs[i] > 0]
    assert set(counts) <= set(support)
    total = sum(counts.values())
    bins: list[list[int]] = [[]]
    for token_id in support:  # likeliest first; the rare ones share bins of five expected draws
        if total * sum(probs[i] for i in bins[-1]) >= 5:
            bins.append([])
        bins[-1].append(token_id)
    expected = np.array([total * sum(probs[i] for i in b) for b in bins])
    observed = np.array([sum(counts[i] for i in b) for b in bins])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = max(len(bins) - 1, 1)
    # Wilson and Hilferty's approximation of the chi-square quantile.
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic <= bound, (statistic, bound, observed, expected)


# --- distributions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.8},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.99, "min_p": 0.3},
        {"temperature": 1.5, "top_k": 10, "top_p": 0.7, "min_p": 0.1},
        {"temperature": 2.0, "top_k": 8, "top_p": 0.95},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_follow_the_reference(options: dict[str, float], dtype: torch.dtype) -> None:
    params = SamplingParams(seed=11, **options)
    logits = random_logits(seed=3)[0].to(dtype)
    probs = reference_probabilities(logits.float().tolist(), params)
    assert_distributed(draw_many(logits, params), probs)


def test_one_sequence_draws_independently_at_every_step() -> None:
    params = SamplingParams(seed=5, temperature=1.3)
    logits = random_logits(seed=8)[0]
    state = SamplingState(params)
    steps = [sample_one(logits, state).token_id for _ in range(2000)]
    probs = reference_probabilities(logits.tolist(), params)
    assert_distributed(Counter(steps), probs)
    # Neighbouring steps know nothing of each other: pairs are as likely as their product.
    pairs = Counter(a * VOCAB + b for a, b in zip(steps[::2], steps[1::2], strict=True))
    assert_distributed(pairs, np.outer(probs, probs).ravel())


@pytest.mark.parametrize("vary", ["seed", "index", "step"])
def test_keys_are_uniform_along_each_of_their_inputs(vary: str) -> None:
    numbers = []
    for i in range(4000):
        params = SamplingParams(seed=i if vary == "seed" else -2)
        state = SamplingState(params, index=i if vary == "index" else 0)
        state.num_output_tokens = i if vary == "step" else 0
        numbers.append(state.key())
    assert len(set(numbers)) == len(numbers)
    for shift in (0, 27, 59):
        bins = Counter(number >> shift & 31 for number in numbers)
        assert_distributed(bins, np.full(32, 1 / 32))


def test_noise_is_gumbels_and_independent_along_keys_and_tokens() -> None:
    keys = torch.tensor([SamplingState(SamplingParams(seed=i)).key() for i in range(400)])
    noise = gumbel_noise(keys, 500)
    share = torch.exp(-torch.exp(-noise.double()))  # its distribution function: uniform
    for values in (share.flatten(), share[:, 7], share[7]):
        bins = Counter((values * 20).int().tolist())
        assert_distributed(bins, np.full(20, 1 / 20))
    for near, far in ((share[:, :-1], share[:, 1:]), (share[:-1], share[1:])):
        correlation = torch.corrcoef(torch.stack([near.flatten(), far.flatten()]))[0, 1]
        assert abs(correlation) < 5 / near.numel() ** 0.5


@pytest.mark.skipif(not native_kernels.available(torch.float32), reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_draws_what_pytorch_would(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(600, 1000, generator=torch.Generator().manual_seed(4)).mul(3).to(dtype)
    logits[:, 5] = -math.inf
    options = [{}, {"temperature": 0.4}, {"min_p": 0.2}, {"top_k": 9, "temperature": 2}]
    params = [SamplingParams(seed=i, **options[i % 4]) for i in range(len(logits))]
    found = choose(logits, [SamplingState(p) for p in params])[0]
    monkeypatch.setattr(native_kernels, "available", lambda dtype: False)
    expected = choose(logits, [SamplingState(p) for p in params])[0]
    assert (found != expected).sum() <= 1, "a logarithm's last bit decides but the closest draws"


def test_a_rounding_changes_few_draws() -> None:
    exact = torch.randn(2000, 5000, generator=torch.Generator().manual_seed(4))
    states = [SamplingState(SamplingParams(seed=i)) for i in range(len(exact))]
    before = choose(exact, states)[0]
    after = choose(exact.to(torch.bfloat16).float(), states)[0]
    assert (before != after).float().mean() < 0.01


def test_top_p_is_the_same_whether_few_or_all_tokens_are_sorted() -> None:
    # The peaked row needs a handful of its tokens sorted; beside the flat one it gets them all.
    vocab = 3000
    peaked = random_logits(vocab=vocab, seed=1, scale=6.0)[0]
    flat = random_logits(vocab=vocab, seed=2, scale=0.1)[0]
    params = SamplingParams(seed=4, top_p=0.9)
    for logits in (peaked, flat):
        counts = draw_many(logits, params, num=300)
        assert_distributed(counts, reference_probabilities(logits.tolist(), params))
    alone = [sample_one(peaked, SamplingState(params, index=i)).token_id for i in range(30)]
    beside = [
        sample(
            torch.stack([peaked, flat, peaked]),
            [
                SamplingState(params, index=i),
                SamplingState(params),
                SamplingState(SamplingParams(seed=1, top_k=3)),
            ],
        )[0].token_id
        for i in range(30)
    ]
    assert alone == beside


def test_equal_logits_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([3.0, 2.0, 2.0, 1.0])
    for options in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}):
        assert set(draw_many(logits, SamplingParams(seed=1, **options), num=400)) == {0, 1, 2}


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((300,), -math.inf)
    logits[[1, 130, 299]] = torch.tensor([1.0, 2.0, 1.1])
    assert set(draw_many(logits, SamplingParams(seed=2), num=400)) == {1, 130, 299}


def test_a_tiny_temperature_overflows_nothing() -> None:
    logits = torch.tensor([3.0e35, 3.1e35, -3.0e35, -math.inf])
    params = SamplingParams(temperature=1e-4, seed=1, top_p=0.5)
    assert set(draw_many(logits, params, num=50)) == {1}


# --- greedy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_is_argmax_and_takes_the_first_of_equals(dtype: torch.dtype) -> None:
    logits = random_logits(rows=16, seed=6).to(dtype)
    logits[3] = 0.0
    logits[4, [7, 2, 11]] = 50.0
    states = [SamplingState(SamplingParams(temperature=0)) for _ in range(16)]
    chosen = [token.token_id for token in sample(logits, states)]
    assert chosen == logits.argmax(dim=-1).tolist()
    assert (chosen[3], chosen[4]) == (0, 2)


def test_greedy_rows_beside_random_ones_stay_greedy() -> None:
    logits = random_logits(rows=6, seed=2)
    params = [SamplingParams(temperature=t, seed=1) for t in (0, 1, 0, 5, 1e-6, 2)]
    chosen = [token.token_id for token in sample(logits, [SamplingState(p) for p in params])]
    best = logits.argmax(dim=-1).tolist()
    assert [chosen[i] for i in (0, 2, 4)] == [best[i] for i in (0, 2, 4)]


# --- repeatability ---------------------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {"seed": st.integers(-(2**63), 2**63 - 1)},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 4.0]),
        "top_k": st.integers(1, VOCAB + 2),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9), max_size=3),
        "min_tokens": st.integers(0, 4),
        "logprobs": st.integers(0, 4),
    },
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=6), st.integers(0, 2**32), st.randoms())
def test_a_row_is_the_same_alone_and_in_any_batch(
    rows: list[dict], seed: int, random_order: random.Random
) -> None:
    params = [SamplingParams(**options) for options in rows]
    alone = [SamplingState(p, [1, 2, 2], index=i, eos_token_ids=(0,)) for i, p in enumerate(params)]
    batched = [
        SamplingState(p, [1, 2, 2], index=i, eos_token_ids=(0,)) for i, p in enumerate(params)
    ]
    for step in range(4):
        logits = random_logits(rows=len(rows), seed=seed + step)
        order = list(range(len(rows)))
        random_order.shuffle(order)  # a batch's make-up changes from step to step
        together = sample(logits[order], [batched[i] for i in order])
        for row, token in zip(order, together, strict=True):
            lone = sample_one(logits[row], alone[row])
            assert lone.token_id == token.token_id
            assert (lone.logprobs is None) == (token.logprobs is None)
            if lone.logprobs is not None and token.logprobs is not None:
                own, other = (t[token.token_id].logprob for t in (lone.logprobs, token.logprobs))
                assert own == pytest.approx(other)


def test_seeds_and_indices_differ_and_no_seed_is_fresh_each_time() -> None:
    logits = torch.zeros(64)

    def tokens(params: SamplingParams, index: int = 0) -> list[int]:
        state = SamplingState(params, index=index)
        return [sample_one(logits, state).token_id for _ in range(12)]

    seeded = SamplingParams(seed=7, n=2)
    assert tokens(seeded) == tokens(seeded)
    assert tokens(seeded, 1) == tokens(seeded, 1)
    assert tokens(seeded) != tokens(seeded, 1)
    assert tokens(seeded) != tokens(SamplingParams(seed=8))
    assert tokens(seeded, 1) != tokens(SamplingParams(seed=8))
    assert tokens(SamplingParams()) != tokens(SamplingParams())


def test_the_callers_logits_and_random_state_are_left_alone() -> None:
    logits = random_logits(rows=2)
    before, generator = logits.clone(), torch.get_rng_state()
    params = SamplingParams(
        temperature=0.5, top_p=0.5, logit_bias={1: 5.0}, repetition_penalty=2.0, min_tokens=3
    )
    states = [SamplingState(params, [1], eos_token_ids=(0,)) for _ in range(2)]
    sample(logits, states)
    assert torch.equal(logits, before)
    assert torch.equal(torch.get_rng_state(), generator)


def test_inference_mode_may_come_and_go() -> None:
    state = SamplingState(SamplingParams(seed=1, presence_penalty=1.0), [1])
    with torch.inference_mode():
        logits = random_logits()
        sample(logits, [state])
    sample(logits, [state])
    with torch.inference_mode():
        sample(logits, [state])
    assert state.num_output_tokens == 3


def test_a_batch_of_none_is_none() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


# --- penalties, bias, min_tokens ---------------------------------------------------------------


@pytest.mark.parametrize("repetition", [1.0, 1.7, 0.6])
@pytest.mark.parametrize("presence", [0.0, 1.5, -0.5])
@pytest.mark.parametrize("frequency", [0.0, 0.9, -1.1])
def test_penalties_follow_their_formula(
    repetition: float, presence: float, frequency: float
) -> None:
    prompt = [2, 2, 5]
    params = SamplingParams(
        temperature=0,
        max_tokens=None,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias={4: 0.75},
    )
    state = SamplingState(params, prompt)
    bystander = SamplingState(SamplingParams(temperature=0))
    output: list[int] = []
    for step in range(12):
        logits = random_logits(vocab=8, seed=step, scale=1.0)[0]
        expected = logits.tolist()
        for token_id in range(8):
            if token_id in prompt or token_id in output:
                positive = expected[token_id] > 0
                expected[token_id] *= 1 / repetition if positive else repetition
            expected[token_id] -= frequency * output.count(token_id)
            expected[token_id] -= presence * (token_id in output)
        expected[4] += 0.75
        chosen, other = sample(logits.expand(2, -1), [state, bystander])
        assert chosen.token_id == int(np.argmax(expected)), step
        assert other.token_id == int(logits.argmax())
        output.append(chosen.token_id)


def test_a_bias_shifts_the_distribution_by_its_exponential() -> None:
    params = SamplingParams(seed=3, logit_bias={0: 2.0, 5: -100.0})
    logits = random_logits(seed=9, scale=1.0)[0]
    biased = logits.tolist()
    biased[0] += 2.0
    biased[5] -= 100.0
    counts = draw_many(logits, params)
    assert_distributed(counts, reference_probabilities(biased, SamplingParams()))
    assert counts[5] == 0


def test_min_tokens_bars_every_stop_token_and_then_lets_it_come() -> None:
    logits = torch.tensor([9.0, 8.0, 7.0, 6.0])
    params = SamplingParams(
        temperature=0, min_tokens=3, stop_token_ids=[1], logit_bias={0: 5.0}, ignore_eos=True
    )
    state = SamplingState(params, eos_token_ids=(0,))
    assert [sample_one(logits, state).token_id for _ in range(5)] == [2, 2, 2, 0, 0]


def test_tokens_beyond_the_logits_may_be_named() -> None:
    """Some models have more embeddings than logits: those beyond never come, barred or not."""
    params = SamplingParams(
        temperature=0, logit_bias={9: 50.0}, min_tokens=2, stop_token_ids=[7], ignore_eos=True,
        allowed_token_ids=[1, 2, 8],
    )  # fmt: skip
    state = SamplingState(params, bad_words=[[6], [1, 5]])
    assert sample_one(torch.tensor([9.0, 8.0, 7.0]), state).token_id == 1
    assert sample_one(torch.tensor([9.0, 8.0, 7.0]), state).token_id == 1


def test_tokens_beyond_the_logits_may_stand_in_a_prompt() -> None:
    """Those of images, for one: they have no score, and a penalty does not meet them."""
    logits = torch.tensor([9.0, 8.0, 7.0])
    state = SamplingState(SamplingParams(temperature=0, repetition_penalty=2.0), [0, 5, 3])
    assert sample_one(logits, state).token_id == 1
    first, second = prompt_logprobs(logits.expand(2, -1), torch.tensor([1, 5]), 1)
    assert list(first) == [1, 0]
    assert second[5] == Logprob(-math.inf, 4)
    assert second[0] == first[0]


# --- bars --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_only_allowed_tokens_come(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=2, allowed_token_ids=[3, 5, 8])
    logits = random_logits(seed=6)[0]
    counts = draw_many(logits, params, num=500)
    if temperature:
        masked = [x if i in (3, 5, 8) else -math.inf for i, x in enumerate(logits.tolist())]
        assert_distributed(counts, reference_probabilities(masked, SamplingParams()))
    else:
        assert set(counts) == {max((3, 5, 8), key=lambda i: logits[i])}


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4),
    allowed=st.none() | st.sets(st.integers(0, 3), min_size=1),
    seed=st.integers(0, 1000),
)
def test_no_bad_word_is_completed(
    words: list[list[int]], allowed: set[int] | None, seed: int
) -> None:
    """Against a search of the output, token by token; others of the batch are not touched."""
    state = SamplingState(SamplingParams(temperature=0, allowed_token_ids=allowed), bad_words=words)
    other = SamplingState(SamplingParams(temperature=0))
    output: list[int] = []
    for step in range(8):
        logits = random_logits(vocab=4, seed=8 * seed + step)[0]
        token, plain = sample(logits.expand(2, -1), [state, other])
        assert plain.token_id == int(logits.argmax())
        free = [
            i
            for i in (range(4) if allowed is None else allowed)
            if not any([*output, i][-len(word) :] == word for word in words)
        ]
        assert token.is_finite == bool(free)
        if not free:
            return
        assert token.token_id == max(free, key=lambda i: float(logits[i]))
        output.append(token.token_id)


def test_logits_and_log_probabilities_know_no_bars() -> None:
    logits = random_logits(rows=2, seed=4)
    before = logits.clone()
    params = SamplingParams(temperature=0, allowed_token_ids=[1], logprobs=2)
    token, _ = sample(logits, [SamplingState(params), SamplingState(SamplingParams())])
    assert torch.equal(logits, before)
    assert token.logprobs is not None
    assert token.logprobs[1].logprob == pytest.approx(float(logits[0].log_softmax(0)[1]), abs=1e-5)
    assert int(logits[0].argmax()) in token.logprobs


def test_only_bars_of_several_tokens_look_back() -> None:
    def looks_back(*words: list[int]) -> bool:
        return SamplingState(SamplingParams(allowed_token_ids=[1]), bad_words=words).looks_back

    assert not SamplingState(SamplingParams()).looks_back
    assert not looks_back([2])
    assert looks_back([2], [2, 3])


# --- log probabilities -------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(rows=3, seed=4).bfloat16()
    common = {"temperature": 0.3, "top_k": 4, "seed": 1, "logit_bias": {0: 30.0}}
    params = [SamplingParams(**common, logprobs=k) for k in (None, 0, 5)]
    plain, own_only, top = sample(logits, [SamplingState(p) for p in params])
    expected = logits.double().log_softmax(dim=-1)

    assert (plain.token_id, plain.logprobs) == (0, None)
    assert own_only.logprobs is not None
    assert list(own_only.logprobs) == [0]
    assert own_only.logprobs[0].logprob == pytest.approx(expected[1, 0].item(), abs=1e-5)

    assert top.logprobs is not None
    best = expected[2].argsort(descending=True, stable=True)[:5].tolist()
    assert list(top.logprobs) == [0, *(i for i in best if i != 0)]
    for token_id, entry in top.logprobs.items():
        assert entry.logprob == pytest.approx(expected[2, token_id].item(), abs=1e-5)
        assert entry.rank == 1 + int((expected[2] > expected[2, token_id]).sum())


def test_equal_logprobs_share_a_rank() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 0.0])
    token = sample_one(logits, SamplingState(SamplingParams(temperature=0, logprobs=5)))
    assert token.logprobs is not None
    ranks = {token_id: entry.rank for token_id, entry in token.logprobs.items()}
    assert ranks == {1: 1, 3: 1, 2: 3, 4: 3, 0: 5}


def test_prompt_logprobs_report_each_target_and_its_rivals() -> None:
    logits = random_logits(rows=150, seed=5)  # more rows than are widened at a time
    targets = torch.arange(150) % VOCAB
    expected = logits.double().log_softmax(dim=-1)
    tables = prompt_logprobs(logits, targets, 2)
    assert len(tables) == 150
    for row, table in enumerate(tables):
        target = int(targets[row])
        assert next(iter(table)) == target
        assert set(table) == {target, *expected[row].topk(2).indices.tolist()}
        assert table[target].logprob == pytest.approx(expected[row, target].item(), abs=1e-5)
        assert table[target].rank == 1 + int((expected[row] > expected[row, target]).sum())
    assert prompt_logprobs(logits[:0], targets[:0], 2) == []


# --- broken rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 2}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_a_finite_peak_is_marked_and_the_others_go_on(
    options: dict, value: float
) -> None:
    logits = random_logits(rows=3)
    logits[1, 6] = value
    states = [SamplingState(SamplingParams(seed=1, **options)) for _ in range(3)]
    tokens = sample(logits, states)
    assert [token.is_finite for token in tokens] == [True, False, True]
    assert [state.num_output_tokens for state in states] == [1, 0, 1]
    fresh = [SamplingState(SamplingParams(seed=1, **options)) for _ in range(3)]
    fine = sample(random_logits(rows=3), fresh)
    assert [tokens[0], tokens[2]] == [fine[0], fine[2]]


def test_a_row_with_every_token_barred_is_marked() -> None:
    state = SamplingState(SamplingParams(min_tokens=1, stop_token_ids=[0, 1]))
    (token,) = sample(torch.zeros(1, 2), [state])
    assert not token.is_finite


def test_a_penalty_out_of_all_proportion_is_its_own_rows_fault() -> None:
    params = [SamplingParams(repetition_penalty=1e-300), SamplingParams(temperature=0)]
    tokens = sample(random_logits(rows=2), [SamplingState(p, range(VOCAB)) for p in params])
    assert [token.is_finite for token in tokens] == [False, True]


def test_a_model_may_bar_tokens_of_its_own() -> None:
    logits = torch.full((VOCAB,), -math.inf)
    logits[[3, 9]] = 0.0
    assert set(draw_many(logits, SamplingParams(seed=1, top_p=0.9), num=100)) == {3, 9}


# --- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -0.1, ">= 0"),
        ("temperature", math.nan, "finite"),
        ("temperature", math.inf, "finite"),
        ("temperature", True, "finite"),
        ("temperature", "1", "finite"),
        ("top_p", 0.0, "in (0, 1]"),
        ("top_p", 1.1, "in (0, 1]"),
        ("top_p", math.nan, "in (0, 1]"),
        ("top_k", -2, "0 keeps all"),
        ("top_k", -1.0, "0 keeps all"),
        ("top_k", np.array([1, 2]), "0 keeps all"),
        ("temperature", 10**400, "finite"),
        ("top_k", 2.0, "integer"),
        ("top_k", True, "integer"),
        ("min_p", -0.1, "in [0, 1]"),
        ("min_p", 1.5, "in [0, 1]"),
        ("n", 0, "integer >= 1"),
        ("n", 1.0, "integer >= 1"),
        ("n", None, "integer >= 1"),
        ("seed", 2**63, "64-bit"),
        ("seed", 1.5, "64-bit"),
        ("stop", 3, "a string or a list"),
        ("stop", "", "non-empty"),
        ("stop", ["a", ""], "non-empty"),
        ("stop", ["a", 3], "non-empty"),
        ("stop", b"a", "a string or a list"),
        ("stop", {"a": 1}, "a string or a list"),
        ("stop", "caf\udce9", "no UTF-8"),
        ("bad_words", 3, "a string or a list"),
        ("bad_words", [""], "non-empty"),
        ("bad_words", ["\ud800"], "no UTF-8"),
        ("allowed_token_ids", [], "at least one token id"),
        ("allowed_token_ids", 3, "a list of token ids"),
        ("allowed_token_ids", [-1], "integer >= 0"),
        ("allowed_token_ids", np.array([1.0]), "integer >= 0"),
        ("stop_token_ids", 3, "a list of token ids"),
        ("stop_token_ids", [-1], "integer >= 0"),
        ("stop_token_ids", ["3"], "integer >= 0"),
        ("max_tokens", 0, "None for all that fits"),
        ("max_tokens", -1, "None for all that fits"),
        ("min_tokens", -1, "integer >= 0"),
        ("ignore_eos", 1, "True or False"),
        ("include_stop_str_in_output", None, "True or False"),
        ("skip_special_tokens", "yes", "True or False"),
        ("detokenize", 0, "True or False"),
        ("spaces_between_special_tokens", "no", "True or False"),
        ("spaces_between_special_tokens", False, "decoder decides"),
        ("repetition_penalty", 0.0, "> 0"),
        ("repetition_penalty", -1.0, "> 0"),
        ("presence_penalty", 2.1, "in [-2, 2]"),
        ("frequency_penalty", -2.1, "in [-2, 2]"),
        ("frequency_penalty", math.nan, "in [-2, 2]"),
        ("logit_bias", [1, 2], "mapping"),
        ("logit_bias", {-1: 1.0}, "integer >= 0"),
        ("logit_bias", {"1": 1.0}, "integer >= 0"),
        ("logprobs", -2, "integer >= 0"),
        ("logprobs", True, "integer >= 0"),
        ("prompt_logprobs", -2, "integer >= 0"),
        ("structured_outputs", 1, "a mapping such as"),
        ("truncate_prompt_tokens", 0, "-1 for all that fits"),
        ("truncate_prompt_tokens", -2, "-1 for all that fits"),
        ("truncate_prompt_tokens", 2.5, "-1 for all that fits"),
    ],
)
def test_impossible_values_are_refused_by_name(name: str, value: object, allowed: str) -> None:
    with pytest.raises(InvalidSamplingParams) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(f"{name} = ")
    assert allowed in str(caught.value)


def test_every_parameter_has_a_refusal() -> None:
    (cases,) = (mark.args[1] for mark in test_impossible_values_are_refused_by_name.pytestmark)
    assert {name for name, *_ in cases} == {
        f.name for f in dataclasses.fields(SamplingParams) if f.init
    }


@pytest.mark.parametrize("bias", [100.5, -101, math.nan, True, None])
def test_an_impossible_bias_is_refused_with_its_token(bias: object) -> None:
    with pytest.raises(InvalidSamplingParams, match=r"logit_bias\[7\] = .* in \[-100, 100\]"):
        SamplingParams(logit_bias={7: bias})


@pytest.mark.parametrize(
    "options",
    [
        {"n": 2, "temperature": 0},
        {"min_tokens": 5, "max_tokens": 4},
        {"stop": "x", "detokenize": False},
    ],
)
def test_contradictions_are_refused_with_both_names(options: dict) -> None:
    with pytest.raises(InvalidSamplingParams) as caught:
        SamplingParams(**options)
    assert all(name in str(caught.value) for name in options)


def test_an_unknown_name_is_refused_with_the_likely_one() -> None:
    with pytest.raises(InvalidSamplingParams, match="'temprature': did you mean 'temperature'"):
        SamplingParams(temprature=1)
    with pytest.raises(InvalidSamplingParams, match="'best_of_all': known: n, temperature"):
        SamplingParams(best_of_all=1)
    with pytest.raises(InvalidSamplingParams, match="'stop_ids'"):  # derived, not given
        SamplingParams(stop_ids=frozenset({1}))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("best_of", "use n"),
        ("max_new_tokens", "use max_tokens"),
        ("logits_processors", "allowed_token_ids"),
        ("guided_json", "structured_outputs"),
        ("num_beams", "no beam search"),
        ("stop_strings", "use stop"),
    ],
)
def test_what_others_have_is_refused_with_what_to_do(name: str, remedy: str) -> None:
    with pytest.raises(InvalidSamplingParams, match=f"'{name}': .*{remedy}"):
        SamplingParams(**{name: 1})


def test_numbers_of_numpy_and_torch_are_kept_as_pythons_own() -> None:
    given = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_p=torch.tensor(0.5),
        top_k=np.array(7),
        min_p=np.float64(0.25),
        seed=torch.tensor(3),
        max_tokens=np.int32(9),
        ignore_eos=np.bool_(True),
        logit_bias={np.int64(3): np.float32(1.5)},
        stop_token_ids=np.array([4, 5]),
        allowed_token_ids=torch.tensor([7, 6]),
    )
    assert given == SamplingParams(
        n=2, temperature=0.5, top_p=0.5, top_k=7, min_p=0.25, seed=3, max_tokens=9,
        ignore_eos=True, logit_bias={3: 1.5}, stop_token_ids=[4, 5], allowed_token_ids=[7, 6],
    )  # fmt: skip
    kinds = {type(getattr(given, f.name)) for f in dataclasses.fields(given)}
    assert kinds <= {int, float, bool, tuple, dict, frozenset, type(None)}
    assert {type(x) for x in (*given.stop_ids, *given.logit_bias, *given.allowed_token_ids)} == {
        int
    }


def test_sets_are_kept_in_order() -> None:
    given = SamplingParams(
        stop={"b", "a"}, stop_token_ids={11, 3}, allowed_token_ids={9, 10}, bad_words={"y", "x"}
    )
    assert given.stop == given.stop_strings == ("a", "b")
    assert given.stop_token_ids == (3, 11)
    assert given.allowed_token_ids == (9, 10)
    assert given.bad_words == ("x", "y")
    assert SamplingParams(stop=np.str_("END"), bad_words="x").stop == ("END",)


def test_vllms_minus_ones_have_its_meaning() -> None:
    given = SamplingParams(top_k=-1, seed=-1, logprobs=-1, prompt_logprobs=-1)
    assert (given.top_k, given.seed) == (0, None)
    given.check_vocab(10)
    logits = random_logits(rows=2)
    token = sample_one(logits[0], SamplingState(given))
    assert token.logprobs is not None
    assert set(token.logprobs) == set(range(VOCAB))
    (table, _) = prompt_logprobs(logits, torch.tensor([3, 4]), given.prompt_logprobs)
    assert set(table) == set(range(VOCAB))


def test_none_may_stand_for_a_default() -> None:
    given = SamplingParams.from_optional(n=None, temperature=None, top_p=0.5, max_tokens=None)
    assert given == SamplingParams(top_p=0.5, max_tokens=None)


def test_stops_are_normalised_and_copies_are_equal() -> None:
    bias = {3: 1.0}
    params = SamplingParams(stop="END", stop_token_ids=[4, 5], logit_bias=bias)
    bias[3] = -1.0
    assert params.stop == params.stop_strings == ("END",)
    assert params.stop_token_ids == (4, 5)
    assert params.stop_ids == {4, 5}
    assert params.logit_bias == {3: 1.0}
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams(stop=[])
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert dataclasses.replace(params, stop=("a", "b")).stop_strings == ("a", "b")


def test_the_vocabulary_bounds_token_ids_and_alternatives() -> None:
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1}, logprobs=10).check_vocab(10)
    for options in (
        {"stop_token_ids": [1, 10]},
        {"logit_bias": {10: 1.0}},
        {"allowed_token_ids": [3, 10]},
        {"logprobs": 11},
        {"prompt_logprobs": 11},
    ):
        with pytest.raises(InvalidSamplingParams, match=next(iter(options))):
            SamplingParams(**options).check_vocab(10)


# --- records -----------------------------------------------------------------------------------


def test_metrics_are_differences_once_their_ends_are_known() -> None:
    waiting = RequestMetrics(arrival_time=1000.0, arrival_ts=10.0)
    assert (waiting.first_token_latency, waiting.decode_time_s, waiting.e2e_latency_s) == (
        None,
    ) * 3
    assert (waiting.time_in_queue, waiting.first_token_time) == (None, None)
    assert waiting.time_per_output_token_s(5) is None
    done = RequestMetrics(
        arrival_time=1000.0,
        arrival_ts=10.0,
        queued_ts=10.125,
        scheduled_ts=10.25,
        first_token_ts=10.5,
        last_token_ts=12.25,
        finished_ts=12.5,
        num_generation_tokens=5,
    )
    assert (done.first_token_latency, done.decode_time_s, done.e2e_latency_s) == (0.5, 2.0, 2.5)
    assert done.time_in_queue == 0.125
    wall = (done.first_scheduled_time, done.first_token_time, done.last_token_time)
    assert (*wall, done.finished_time) == (1000.25, 1000.5, 1002.25, 1002.5)
    assert done.time_per_output_token_s(5) == 0.5
    assert done.time_per_output_token_s(1) is None


def test_outputs_are_frozen_records() -> None:
    output = CompletionOutput(index=0, text="a", token_ids=(1,), finish_reason="stop")
    request = RequestOutput(request_id="r", prompt=None, prompt_token_ids=(3,), outputs=(output,))
    assert output.finished
    assert not CompletionOutput(index=0, text="", token_ids=()).finished
    for record in (output, request, Logprob(-1.0, 1)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.__setattr__(dataclasses.fields(record)[0].name, None)
