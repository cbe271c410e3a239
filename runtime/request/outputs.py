"""What a request gives back: plain, frozen records under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...vmem.errors import VkvError

FinishReason = Literal["stop", "length", "abort", "error"]
"""A stop token or string; `max_tokens` or the slot's end; `abort`; `RequestOutput.error`."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log probability, and where it stands among all tokens at its position."""

    logprob: float
    """Natural logarithm, from the model's raw logits (see `sampler`)."""
    rank: int
    """1 + the number of tokens that are strictly likelier; equals share a rank."""
    decoded_token: str | None = None
    """The token's text where it stands, a leading space included; None without a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """When a request arrived, ran, spoke and finished, under vLLM's names, in seconds.

    `…_ts` are on the system's monotonic clock, `…_time` on the wall clock; what has not happened is
    None.
    """

    arrival_time: float
    """When the caller asked."""
    arrival_ts: float
    queued_ts: float | None = None
    """When the engine took it."""
    scheduled_ts: float | None = None
    """When it first had memory and a place in a batch."""
    first_token_ts: float | None = None
    last_token_ts: float | None = None
    finished_ts: float | None = None
    num_generation_tokens: int = 0
    """Of all outputs together."""

    @property
    def first_token_latency(self) -> float | None:
        """From arrival to the first token, queueing included."""
        return _between(self.arrival_ts, self.first_token_ts)

    @property
    def time_in_queue(self) -> float | None:
        """From when the engine took it to its place in a batch."""
        return _between(self.queued_ts, self.scheduled_ts)

    @property
    def first_scheduled_time(self) -> float | None:
        """`scheduled_ts` on the wall clock."""
        return self._wall(self.scheduled_ts)

    @property
    def first_token_time(self) -> float | None:
        """`first_token_ts` on the wall clock."""
        return self._wall(self.first_token_ts)

    @property
    def last_token_time(self) -> float | None:
        """`last_token_ts` on the wall clock."""
        return self._wall(self.last_token_ts)

    @property
    def finished_time(self) -> float | None:
        """`finished_ts` on the wall clock."""
        return self._wall(self.finished_ts)

    @property
    def decode_time_s(self) -> float | None:
        """From the first token to the end; None before the end, or if there was no token."""
        return _between(self.first_token_ts, self.finished_ts)

    @property
    def e2e_latency_s(self) -> float | None:
        """From arrival to the end; None before it."""
        return _between(self.arrival_ts, self.finished_ts)

    def time_per_output_token_s(self, num_output_tokens: int) -> float | None:
        """Mean time between tokens; None before the end or with fewer than two tokens."""
        if self.decode_time_s is None or num_output_tokens < 2:
            return None
        return self.decode_time_s / (num_output_tokens - 1)

    def _wall(self, time_s: float | None) -> float | None:
        return None if time_s is None else self.arrival_time + time_s - self.arrival_ts


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of a request's `n` continuations, as far as it has come."""

    index: int
    text: str
    """Empty where the model has no tokenizer."""
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    """The sum over `token_ids`; None unless `logprobs` were asked for."""
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    """For each token: itself first, then the top alternatives, likeliest first."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or string that ended it; None for the end-of-sequence token."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A request and its continuations, finished or streaming."""

    request_id: str
    prompt: str | None
    """A conversation is written out; None where the prompt came as token ids alone."""
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    """One entry for each prompt token; the first is None, as nothing precedes it."""
    outputs: tuple[CompletionOutput, ...] = ()
    finished: bool = False
    num_cached_tokens: int | None = None
    """Prompt tokens whose keys and values were there already; None before it is scheduled."""
    metrics: RequestMetrics | None = None
    error: VkvError | None = None
    """What ended the request, where a finish reason is "error"; no other request is touched."""
