"""Who guesses in tests, what is asked meanwhile, and all that is said."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import zoo
from vkv import LLM, SamplingParams, StructuredOutputsParams
from vkv.runtime.request.outputs import CompletionOutput
from vkv.runtime.request.request import Request, ScheduledRequest
from vkv.runtime.request.sampling_state import SamplingState
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.speculation import Drafter, Speculation

Answers = Mapping[tuple[tuple[int, ...], int], Sequence[int]]
"""Output tokens by prompt and index."""

PROMPTS = zoo.random_prompts([5, 40, 1, 17, 16, 9])


class KnowingDrafter(Drafter):
    """Guesses from outputs that are known already; each token is wrong with `error_rate`."""

    kind = "knowing"

    def __init__(self, answers: Answers, *, error_rate: float, vocab_size: int) -> None:
        self._answers = answers
        self._error_rate = error_rate
        self._vocab_size = vocab_size
        self._random = random.Random(5)

    def draft(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        drafts: dict[Request, list[int]] = {}
        for request, num_tokens in wanted.items():
            known = self._answers[tuple(request.spec.prompt_token_ids), request.key[1]]
            start = request.num_output_tokens
            draft = list(known[start : start + num_tokens])
            draft += [0] * (num_tokens - len(draft))
            drafts[request] = [self._maybe_wrong(token) for token in draft]
        return drafts

    def close(self) -> None:
        pass

    def _maybe_wrong(self, token: int) -> int:
        wrong = self._random.random() < self._error_rate
        return (token + 1) % self._vocab_size if wrong else token


def guess(llm: LLM, drafter: KnowingDrafter, *, max_tokens: int = 7, max_rows: int = 40) -> None:
    """Have an `LLM` guess by a drafter of the test's."""
    llm.engine.scheduler.speculation = Speculation(
        drafter, max_tokens=max_tokens, max_rows=max_rows
    )


def decoding(name: str, *, max_tokens: int = 1000) -> ScheduledRequest:
    """A request of which one token is to be computed, as a step has it."""
    params = SamplingParams(max_tokens=max_tokens)
    spec = RequestSpec(request_id=name, prompt_token_ids=(1, 2, 3), params=params)
    request = Request(spec, max_tokens=max_tokens, sampling=SamplingState(params, (1, 2, 3)))
    request.token_ids.append(4)
    request.num_computed = 3
    return ScheduledRequest(request, 1)


class Restless:
    """A pace that guesses whatever comes of it, now more and now less."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._random = random.Random(7)

    def length(self, request: Request, num_decodes: int, num_unseen: int) -> int:
        return self._random.randint(0, self._most)

    def note(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        pass


def guess_restlessly(llm: LLM, *, max_tokens: int = 7, max_rows: int = 40) -> Speculation:
    """Have an `LLM` guess by its own drafter, whether or not that pays."""
    before = llm.engine.scheduler.speculation
    assert before is not None, "nobody guesses"
    pace = Restless(max_tokens)
    speculation = Speculation(before.drafter, max_tokens=max_tokens, max_rows=max_rows, pace=pace)
    llm.engine.scheduler.speculation = speculation
    return speculation


def everything() -> list[SamplingParams]:
    """For each of `PROMPTS`: greedy, sampled, penalised, scored, barred, and by a grammar."""
    letters = {ord(letter) - 32 for letter in "abcd"}
    barred = {"allowed_token_ids": letters, "bad_words": ["ab", "ca", "dd"]}
    pattern = StructuredOutputsParams(regex="(ab|cd){2,9}x")
    return [
        zoo.greedy(30),
        SamplingParams(temperature=0.9, seed=3, max_tokens=40, top_k=20, top_p=0.9),
        SamplingParams(temperature=0.8, seed=1, n=3, max_tokens=20, repetition_penalty=1.3),
        SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, max_tokens=17),
        SamplingParams(temperature=1.0, seed=4, max_tokens=50, ignore_eos=True, **barred),
        SamplingParams(temperature=0.7, seed=6, max_tokens=60, structured_outputs=pattern),
    ]


class _Scores(dict[int, float]):
    """Log probabilities of a place, equal to some digits: more rows are summed otherwise."""

    def __eq__(self, other: object) -> bool:
        return dict(self) == pytest.approx(other, abs=1e-4)


def _scores(output: CompletionOutput) -> list[_Scores] | None:
    if output.logprobs is None:
        return None
    return [
        _Scores({token: entry.logprob for token, entry in table.items()})
        for table in output.logprobs
    ]


def results(llm: LLM, params: list[SamplingParams]) -> list[list[tuple[Any, ...]]]:
    """All that is said to `PROMPTS`: of each output tokens, text, end and scores."""
    outs = llm.generate([list(prompt) for prompt in PROMPTS], params)
    llm.engine.cache.check_invariants()
    zoo.assert_idle(llm)
    return [
        [(o.token_ids, o.text, o.finish_reason, o.stop_reason, _scores(o)) for o in out.outputs]
        for out in outs
    ]
