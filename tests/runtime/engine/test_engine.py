"""The step loop under pressure: ragged loads, preemption, shared prefixes, and what is left."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from transformers import PreTrainedModel
from vkv import LLM, SamplingParams
from vkv.runtime.engine.engine import Engine
from vkv.runtime.request.outputs import Logprob
from vkv.runtime.request.request import Request
from vkv.vmem.errors import OutOfPages, RequestTooLarge, StepFailed

_PAGE_BYTES = 4096  # 16 tokens of the tiny llama
_ROW_TOKENS = 16


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama", max_position_embeddings=2304)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return zoo.tiny_model("llama", attention="sdpa", max_position_embeddings=2304)


@contextmanager
def _engine(model: PreTrainedModel, **options: Any) -> Iterator[Engine]:
    with LLM(model, device="cpu", **zoo.with_defaults(options)) as llm:
        yield llm.engine
        llm.engine.cache.check_invariants()


def _finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def _total(scores: list[dict[int, Logprob]]) -> float:
    return sum(next(iter(table.values())).logprob for table in scores)


def _run(engine: Engine, prompt: list[int], params: SamplingParams) -> list[Request]:
    requests = zoo.add(engine, "0", prompt, params)
    _finish(engine)
    return requests


def _assert_alone(reference: PreTrainedModel, request: Request) -> None:
    """The request's tokens are what `model.generate` makes of its prompt."""
    prompt = request.token_ids[: request.num_prompt_tokens]
    got = request.output_token_ids
    expected = zoo.generate_alone(reference, prompt, request.max_tokens)
    assert got == expected, zoo.explain_difference(reference, prompt, got, expected)


def _assert_greedy(reference: PreTrainedModel, request: Request) -> None:
    """Each token is the likeliest after those before it: by induction, what `generate` makes.

    One forward pass instead of one for each token.
    """
    logits = zoo.full_logits(reference, request.token_ids[:-1])[request.num_prompt_tokens - 1 :]
    expected = logits.argmax(-1).tolist()
    prompt = request.token_ids[: request.num_prompt_tokens]
    assert request.output_token_ids == expected, zoo.explain_difference(
        reference, prompt, request.output_token_ids, expected
    )


def _ragged_lengths(count: int, seed: int) -> list[tuple[int, int]]:
    """Prompt and output lengths: 16 to 2,000 and 16 to 256, most of them short."""
    draw = random.Random(seed)
    lengths = [(16, 256), (2000, 16)]
    while len(lengths) < count:
        lengths.append((int(16 * 125 ** draw.random()), int(16 * 16 ** draw.random())))
    return lengths


def test_64_ragged_requests_in_a_third_of_the_memory(
    model: PreTrainedModel, reference: PreTrainedModel
) -> None:
    lengths = _ragged_lengths(64, seed=0)
    prompts = zoo.random_prompts([prompt for prompt, _ in lengths])
    params = [zoo.greedy(output) for _, output in lengths]
    needed = sum(-(-(prompt + output) // _ROW_TOKENS) for prompt, output in lengths)
    with _engine(model, max_seqs=64, max_len=2304, kv_memory=needed * _PAGE_BYTES // 3) as engine:
        requests = [
            zoo.add(engine, str(i), prompt, one)[0]
            for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        ]
        _finish(engine)
        stats = engine.stats()
        assert stats.pages_held == stats.pages_parked
        assert stats.physical_bytes <= stats.pages_limit * stats.page_bytes
        engine.cache.trim()
        assert engine.stats().pages_held == engine.stats().physical_bytes == 0
    for request, (_, num_output) in zip(requests, lengths, strict=True):
        assert request.num_output_tokens == num_output
        _assert_greedy(reference, request)


@pytest.mark.parametrize("kv", ["virtual", "paged"])
def test_preempted_requests_lose_and_change_nothing(
    model: PreTrainedModel, reference: PreTrainedModel, kv: str
) -> None:
    with _engine(
        model, kv=kv, block_tokens=_ROW_TOKENS, kv_memory=14 * _PAGE_BYTES, max_batch_tokens=24
    ) as engine:
        requests = [
            zoo.add(engine, str(i), prompt, zoo.greedy(70))[0]
            for i, prompt in enumerate(zoo.random_prompts([30, 5, 44, 18, 9, 27]))
        ]
        while engine.has_work:
            engine.step()
            engine.cache.check_invariants()
        assert engine.stats().num_preemptions >= 3
        assert engine.stats().pages_held == engine.stats().pages_parked
    for request in requests:
        _assert_alone(reference, request)


def test_preemption_keeps_random_draws_and_scores(model: PreTrainedModel) -> None:
    prompts = zoo.random_prompts([30, 41, 35])
    params = [
        SamplingParams(
            seed=i, max_tokens=60, ignore_eos=True, logprobs=2, prompt_logprobs=1,
            frequency_penalty=0.5,
        )
        for i in range(3)
    ]  # fmt: skip
    outcomes = []
    for num_pages in (100, 9):
        with _engine(model, kv_memory=num_pages * _PAGE_BYTES, max_batch_tokens=13) as engine:
            requests = [
                zoo.add(engine, str(i), prompt, one)[0]
                for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))
            ]
            _finish(engine)
            outcomes.append((engine.stats().num_preemptions, requests, zoo.take_scores(engine)))
    (calm, at_ease, some), (pressed, cramped, others) = outcomes
    assert calm == 0
    assert pressed >= 2
    for one, other in zip(at_ease, cramped, strict=True):
        assert one.token_ids == other.token_ids
        assert len(other.prompt_logprobs) == len(one.prompt_logprobs) == one.num_prompt_tokens
        scores, under_pressure = some[one.key[0]], others[one.key[0]]
        assert [list(table) for table in scores] == [list(table) for table in under_pressure]
        assert _total(under_pressure) == pytest.approx(_total(scores), abs=1e-3)


def test_prompt_scores_survive_a_preemption_into_a_longer_parked_prefix(
    model: PreTrainedModel,
) -> None:
    """A half-scored prompt must not skip, on its return, what it did not score itself."""
    (prompt,) = zoo.random_prompts([64])
    with _engine(model, max_batch_tokens=20, kv_memory=64 * _PAGE_BYTES) as engine:
        (request,) = zoo.add(engine, "0", prompt, zoo.greedy(4, prompt_logprobs=0))
        engine.step()  # a chunk
        engine.scheduler.preempt(request)
        engine.scheduler.waiting.remove(request)
        (other,) = zoo.add(engine, "1", prompt, zoo.greedy(1))
        while not other.is_finished:
            engine.step()  # all of the prompt then lies parked
        engine.scheduler.waiting.put_back(request)
        _finish(engine)
    assert len(request.prompt_logprobs) == len(prompt)
    for token, table in zip(prompt[1:], request.prompt_logprobs[1:], strict=True):
        assert table is not None
        assert token in table


@pytest.mark.parametrize("seed", range(8))
def test_random_arrivals_and_aborts_in_a_small_pool(
    model: PreTrainedModel, reference: PreTrainedModel, seed: int
) -> None:
    draw = random.Random(seed)
    shared = zoo.random_prompts([40], seed=9)[0]
    finished: list[Request] = []
    with _engine(
        model,
        kv_memory=draw.choice([9, 14, 20]) * _PAGE_BYTES,
        max_batch_tokens=draw.choice([3, 17, 64]),
        max_seqs=draw.choice([2, 5]),
        sanitize=draw.choice(["never", "zero"]),
        max_len=128,
    ) as engine:
        alive: list[Request] = []
        for step in range(160):
            if draw.random() < 0.2 and step < 110:
                prompt = (
                    shared[: draw.randrange(1, 41)]
                    + zoo.random_prompts([draw.randrange(1, 30)], seed=step)[0]
                )
                alive += zoo.add(engine, str(step), prompt, zoo.greedy(draw.randrange(1, 40)))
            if alive and draw.random() < 0.04:
                engine.abort(alive.pop(draw.randrange(len(alive))).key[0])
            engine.step()
            engine.cache.check_invariants()
        _finish(engine)
        stats = engine.stats()
        assert stats.pages_held == stats.pages_parked
        finished = [r for r in alive if r.is_finished]
        assert len(finished) == len(alive) > 5
    for request in finished:
        _assert_greedy(reference, request)


def test_a_request_that_needs_the_whole_pool_runs(
    model: PreTrainedModel, reference: PreTrainedModel
) -> None:
    num_pages = 6
    room = num_pages * _ROW_TOKENS  # the last token is never computed, so it needs none
    with _engine(model, kv_memory=num_pages * _PAGE_BYTES) as engine:
        first, second = zoo.random_prompts([50, 60])
        requests = [
            *zoo.add(engine, "0", first, zoo.greedy(room + 1 - 50)),
            *zoo.add(engine, "1", second, zoo.greedy(room + 1 - 60)),
        ]
        with pytest.raises(RequestTooLarge, match=r"7 pages.*pool has 6.*kv_memory"):
            zoo.add(engine, "2", second, zoo.greedy(room + 2 - 60))
        _finish(engine)
    for request in requests:
        _assert_alone(reference, request)


# -- shared prefixes -------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["virtual", "paged"])
def test_a_second_turn_computes_only_what_is_new(
    model: PreTrainedModel, reference: PreTrainedModel, kv: str
) -> None:
    first, more = zoo.random_prompts([50, 13])
    with _engine(model, kv=kv) as engine:
        (turn,) = _run(engine, first, zoo.greedy(20))
        computed = engine.stats().num_prompt_tokens
        assert turn.num_cached == 0
        (next_turn,) = _run(engine, [*turn.token_ids, *more], zoo.greedy(20))
        # The last token of the answer was sampled, never computed.
        assert next_turn.num_cached == len(turn.token_ids) - 1
        assert engine.stats().prefix_hit_tokens == next_turn.num_cached
        assert engine.stats().num_prompt_tokens - computed == len(more) + 1
    _assert_alone(reference, next_turn)


def test_the_same_prompt_again_computes_its_last_token(
    model: PreTrainedModel, reference: PreTrainedModel
) -> None:
    (prompt,) = zoo.random_prompts([37])
    with _engine(model) as engine:
        (one,) = _run(engine, prompt, zoo.greedy(9))
        (other,) = _run(engine, prompt, zoo.greedy(9))
    assert other.num_cached == 36
    assert one.output_token_ids == other.output_token_ids
    _assert_alone(reference, other)


def test_without_prefix_reuse_all_is_computed(model: PreTrainedModel) -> None:
    (prompt,) = zoo.random_prompts([37])
    with _engine(model, prefix_reuse=False) as engine:
        (one,) = _run(engine, prompt, zoo.greedy(9))
        (other,) = _run(engine, prompt, zoo.greedy(9))
        assert engine.stats().prefix_hit_tokens == other.num_cached == 0
    assert one.output_token_ids == other.output_token_ids


def test_a_live_request_lends_its_rows(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    prefix, one_end, other_end = zoo.random_prompts([50, 7, 11])
    with _engine(model) as engine:
        (donor,) = zoo.add(engine, "0", prefix + one_end, zoo.greedy(30))
        for _ in range(5):
            engine.step()
        pages = engine.cache.stats().pages_held
        (other,) = zoo.add(engine, "1", prefix + other_end, zoo.greedy(30))
        engine.step()
        assert not donor.is_finished
        assert other.num_cached == 50
        # Of 61 tokens, 48 lie in three whole pages that are the donor's too.
        assert engine.cache.stats().pages_held == pages + 1
        engine.cache.check_invariants()
        _finish(engine)
    _assert_alone(reference, donor)
    _assert_alone(reference, other)


@pytest.mark.parametrize("kv", ["virtual", "paged"])
@pytest.mark.parametrize("sanitize", ["never", "zero"])
def test_siblings_share_their_leaders_rows(model: PreTrainedModel, kv: str, sanitize: str) -> None:
    (prompt,) = zoo.random_prompts([100])
    params = SamplingParams(n=4, seed=5, max_tokens=20, ignore_eos=True)
    with _engine(model, kv=kv, sanitize=sanitize, max_batch_tokens=32, max_seqs=6) as engine:
        siblings = zoo.add(engine, "0", prompt, params)
        most_pages = 0
        while engine.has_work:
            engine.step()
            engine.cache.check_invariants()
            most_pages = max(most_pages, engine.cache.stats().pages_held)
        assert engine.stats().num_prompt_tokens == len(prompt) + 3  # a last token for each
    assert [request.num_cached for request in siblings] == [0, 99, 99, 99]
    assert len({tuple(request.output_token_ids) for request in siblings}) == 4
    # Six whole pages once, and two of each sibling's own, instead of four times eight.
    assert most_pages <= 6 + 4 * 2
    with _engine(model, prefix_reuse=False, kv=kv) as engine:  # as if each computed all itself
        alone = _run(engine, prompt, params)
    assert [r.output_token_ids for r in alone] == [r.output_token_ids for r in siblings]


def test_sanitized_memory_changes_no_token(
    model: PreTrainedModel, reference: PreTrainedModel
) -> None:
    prompts = zoo.random_prompts([40, 25, 33, 12])
    with _engine(model, sanitize="zero", kv_memory=9 * _PAGE_BYTES, max_parked=2) as engine:
        requests = [
            zoo.add(engine, str(i), prompt, zoo.greedy(40))[0] for i, prompt in enumerate(prompts)
        ]
        _finish(engine)
    for request in requests:
        _assert_alone(reference, request)


# -- when memory cannot be had ---------------------------------------------------------------


def test_a_shortage_loses_no_request(
    model: PreTrainedModel, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device itself has no page left when the first is to be admitted."""

    def out_of_memory(_num_pages: int) -> list[int]:
        raise OutOfPages("the device has none")

    prompts = zoo.random_prompts([20, 30])
    with _engine(model, look_ahead_tokens=0) as engine:
        requests = [
            zoo.add(engine, str(i), prompt, zoo.greedy(12))[0] for i, prompt in enumerate(prompts)
        ]
        with monkeypatch.context() as patched:
            patched.setattr(engine.cache.pool.driver, "create", out_of_memory)
            engine.step()
        assert engine.scheduler.shortage is not None
        assert "the device has none" in str(engine.scheduler.shortage[1])
        assert engine.requests == requests
        engine.cache.check_invariants()
        engine.step()
        _finish(engine)
    for request in requests:
        _assert_alone(reference, request)


def test_few_mappings_slow_requests_down_and_change_nothing(
    model: PreTrainedModel, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's limit on mappings is near long before the pool is empty."""
    monkeypatch.setattr("vkv.vmem.linux.max_map_count", lambda: 24)
    with _engine(model, max_batch_tokens=24) as engine:
        requests = [
            zoo.add(engine, str(i), prompt, zoo.greedy(60))[0]
            for i, prompt in enumerate(zoo.random_prompts([30, 5, 44, 18, 9, 27]))
        ]
        while engine.has_work:
            engine.step()
            engine.cache.check_invariants()
        assert engine.stats().num_preemptions > 0
    for request in requests:
        _assert_alone(reference, request)


def test_a_step_without_work_does_nothing(model: PreTrainedModel) -> None:
    with _engine(model) as engine:
        engine.step()
        assert engine.take_outputs() == []
        assert engine.stats().num_steps == 0


def test_a_failed_forward_ends_its_batch_and_no_other_request(
    model: PreTrainedModel, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = zoo.random_prompts([40, 12])

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("a kernel failed")

    with _engine(model, max_batch_tokens=16) as engine:
        failed, later = (
            zoo.add(engine, str(i), prompt, zoo.greedy(8))[0] for i, prompt in enumerate(prompts)
        )
        engine.step()
        with monkeypatch.context() as patched:
            patched.setattr(engine.runner, "_run", fail)
            engine.step()
        (output,) = engine.take_outputs()
        assert (output.request_id, output.finish_reason) == ("0", "error")
        assert output.failure is not None
        error = output.failure.error()
        assert isinstance(error, StepFailed)
        assert "RuntimeError: a kernel failed" in str(error)
        assert failed.is_finished
        engine.cache.check_invariants()
        _finish(engine)
    _assert_alone(reference, later)


@pytest.mark.parametrize("kv_pages", [16, 400])
def test_prefill_first_gives_the_same_tokens(
    model: PreTrainedModel, reference: PreTrainedModel, kv_pages: int
) -> None:
    lengths = [(40, 60), (3, 70), (90, 30), (17, 60), (24, 50)]
    prompts = zoo.random_prompts([prompt for prompt, _ in lengths])
    with _engine(
        model, policy="prefill_first", max_batch_tokens=32, kv_memory=kv_pages * _PAGE_BYTES
    ) as engine:
        requests = []
        for index, (prompt, (_, output)) in enumerate(zip(prompts, lengths, strict=True)):
            requests += zoo.add(engine, str(index), prompt, zoo.greedy(output))
            engine.step()
        before = engine.stats().num_computed_tokens
        assert before == sum(r.num_computed for r in requests)
        _finish(engine)
        engine.cache.check_invariants()
        num_computed = engine.stats().num_computed_tokens
        assert num_computed > before
        computed = sum(prompt + output - 1 for prompt, output in lengths)
        assert num_computed >= computed
        assert (engine.stats().num_preemptions > 0) == (kv_pages == 16)
    for request in requests:
        _assert_alone(reference, request)
