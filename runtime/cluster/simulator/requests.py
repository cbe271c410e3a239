"""Requests as the engine would make them, for a scheduler that is not asked for tokens; and what is
told of them."""

from collections.abc import Mapping

from ...request.request import Request
from ...request.sampling_params import SamplingParams
from ...request.sampling_state import SamplingState
from ...request.spec import RequestSpec
from ..snapshot import RequestSnapshot
from .trace import TraceRequest

_PARAMS = SamplingParams(temperature=0, max_tokens=None)  # a scheduler looks at neither
_SAMPLING = SamplingState(_PARAMS)


def new_request(
    number: int, trace: TraceRequest, arrived_s: float, prefixes: Mapping[str, int]
) -> Request:
    """A request whose tokens are like no other's.

    Args:
        number: of the request; its token, too.
        prefixes: a token for each prefix that several share, which no request has for its own.
    """
    shared = [prefixes[trace.prefix]] * trace.prefix_tokens if trace.prefix else []
    tokens = shared + [number] * (trace.prompt_tokens - len(shared))
    spec = RequestSpec(
        request_id=str(number),
        prompt_token_ids=tokens,
        params=_PARAMS,
        priority=trace.priority,
        tenant=trace.tenant,
        arrival_time_s=arrived_s,
    )
    request = Request(spec, max_tokens=trace.output_tokens, sampling=_SAMPLING)
    request.queued_time_s = arrived_s
    return request


def resumed(request: Request) -> Request:
    """The same request for another scheduler, with the tokens that it has."""
    spec = RequestSpec(
        request_id=request.key[0],
        prompt_token_ids=request.token_ids[: request.num_prompt_tokens],
        params=_PARAMS,
        priority=request.priority,
        tenant=request.tenant,
        arrival_time_s=request.queued_time_s,
    )
    other = Request(spec, max_tokens=request.max_tokens, sampling=_SAMPLING)
    other.token_ids = request.token_ids[:]
    other.queued_time_s = request.queued_time_s
    return other


def told(
    request: Request,
    now_s: float,
    num_more: int,
    num_uncomputed: int,
    is_waiting: bool,
    is_migratable: bool,
) -> RequestSnapshot:
    """A request as policies see it, with `num_more` tokens than are noted."""
    return RequestSnapshot(
        request.key,
        request.num_tokens + num_more,
        num_uncomputed,
        request.priority,
        is_waiting,
        now_s - request.queued_time_s,
        is_migratable,
        request.num_prompt_tokens + request.max_tokens,
    )
