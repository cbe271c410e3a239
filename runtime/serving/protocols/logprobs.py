"""Log probabilities as OpenAI's two APIs write them."""

from collections.abc import Sequence
from typing import Any

from ...frontend.text_stream import RequestText, StreamDelta
from ...request.outputs import Logprob

_LEAST = -9999.0  # JSON has no infinities


def chat_logprobs(delta: StreamDelta, num_top: int) -> list[dict[str, Any]]:
    """An entry for each token: itself, and the `num_top` likeliest at its place; -1 for all."""
    entries = []
    most = None if num_top == -1 else num_top
    for token_id, table in zip(delta.token_ids, delta.logprobs or (), strict=False):
        likely = sorted(table.values(), key=lambda entry: -entry.logprob)[:most]
        entries.append(
            {**_entry(table[token_id]), "top_logprobs": [_entry(entry) for entry in likely]}
        )
    return entries


def _entry(logprob: Logprob) -> dict[str, Any]:
    text = logprob.decoded_token or ""
    return {
        "token": text,
        "logprob": max(logprob.logprob, _LEAST),
        "bytes": list(text.encode()),
    }


def completion_logprobs(
    token_ids: Sequence[int],
    tables: Sequence[dict[int, Logprob] | None],
    begin: int,
    first: str = "",
) -> dict[str, Any]:
    """The four lists of the older API.

    Args:
        tables: None for a prompt's first token, of which nothing is known but its text, `first`.
        begin: where in the text the first token begins.
    """
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, table in zip(token_ids, tables, strict=True):
        offsets.append(begin)
        if table is None:
            tokens.append(first)
            token_logprobs.append(None)
            top.append(None)
            begin += len(first)
            continue
        own = table[token_id]
        tokens.append(own.decoded_token or "")
        token_logprobs.append(max(own.logprob, _LEAST))
        top.append(
            {e.decoded_token or f"token_id:{i}": max(e.logprob, _LEAST) for i, e in table.items()}
        )
        begin += len(tokens[-1])
    return {
        "text_offset": offsets,
        "token_logprobs": token_logprobs,
        "tokens": tokens,
        "top_logprobs": top,
    }


def prompt_logprobs(text: RequestText) -> list[dict[str, Any] | None] | None:
    """The prompt's log probabilities, as vLLM writes them."""
    tables = text.output().prompt_logprobs
    if tables is None:
        return None
    return [
        None
        if table is None
        else {
            str(token): {
                "logprob": max(entry.logprob, _LEAST),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token, entry in table.items()
        }
        for table in tables
    ]
