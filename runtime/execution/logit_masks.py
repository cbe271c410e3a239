"""Tokens that must not come: `allowed_token_ids`, `bad_words` and `structured_outputs`."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..request.sampling_state import SamplingState
from ..request.token_bars import TokenBars
from ..request.token_grammar import TokenGrammar, allowed_bits
from .upload import is_ready, upload, upload_array


def mask_logits(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Negative infinity where a row's sequence bars a token; `logits` itself where none does.

    `logits` [batch, vocab] are left as they are; row i belongs to `states[i]`.
    """
    bars = {row: state.bars for row, state in enumerate(states) if state.bars is not None}
    grammars = {row: s.grammar for row, s in enumerate(states) if s.grammar is not None}
    if not bars and not grammars:
        return logits
    barred = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    if bars:
        where = upload(list(bars), torch.long, logits.device)
        barred[where] = _of_bars(list(bars.values()), logits.shape[-1], logits.device)
    if grammars:
        where = upload(list(grammars), torch.long, logits.device)
        barred[where] |= _of_grammars(list(grammars.values()), logits.shape[-1], logits.device)
    return logits.masked_fill(barred, -math.inf)


def _of_bars(bars: Sequence[TokenBars], vocab_size: int, device: torch.device) -> Tensor:
    """True where a token is barred: bool [bars, vocab_size]."""
    masks = torch.stack([bar.mask(vocab_size, device) for bar in bars])
    ends = [
        (i, token_id)
        for i, bar in enumerate(bars)
        for token_id in bar.now()
        if token_id < vocab_size
    ]
    if ends:
        where = upload(list(zip(*ends, strict=True)), torch.long, device)
        masks[where[0], where[1]] = True
    return masks


def _of_grammars(grammars: Sequence[TokenGrammar], vocab_size: int, device: torch.device) -> Tensor:
    """True where a token cannot go on an output: bool [grammars, vocab_size]."""
    barred = ~allowed_bits(grammars)
    if is_ready(device):
        bits = np.unpackbits(barred.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    # Eight times as little to copy; a word has the bits of 32 tokens.
    words = upload_array(barred, device)[:, :, None]
    bits = words >> torch.arange(32, dtype=torch.int32, device=device) & 1
    return bits.bool().flatten(1)[:, :vocab_size]
