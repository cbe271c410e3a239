"""A sequence that goes on elsewhere, as plain data that a process can send to another."""

import time
from collections.abc import Sequence
from typing import Self

import msgspec

from .outputs import Logprob
from .request import Request
from .spec import RequestSpec, SequenceKey


class Continuation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of a request's outputs, and how far it has come.

    With it an engine goes on with exactly the tokens that another would have given: what sampling
    remembers (penalties, bad words, the place in a grammar) is made again of the tokens, and chance
    is a hash of seed, index and step. An engine makes one of a request that leaves it (`of`);
    whoever has a request's spec and the tokens that came can make one without the engine, of which
    only `spec`, `index` and `output_token_ids` are needed. For equal tokens its spec must then have
    a seed.

    Attributes:
        spec: what was asked, with the seed that chance goes by and the priority of now.
        index: which of the request's outputs.
        epoch: of the move; 0 without one.
        output_token_ids: the tokens that came. All that belongs to them was told: log
            probabilities, and with the first of them those of the prompt, cached tokens and times.
        max_tokens: the most it may generate, as its engine found; None to find it anew.
        prompt_logprobs: entries of the prompt's that are known, while no token has come.
        num_cached: prompt tokens that were found at the first admission.
        num_served: prompt tokens that were computed for it, or found.
        age_s: since an engine first took it.
        scheduled_age_s: since it first had a slot; None if it never had one. Ages, since clocks of
            different machines have nothing in common.
    """

    spec: RequestSpec
    index: int = 0
    epoch: int = 0
    output_token_ids: Sequence[int] = ()
    max_tokens: int | None = None
    prompt_logprobs: Sequence[dict[int, Logprob] | None] = ()
    num_cached: int = 0
    num_served: int = 0
    age_s: float = 0.0
    scheduled_age_s: float | None = None

    @property
    def key(self) -> SequenceKey:
        """Names the sequence."""
        return self.spec.request_id, self.index

    @property
    def token_ids(self) -> list[int]:
        """The prompt's tokens, then the output's."""
        return [*self.spec.prompt_token_ids, *self.output_token_ids]

    @classmethod
    def of(cls, request: Request, *, epoch: int = 0) -> Self:
        """A request as far as the host knows it."""
        now_s = time.monotonic()
        scheduled_s = request.scheduled_time_s
        return cls(
            spec=msgspec.structs.replace(
                request.spec, seed=request.sampling.seed, priority=request.priority
            ),
            index=request.key[1],
            epoch=epoch,
            output_token_ids=tuple(request.output_token_ids),
            max_tokens=request.max_tokens,
            prompt_logprobs=tuple(request.prompt_logprobs) if request.scores_prompt else (),
            num_cached=request.num_cached,
            num_served=request.num_served,
            age_s=now_s - request.queued_time_s,
            scheduled_age_s=None if scheduled_s is None else now_s - scheduled_s,
        )

    def restore(self, request: Request) -> None:
        """Bring a request of the same spec, which has some of the tokens or none, to where this one
        was."""
        now_s = time.monotonic()
        request.extend_output(self.output_token_ids[request.num_output_tokens :])
        request.epoch = self.epoch
        request.priority = self.spec.priority
        request.prompt_logprobs = list(self.prompt_logprobs)
        request.num_cached = self.num_cached
        request.num_served = self.num_served
        request.queued_time_s = now_s - self.age_s
        if self.scheduled_age_s is not None:
            request.scheduled_time_s = now_s - self.scheduled_age_s
