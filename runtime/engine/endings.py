"""What is told of a request: its tokens, and how it ends."""

from collections.abc import Collection
from typing import NamedTuple

from ...vmem.errors import StepFailed, VkvError
from ..execution.sampler import SampledToken
from ..request.outputs import FinishReason
from ..request.request import Request
from ..request.step_output import Failure, StepOutput


class End(NamedTuple):
    """Whether the newest token is the last.

    Attributes:
        reason: None if more follow.
        stop_reason: the stop token that it is.
        is_whole: it is the last because the output is whole (`StepOutput.ends_with_text`).
    """

    reason: FinishReason | None
    stop_reason: int | None = None
    is_whole: bool = False


def end_of(request: Request, eos_token_ids: Collection[int]) -> End:
    """Whether a request's newest token is its last."""
    params, token_id, state = request.params, request.token_ids[-1], request.sampling
    if token_id in params.stop_ids:
        return End("stop", token_id)
    if token_id in eos_token_ids and not params.ignore_eos:
        return End("stop")
    is_newest = state.num_output_tokens == request.num_output_tokens  # of those behind a draft
    if is_newest and state.is_complete:
        return End("stop", is_whole=True)
    return End("length" if request.num_output_tokens >= request.max_tokens else None)


def told_token(request: Request, token: SampledToken, end: End) -> StepOutput:
    """Of a request's newest token."""
    is_first = request.num_output_tokens == 1
    return StepOutput(
        request_id=request.key[0],
        index=request.key[1],
        epoch=request.epoch,
        token_ids=(token.token_id,),
        logprobs=(token.logprobs,) if token.logprobs is not None else (),
        prompt_logprobs=tuple(request.prompt_logprobs) if is_first else (),
        num_cached_tokens=request.num_cached if is_first else None,
        queued_time_s=request.queued_time_s if is_first else None,
        scheduled_time_s=request.scheduled_time_s if is_first else None,
        finish_reason=end.reason,
        stop_reason=end.stop_reason,
        ends_with_text=end.is_whole,
    )


def told_end(request: Request, end: End, failure: Failure | None = None) -> StepOutput:
    """Of an end that comes without a token."""
    return StepOutput(
        request_id=request.key[0],
        index=request.key[1],
        epoch=request.epoch,
        queued_time_s=request.queued_time_s,
        scheduled_time_s=request.scheduled_time_s,
        finish_reason=end.reason,
        stop_reason=end.stop_reason,
        ends_with_text=end.is_whole,
        failure=failure,
    )


def typed(error: Exception) -> VkvError:
    """An error as its request is told it."""
    if isinstance(error, VkvError):
        return error
    failed = StepFailed(f"the model failed: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed
