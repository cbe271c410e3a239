"""From logits to tokens.

In float32 and in this order, each step only where a request asks for it: penalties (repetition,
then frequency and presence), `logit_bias`, `min_tokens` (stop tokens become impossible),
`allowed_token_ids`, `bad_words` and `structured_outputs` (`logit_masks`), `temperature`, `top_k`,
`top_p`, `min_p`, and one draw. Greedy requests take the largest logit after the first four.

Two promises shape the code:

- *A sequence's token does not depend on the rest of the batch.* Its randomness is a number for
  every token of the vocabulary, a hash of (seed, sequence index, step, token), so there is no
  generator whose state could be shared, lost in a preemption or consumed by a failed step. The
  largest sum of log probability and noise wins (Gumbel's trick), so that a rounding of the logits
  changes few draws.
- *Filters are thresholds on values, not choices of indices.* Each of top-k, top-p and min-p finds
  the smallest logit it keeps, so tokens of equal logit are kept or dropped together, as in vLLM,
  in whatever order a sort leaves equals.

In this file a row is one sequence's logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cpu_kernels import kernels as native_kernels
from ..request.outputs import Logprob
from ..request.sampling_params import SamplingParams
from ..request.sampling_state import SamplingState
from .logit_masks import mask_logits
from .upload import is_ready, select_rows, upload

_NUM_LIKELY = 1024
"""Tokens that nearly always hold a top-p's mass; sorting so few is ten times as fast as all."""

_MAX_FLOAT32_ROWS = 64
"""Rows to widen to float32 and beyond at a time: bounds the memory beside the logits."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One row's token and, if its request asked, its log probabilities.

    Attributes:
        logprobs: of the token itself first, then of the top alternatives, likeliest first.
        is_finite: False if no token follows from the row; `token_id` then means nothing.
    """

    token_id: int
    logprobs: dict[int, Logprob] | None = None
    is_finite: bool = True


NO_TOKEN = (
    "no token can be chosen: the largest logit is not a finite number; the model's output "
    "overflowed or its weights are damaged (try a wider dtype), a penalty is out of all "
    "proportion, or min_tokens, allowed_token_ids, bad_words and structured_outputs together bar "
    "every token"
)
"""What is wrong with a row of which `SampledToken.is_finite` is False."""


@torch.no_grad()
def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[SampledToken]:
    """Choose the next token of every row and advance its state by it.

    `logits`: [batch, vocab] in any float dtype, on any device, left as they are; row i belongs to
    `states[i]`. Log probabilities are those of the raw logits, before any parameter acts.

    From a row with a NaN, a positive infinity or nothing but negative infinities no token
    follows: it is marked (`is_finite`), and its state stays. Other rows are not touched by that.
    """
    assert logits.ndim == 2, logits.shape
    assert len(logits) == len(states), (len(logits), len(states))
    if not states:
        return []
    # Waited for once.
    chosen, finite = choose(logits, states).tolist()
    sampled = _report(logits, chosen, finite, states)
    for state, token in zip(states, sampled, strict=True):
        if token.is_finite:
            state.advance(token.token_id)
    return sampled


@torch.no_grad()
def choose(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """The next token of every row, and whether it follows from the row (`is_finite`).

    As of `sample`, but int64 [2, batch], on the device of `logits`, which need not be waited for;
    no state is advanced.
    """
    adjusted = mask_logits(_adjust(logits, states), states)
    # One pass for the greedy token (the first of equals, as argmax) and for the check of the row:
    # the largest value of a row with a NaN is NaN.
    peaks, token_ids = adjusted.max(dim=-1)  # [batch] each
    rows = [i for i, state in enumerate(states) if not state.params.greedy]
    for start in range(0, len(rows), _MAX_FLOAT32_ROWS):
        some = rows[start : start + _MAX_FLOAT32_ROWS]
        where = upload(some, torch.long, logits.device)
        token_ids[where] = _draw(adjusted, where, peaks[where], [states[i] for i in some])
    return torch.stack([token_ids, peaks.isfinite().long()])


@torch.no_grad()
def prompt_logprobs(logits: Tensor, targets: Tensor, num_top: int) -> list[dict[int, Logprob]]:
    """The log probability of each prompt token, with the `num_top` likeliest at its position.

    `logits`: [tokens, vocab]; `targets`: [tokens], the token that came after each position. The
    first prompt token is nobody's target: its entry, None, is the caller's to put in front.
    """
    return _logprobs(logits, targets, [num_top] * len(targets))


def _adjust(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Penalties, bias and barred stop tokens; returns `logits` itself where no row asks."""
    penalised = [i for i, state in enumerate(states) if state.has_penalties]
    addends = [
        (row, token_id, value)
        for row, state in enumerate(states)
        for token_id, value in state.addends()
        if token_id < logits.shape[-1]  # of more embeddings than logits, some never come
    ]
    if not penalised and not addends:
        return logits
    adjusted = logits.to(torch.float32, copy=True)
    if penalised:
        some = [states[i] for i in penalised]
        where = upload(penalised, torch.long, logits.device)
        adjusted[where] = _penalise(adjusted[where], some)
    if addends:
        rows, token_ids, values = zip(*addends, strict=True)
        where = upload([rows, token_ids], torch.long, logits.device)
        # Accumulating: one token may have both a bias and a bar.
        added = upload(values, adjusted.dtype, logits.device)
        adjusted.index_put_((where[0], where[1]), added, accumulate=True)
    return adjusted


def _penalise(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """`logits` [rows, vocab] under each row's repetition, frequency and presence penalty.

    Source: repetition as in CTRL, arXiv:1909.05858, section 4.1, but with negative logits
    multiplied, as everyone does since; the others as in OpenAI's API.
    """
    histories = [state.history(logits.shape[-1], logits.device) for state in states]
    in_prompt = torch.stack([prompt for prompt, _ in histories])  # [rows, vocab]
    counts = torch.stack([output for _, output in histories])  # [rows, vocab]
    in_output = counts > 0
    repetition = _column(logits, [state.params.repetition_penalty for state in states])
    frequency = _column(logits, [state.params.frequency_penalty for state in states])
    presence = _column(logits, [state.params.presence_penalty for state in states])
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | in_output, repeated, logits)
    return logits - frequency * counts - presence * in_output


def _draw(logits: Tensor, rows: Tensor, peaks: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """One token for each of some `rows` of `logits`, by its own random numbers: [rows].

    `peaks` [rows] are the rows' largest values. Of a row with a NaN the token means nothing.
    """
    params = [state.params for state in states]
    peaks = peaks.float()
    temperatures = upload([p.temperature for p in params], torch.float32, logits.device)
    floors = _floors(logits, rows, peaks, temperatures, params)
    keys = upload([state.key() for state in states], torch.long, logits.device)
    if is_ready(logits.device) and native_kernels.available(logits.dtype):
        return native_kernels.draw(
            logits, rows, peaks=peaks, temperatures=temperatures, floors=floors, keys=keys
        )
    scaled = _scaled(logits[rows], peaks, temperatures)
    scores = scaled + gumbel_noise(keys, scaled.shape[-1])
    return scores.masked_fill_(scaled < floors[:, None], -math.inf).argmax(dim=-1)


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Numbers that follow Gumbel's distribution, float32 [keys, vocab]: `native/draw.c`'s.

    Source: arXiv:1411.0030, section 2, for what they are good for.
    """
    bits32 = 0xFFFFFFFF
    low, high = keys[:, None] & bits32, (keys[:, None] >> 32) & bits32
    x = (torch.arange(vocab_size, device=keys.device) ^ low) * 0x9E3779B1 & bits32
    x = (x ^ x >> 16) + high & bits32
    x = (x ^ x >> 16) * 0x7FEB352D & bits32
    x = (x ^ x >> 15) * 0x846CA68B & bits32
    x = x ^ x >> 16
    uniform = ((x >> 16).float() * 65536 + (x & 0xFFFF).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp_(max=1 - 2.0**-24)))


def _scaled(logits: Tensor, peaks: Tensor, temperatures: Tensor) -> Tensor:
    """Exponents of the weights that tokens are drawn by, float32 [rows, vocab]: at most 0.

    Peak first: then no temperature, however small, makes anything overflow.
    """
    return (logits.float() - peaks[:, None]) / temperatures[:, None]


def _floors(
    logits: Tensor,
    rows: Tensor,
    peaks: Tensor,
    temperatures: Tensor,
    params: Sequence[SamplingParams],
) -> Tensor:
    """The smallest exponent of each row that its top-k, top-p and min-p all keep: [rows].

    The largest exponent is 0, hence min-p needs no sum. -inf where nothing filters.
    """
    least = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
    floors = upload(least, torch.float32, logits.device)
    some = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if some:
        where = upload(some, torch.long, logits.device)
        scaled = _scaled(logits[rows[where]], peaks[where], temperatures[where])
        sorted_floors = _sorted_floors(scaled, [params[i] for i in some])
        floors[where] = torch.maximum(floors[where], sorted_floors)
    return floors


def _sorted_floors(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The floors of rows with a top-k, a top-p or both: [rows].

    Source: nucleus (top-p) sampling as in arXiv:1904.09751, section 3.1.
    """
    vocab_size, device = scaled.shape[-1], scaled.device
    k = [min(p.top_k or vocab_size, vocab_size) for p in params]
    top_k = upload(k, torch.long, device)[:, None]  # [rows, 1]
    top_p = _column(scaled, [p.top_p for p in params], torch.float64)
    total = _sum_rows(scaled.exp())
    num_likely = min(max(p.top_k or _NUM_LIKELY for p in params), vocab_size)
    # On a GPU, to see whether the likely ones were enough would be to wait for it.
    first = num_likely if is_ready(device) or max(k) <= num_likely else vocab_size
    for num_sorted in (first, vocab_size):
        values = _largest(scaled, num_sorted)  # [rows, num_sorted]
        beyond_k = torch.arange(num_sorted, device=device) >= top_k
        mass = values.exp().masked_fill_(beyond_k, 0.0).cumsum(dim=-1, dtype=torch.float64)
        held = mass[:, -1:]
        nucleus = top_p * torch.where(top_k < vocab_size, held, total)
        if max(k) <= num_sorted or not bool((held < nucleus).any()):
            break  # else the likely tokens hold too little in some row: sort them all
    # A token stays while those before it hold less than top_p of what top-k left.
    num_nucleus = (mass[:, :-1] < nucleus).sum(dim=-1, keepdim=True) + 1
    return values.gather(1, torch.minimum(top_k, num_nucleus) - 1).squeeze(1)


def _sum_rows(values: Tensor) -> Tensor:
    """The sum of each row in float64, [rows, 1], in an order that no other row has a say in.

    Of a single row PyTorch would give threads a part each.
    """
    columns = values.shape[-1] // 64
    parts = values[:, : 64 * columns].unflatten(1, (64, columns)).sum(dim=-1, dtype=torch.float64)
    rest = values[:, 64 * columns :].sum(dim=-1, dtype=torch.float64)
    return (parts.sum(dim=-1) + rest)[:, None]


def _largest(values: Tensor, num: int) -> Tensor:
    """The `num` largest of each row, descending."""
    if num < values.shape[-1]:
        return values.topk(num).values
    return values.sort(descending=True).values


def _report(
    logits: Tensor, chosen: Sequence[int], finite: Sequence[int], states: Sequence[SamplingState]
) -> list[SampledToken]:
    """Wrap the chosen tokens, with log probabilities for the rows that ask for them."""
    sampled = [
        SampledToken(token_id, is_finite=bool(is_finite))
        for token_id, is_finite in zip(chosen, finite, strict=True)
    ]
    asked = {
        i: k
        for i, state in enumerate(states)
        if (k := state.params.logprobs) is not None and finite[i]
    }
    if asked:
        rows = list(asked)
        token_ids = upload([chosen[row] for row in rows], torch.long, logits.device)
        tables = _logprobs(select_rows(logits, rows), token_ids, list(asked.values()))
        for row, table in zip(rows, tables, strict=True):
            sampled[row] = SampledToken(chosen[row], table)
    return sampled


def _logprobs(
    logits: Tensor, token_ids: Tensor, num_top: Sequence[int]
) -> list[dict[int, Logprob]]:
    """For each row of `logits` [rows, vocab]: its token, then its `num_top` likeliest tokens."""
    tables: list[dict[int, Logprob]] = []
    for start in range(0, len(num_top), _MAX_FLOAT32_ROWS):
        some = slice(start, start + _MAX_FLOAT32_ROWS)
        scores = logits[some].float().log_softmax(dim=-1)  # [some, vocab]
        tokens = token_ids[some].to(scores.device)[:, None]  # [some, 1]
        # Of more embeddings than logits, a prompt's token may have none.
        own = scores.gather(1, tokens.clamp(max=scores.shape[-1] - 1))  # [some, 1]
        own = own.masked_fill(tokens >= scores.shape[-1], -math.inf)
        own_ranks = (scores > own).sum(dim=-1, keepdim=True) + 1  # [some, 1]
        top = scores.topk(min(max(num_top[some]), scores.shape[-1]))  # [some, max(num_top)]
        values = torch.cat([own, top.values], dim=-1).tolist()
        ids = torch.cat([tokens, top.indices], dim=-1).tolist()
        ranks = own_ranks.squeeze(-1).tolist()
        tables += map(_table, ids, values, ranks, num_top[some])
    return tables


def _table(
    ids: Sequence[int], values: Sequence[float], own_rank: int, num_top: int
) -> dict[int, Logprob]:
    """One row's entries: `ids[0]` is the row's own token, the likeliest tokens follow in order."""
    table = {ids[0]: Logprob(values[0], own_rank)}
    rank = 1
    for position in range(1, min(num_top, len(ids) - 1) + 1):
        if position > 1 and values[position] < values[position - 1]:
            rank = position  # else it shares the rank of its equal
        table.setdefault(ids[position], Logprob(values[position], rank))
    return table


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """One value per row, as [rows, 1] on the device (and in the dtype) of `like`."""
    return upload(values, dtype or like.dtype, like.device)[:, None]
