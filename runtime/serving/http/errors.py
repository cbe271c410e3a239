"""What went wrong, as HTTP and its protocols say it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ....vmem.errors import (
    EngineDied,
    InvalidOperation,
    RequestTooLarge,
    RequestTooLong,
    Shortage,
    UsageError,
    VkvError,
)
from ...execution.sampler import NO_TOKEN


@dataclass(eq=False)
class ApiError(Exception):
    """A refusal with its status.

    Attributes:
        status: of HTTP.
        message: names the value and the remedy.
        code: for programs, such as "model_not_found".
        param: the field that is wrong, if it is one.
        retry_after_s: when to try again, for what is short for the moment.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    more_headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        headers = dict(self.more_headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers

    @property
    def kind(self) -> str:
        """OpenAI's name for the kind of error."""
        return _KINDS.get(self.status, "server_error" if self.status >= 500 else _INVALID)

    def body(self) -> dict[str, Any]:
        """As OpenAI's API writes it."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic_body(self) -> dict[str, Any]:
        """As Anthropic's API writes it."""
        kind = _ANTHROPIC_KINDS.get(self.status, "api_error")
        if self.status in (400, 413, 422):
            kind = "invalid_request_error" if self.status != 413 else "request_too_large"
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def internal_error() -> ApiError:
    """What nobody thought of."""
    return ApiError(500, "the server failed; its log says how", "internal_error")


_TOO_LONG = (RequestTooLong, RequestTooLarge)  # agents shorten conversations by their code
_INVALID = "invalid_request_error"
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def refusal(error: VkvError) -> ApiError:
    """What a request's error comes to."""
    if isinstance(error, _TOO_LONG):
        return ApiError(400, str(error), "context_length_exceeded")
    if isinstance(error, UsageError):
        return ApiError(400, str(error), "invalid_value")
    if isinstance(error, Shortage):
        return ApiError(503, str(error), "out_of_memory", retry_after_s=5)
    if isinstance(error, EngineDied):
        return ApiError(503, str(error), "engine_dead", retry_after_s=5)
    if str(error) == NO_TOKEN:  # logits that the request's own parameters barred, as a rule
        return ApiError(400, str(error), "no_token")
    if isinstance(error, InvalidOperation):
        return ApiError(503, str(error), "unavailable", retry_after_s=5)
    return ApiError(500, str(error), "engine_error")
