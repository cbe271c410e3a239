"""Requests as a policy sees them."""

from collections.abc import Container, Iterable

from ..request.request import Request
from .snapshot import RunningRequest, WaitingRequest


def running_view(
    requests: Iterable[Request], held: Container[Request] = ()
) -> tuple[RunningRequest, ...]:
    """Those that run; of which nothing goes on whose tokens come back still, nor those `held`."""
    return tuple(
        RunningRequest(
            r.key,
            r.num_tokens,
            0 if r.is_complete or r.slot is None or r in held else r.num_uncomputed,
            r.priority,
            r.waited_s,
            r.tenant,
        )
        for r in requests
    )


def waiting_view(requests: Iterable[Request], now_s: float) -> tuple[WaitingRequest, ...]:
    """Those without, as old as they are now."""
    return tuple(
        WaitingRequest(
            r.key, r.num_tokens, r.was_admitted, r.priority, now_s - r.queued_time_s, r.tenant
        )
        for r in requests
    )
