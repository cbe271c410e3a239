"""What callers may pass as prompts, brought into one form."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from ...vmem.errors import InvalidPrompt, InvalidSamplingParams
from ..request.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. Raises InvalidPrompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidPrompt(
            f"prompts is a {type(prompts).__name__}; give a text, a list of token ids, or a list "
            "of either"
        )
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_token_ids(prompt: Sequence[int]) -> list[int]:
    """Plain integers. Raises InvalidPrompt."""
    if not isinstance(prompt, Sequence) or any(type(token) is not int for token in prompt):
        raise InvalidPrompt(
            f"{reprlib.repr(prompt)} is neither a text nor a list of token ids, which are plain "
            "integers; call .tolist() on an array"
        )
    return list(prompt)


def params_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Parameters for each of `count` prompts. Raises InvalidSamplingParams."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidSamplingParams(
            f"{len(params)} sampling parameters for {count} prompts; give one, or one for each"
        )
    return list(params)
