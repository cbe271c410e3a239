"""What all shapes share, and how a route names its own."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    """An object of which every field is known."""

    model_config = ConfigDict(extra="forbid")


class ErrorInfo(Shape):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Shape):
    """A refusal, as OpenAI's API writes it."""

    error: ErrorInfo


class AnthropicErrorInfo(Shape):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(Shape):
    """A refusal, as Anthropic's API writes it."""

    type: Literal["error"]
    error: AnthropicErrorInfo


_EACH = (401, 500, 503)
_BODY = (400, 408, 413)
_WORK = (404, 429)
_WHY = {
    400: "Something in the request is wrong, and the message says what to do.",
    401: "No key was shown, or one that is not known.",
    404: "There is no such model, or nothing under that name.",
    403: "It would change what other tenants use.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "One key holds its share of the places.",
    500: "The engine failed.",
    503: "The model loads, the server shuts down, or there is no place.",
}

Responses = dict[int | str, dict[str, Any]]


def described(
    shape: type[Shape] | None,
    *more: int,
    body: bool = False,
    work: bool = False,
    stream: bool = False,
    error: type[Shape] = Error,
) -> Responses:
    """A route's answers, by status.

    Args:
        shape: of the answer; None if there is never one.
        more: statuses of errors that it may have beside those of every route.
        body: it reads a body, which may be wrong or too large.
        work: it has the model work.
        stream: it may answer by events.
        error: the shape of its errors.
    """
    statuses = {*_EACH, *more, *(_BODY if body else ()), *(_WORK if work else ())}
    told: Responses = {
        status: {"model": error, "description": _WHY[status]} for status in sorted(statuses)
    }
    if shape is not None:
        told[200] = {"model": shape, "description": "The answer."}
    if stream:
        told[200]["content"] = {"text/event-stream": {}}
    return told
