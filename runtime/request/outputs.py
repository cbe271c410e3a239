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
    """The token's own text; None without a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """When a request arrived, spoke and finished, in seconds of one monotonic clock."""

    arrival_time_s: float
    first_token_time_s: float | None = None
    finished_time_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, queueing included; None before it."""
        if self.first_token_time_s is None:
            return None
        return self.first_token_time_s - self.arrival_time_s

    @property
    def decode_time_s(self) -> float | None:
        """From the first token to the end; None before the end, or if there was no token."""
        if self.first_token_time_s is None or self.finished_time_s is None:
            return None
        return self.finished_time_s - self.first_token_time_s

    @property
    def e2e_latency_s(self) -> float | None:
        """From arrival to the end; None before it."""
        if self.finished_time_s is None:
            return None
        return self.finished_time_s - self.arrival_time_s

    def time_per_output_token_s(self, num_output_tokens: int) -> float | None:
        """Mean time between tokens; None before the end or with fewer than two tokens."""
        if self.decode_time_s is None or num_output_tokens < 2:
            return None
        return self.decode_time_s / (num_output_tokens - 1)


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
    """None where the prompt came as token ids."""
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
