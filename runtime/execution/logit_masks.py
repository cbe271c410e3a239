"""Tokens that must not come: `allowed_token_ids` and `bad_words`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..request.sampling_state import SamplingState
from .upload import upload


def mask_logits(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Negative infinity where a row's sequence bars a token; `logits` itself where none does.

    `logits` [batch, vocab] are left as they are; row i belongs to `states[i]`.
    """
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
