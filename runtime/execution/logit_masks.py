"""Tokens that must not come: `allowed_token_ids`, `bad_words` and `structured_outputs`."""

import functools
import math
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..request.sampling_state import SamplingState
from ..request.token_grammar import TokenGrammar, allowed_bits
from .upload import is_ready, upload, upload_array


def mask_logits(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Negative infinity where a row's sequence bars a token; `logits` itself where none does.

    `logits` [batch, vocab] are left as they are; row i belongs to `states[i]`.
    """
    grammars = {row: s.grammar for row, s in enumerate(states) if s.grammar is not None}
    return _follow(_bar(logits, states), grammars)


def _bar(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """`logits` without what `TokenBars` bar."""
    rows = [row for row, state in enumerate(states) if state.bars is not None]
    if not rows:
        return logits
    bars = [bar for state in states if (bar := state.bars) is not None]
    vocab_size, device = logits.shape[-1], logits.device
    masks = torch.stack([bar.mask(vocab_size, device) for bar in bars])  # [rows, vocab]
    ends = [
        (i, token_id)
        for i, bar in enumerate(bars)
        for token_id in bar.now()
        if token_id < vocab_size
    ]
    if ends:
        where = upload(list(zip(*ends, strict=True)), torch.long, device)
        masks[where[0], where[1]] = True
    where = upload(rows, torch.long, device)
    masked = logits.clone()
    masked[where] = logits[where].masked_fill_(masks, -math.inf)
    return masked


def _follow(logits: Tensor, grammars: Mapping[int, TokenGrammar]) -> Tensor:
    """`logits` without what the rows' grammars do not allow next."""
    if not grammars:
        return logits
    some = allowed_bits(list(grammars.values()))
    bits = np.full((len(logits), some.shape[1]), -1, dtype=np.int32)  # the other rows: all
    bits[list(grammars)] = some
    vocab_size = logits.shape[-1]
    if is_ready(logits.device):
        # Several times as fast as to fill by a mask. A barred NaN stays, and its row fails.
        return logits + torch.from_numpy(_addends(bits)[:, :vocab_size])
    words = upload_array(bits, logits.device)[:, :, None]  # of 32 tokens each
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (words >> shifts & 1).bool().flatten(1)[:, :vocab_size]
    return logits.masked_fill(~allowed, -math.inf)


_kept = threading.local()  # memory for addends: new memory would be cleared page by page


def _addends(bits: np.ndarray) -> np.ndarray:
    """What to add to logits, by the tokens' `bits` [rows, words]: float32 [rows, tokens].

    Good until the next call on this thread.
    """
    shape = (*bits.view(np.uint8).shape, 8)
    addends: np.ndarray | None = getattr(_kept, "addends", None)
    if addends is None or addends.shape != shape:
        addends = _kept.addends = np.empty(shape, dtype=np.float32)
    # All bytes are in the table; another mode would copy what it writes.
    np.take(_addends_by_byte(), bits.view(np.uint8), axis=0, out=addends, mode="clip")
    return addends.reshape(len(bits), -1)


@functools.cache
def _addends_by_byte() -> np.ndarray:
    """For each byte of a mask, what to add to the logits of its tokens: float32 [256, 8]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = np.where(bits, np.float32(0), np.float32(-np.inf))
    table.flags.writeable = False
    return table
