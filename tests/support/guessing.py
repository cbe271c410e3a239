"""A drafter that knows what will come, and errs where it is told to."""

import random
from collections.abc import Mapping, Sequence

from vkv import LLM, SamplingParams
from vkv.runtime.request.request import Request, ScheduledRequest
from vkv.runtime.request.sampling_state import SamplingState
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.speculation import Drafter, Speculation

Answers = Mapping[tuple[tuple[int, ...], int], Sequence[int]]
"""Output tokens by prompt and index."""


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
