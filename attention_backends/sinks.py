"""Attention sinks, applied to a result that was computed without them.

A sink is one extra logit a head that takes probability but has no value (GPT-OSS). It adds
exp(sink) to the softmax's denominator and nothing to its numerator, so both corrections are
exact, and no kernel needs to know of sinks as long as it returns the log-sum-exp.
"""

import torch


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Scale `out` in place by exp(lse) / (exp(lse) + exp(sink)).

    Args:
        out: [num_tokens, num_heads, value_head_dim], without sinks.
        lse: [num_tokens, num_heads], without sinks.
        sinks: [num_heads], any float dtype.
    """
    return out.mul_(torch.sigmoid(lse - sinks.to(lse.dtype)).unsqueeze(-1))


def sinks_lse(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp [num_tokens, num_heads] with each head's sink as part of the sum."""
    return torch.logaddexp(lse, sinks.to(lse.dtype))
