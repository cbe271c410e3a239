"""Combine attention over disjoint sets of keys into attention over all of them."""

from collections.abc import Sequence

import torch


def merge_attention(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial results, each normalised over its own keys, by their log-sum-exp.

    Args:
        outs: each [..., value_head_dim]. Rows of a part that saw no key may hold anything.
        lses: each [...], natural log-sum-exp of the part's logits; -inf where it saw no key.

    Returns:
        `out` [..., value_head_dim] of the parts' dtype and `lse` [...] of the lses' dtype, as
        if all keys had been seen at once. Where no part saw a key: zeros, and -inf.

    Source: FlashInfer, arXiv:2501.01005, section 2.2 (attention states and their composition).
    """
    lse = torch.stack(list(lses)).logsumexp(0)
    # -inf - -inf is NaN: rows without any key are weighed against 0 instead, giving exp(-inf).
    reference = lse.masked_fill(lse == -torch.inf, 0.0)
    merged = torch.zeros(outs[0].shape, dtype=lse.dtype, device=lse.device)
    for out, part in zip(outs, lses, strict=True):
        weight = (part - reference).exp().unsqueeze(-1)
        unseen = (part == -torch.inf).unsqueeze(-1)
        merged += (weight * out).masked_fill_(unseen, 0.0)  # 0 · NaN of an empty part is not 0
    return merged.to(outs[0].dtype), lse
