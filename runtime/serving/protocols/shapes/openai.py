"""Answers of `/v1/chat/completions` and `/v1/completions`."""

from typing import Literal

from .base import Shape

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class TokenLogprob(Shape):
    """A token that might have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token that was."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Shape):
    """An entry for each token."""

    content: list[ChosenLogprob]


class PromptLogprob(Shape):
    """A token of the prompt, or one that might have stood there."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CalledFunction(Shape):
    """What is called; its arguments are JSON if the model came to its end."""

    name: str
    arguments: str


class ToolCall(Shape):
    """A call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Shape):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Shape):
    """One output."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class CachedTokens(Shape):
    """Tokens of the prompt that were known."""

    cached_tokens: int


class ReasoningTokens(Shape):
    """Tokens of thoughts."""

    reasoning_tokens: int


class Usage(Shape):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None


class ChatCompletion(Shape):
    """An answered conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(Shape):
    """Four lists, with an entry for each token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Shape):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Shape):
    """Prompts gone on with."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
