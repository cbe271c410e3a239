"""What a step brought to a request, as plain data that a process can send to another."""

import time
from typing import Self

import msgspec

from ...vmem import errors
from ...vmem.errors import VkvError
from .outputs import FinishReason, Logprob


class Failure(msgspec.Struct, frozen=True):
    """An error of one request.

    Attributes:
        kind: the error's class in `vmem.errors`.
        message: names the value, or what happened, and the remedy.
    """

    kind: str
    message: str

    @classmethod
    def of(cls, error: VkvError) -> Self:
        return cls(type(error).__name__, str(error))

    def error(self) -> VkvError:
        """The error again."""
        kind = getattr(errors, self.kind)
        assert issubclass(kind, VkvError), self.kind
        return kind(self.message)


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one of a request's sequences got: tokens, its end, or the error that ended it.

    Attributes:
        index: which of the request's outputs.
        epoch: of the move that brought the sequence to the engine that speaks; 0 without one. So
            what a former owner still says is known.
        token_ids: new tokens, in order.
        logprobs: for each of them, where asked; without texts, of which the engine knows nothing.
        prompt_logprobs: further entries of the prompt's, where asked.
        num_cached_tokens: prompt tokens that needed no computing; with the first output.
        queued_time_s: when the engine took the request; with the first output or the end.
        scheduled_time_s: when it first had a slot; None if it never had one.
        finish_reason: none before the end. An end by a stop string is not among these.
        stop_reason: the stop token that ended it; None for the end-of-sequence token.
        ends_with_text: with the finish reason "stop": the last token is no stop token, but all of
            the output is there.
        failure: with the finish reason "error".
        time_s: now. Times are on the system's monotonic clock.
    """

    request_id: str
    index: int = 0
    epoch: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] = ()
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] = ()
    num_cached_tokens: int | None = None
    queued_time_s: float | None = None
    scheduled_time_s: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    ends_with_text: bool = False
    failure: Failure | None = None
    time_s: float = msgspec.field(default_factory=time.monotonic)
