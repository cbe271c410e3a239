"""What a request cost, as OpenAI's API counts it."""

from collections.abc import Sequence
from typing import Any

from ...frontend.text_stream import RequestText


def usage(texts: Sequence[RequestText], *, reasoning_tokens: int | None = None) -> dict[str, Any]:
    """Tokens of the prompts and of all outputs so far."""
    num_prompt = sum(len(text.spec.prompt_token_ids) for text in texts)
    num_output = sum(text.num_output_tokens for text in texts)
    told: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {
            "cached_tokens": sum(text.num_cached_tokens or 0 for text in texts)
        },
    }
    if reasoning_tokens is not None:
        told["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return told
