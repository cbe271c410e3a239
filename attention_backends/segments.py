"""Attention of sequences whose keys lie in several places, and the merge of what each gives.

Each place computes attention over its *segment*, a stretch of a sequence's keys, and gives a few
numbers a query and head (`attend_past`). The sequence's owner does the same over the keys that it
has itself, the last ones (`attend_own`), and makes the whole of them (`merge`). Only queries and
results travel, and never keys or values.

Source: DistAttention, Infinite-LLM, arXiv:2401.02669, section 4.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from .base import AttentionBackend, AttentionBatch, LayerAttention, PastBatch
from .merge import merge_attention
from .sinks import apply_sinks


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentedBatch:
    """A step's queries, with the keys that are here and those that are elsewhere.

    Attributes:
        own: all sequences. Their lengths count the keys that are here: the last ones, in rows
            0, 1, … of a slot.
        key_starts: of each sequence, the position of the first of these; 0 if all are here.
        past: stretches that are elsewhere, by where: which sequences (as of `own`), and the batch
            that has a sequence for each; several may be of one sequence. Together with `own` they
            are all keys, each once; what is behind every query's window may be missing.
    """

    own: AttentionBatch
    key_starts: tuple[int, ...]
    past: tuple[tuple[tuple[int, ...], PastBatch], ...]


def queries_of(batch: AttentionBatch, sequences: Sequence[int]) -> torch.Tensor:
    """Indices, int64, of the flat queries of some sequences of a batch."""
    return rows_of(batch.query_lens, sequences)


def rows_of(query_lens: Sequence[int], sequences: Sequence[int]) -> torch.Tensor:
    """Indices, int64, of the flat queries of some of several sequences."""
    starts = list(accumulate(query_lens, initial=0))
    return torch.tensor([i for b in sequences for i in range(starts[b], starts[b + 1])])


def _rounds(sequences: Sequence[int]) -> list[list[int]]:
    """Places in `sequences`, in lists of which each has a sequence once at most."""
    rounds: list[list[int]] = []
    seen: Counter[int] = Counter()
    for place, sequence in enumerate(sequences):
        if seen[sequence] == len(rounds):
            rounds.append([])
        rounds[seen[sequence]].append(place)
        seen[sequence] += 1
    return rounds


class PartialAttention(ABC):
    """What is computed over a segment, as plain numbers that can be sent, and how it is merged.

    Results are [rows, num_heads, value_head_dim + num_extra], of float32 or wider (`empty`); how
    many rows a batch has depends on its numbers alone, so that both ends know.

    Attributes:
        num_extra: numbers of a row beside the values.
        part_tokens: segments begin at multiples of it.
    """

    num_extra: int
    part_tokens: int

    @abstractmethod
    def num_own_rows(self, step: SegmentedBatch) -> int:
        """Rows of `attend_own`."""

    @abstractmethod
    def num_past_rows(self, batch: PastBatch) -> int:
        """Rows of `attend_past`."""

    def empty(self, query: torch.Tensor, num_rows: int, value_dim: int) -> torch.Tensor:
        """Where results for `query` go."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        return query.new_empty(num_rows, query.shape[1], value_dim + self.num_extra, dtype=dtype)

    def slices(self, step: SegmentedBatch) -> list[slice]:
        """Which rows of a step's results are those of its own keys, and of each of its `past`."""
        counts = [self.num_own_rows(step), *(self.num_past_rows(batch) for _, batch in step.past)]
        slices, start = [], 0
        for count in counts:
            slices.append(slice(start, start + count))
            start += count
        return slices

    @abstractmethod
    def attend_own(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        step: SegmentedBatch,
        layer: LayerAttention,
        results: torch.Tensor,
    ) -> None:
        """Fill `results` over the keys that are here; arguments as of `AttentionBackend`."""

    @abstractmethod
    def attend_past(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PastBatch,
        layer: LayerAttention,
        results: torch.Tensor,
    ) -> None:
        """Fill `results` over a segment. Sinks are left to the merge."""

    @abstractmethod
    def merge(
        self,
        query: torch.Tensor,
        results: torch.Tensor,
        step: SegmentedBatch,
        layer: LayerAttention,
    ) -> torch.Tensor:
        """Attention over all keys, [num_tokens, num_heads, value_head_dim], of the query's dtype.

        `results` are all of a step's, as `slices` has them; they are used up. The layer's sinks
        are applied here, once.
        """


class ByLogSumExp(PartialAttention):
    """With any backend that returns the log-sum-exp: normalised results, merged by it.

    Equal to attention over all keys at once up to rounding.
    """

    num_extra = 1
    part_tokens = 1

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def num_own_rows(self, step: SegmentedBatch) -> int:
        return step.own.num_tokens

    def num_past_rows(self, batch: PastBatch) -> int:
        return batch.num_tokens

    def attend_own(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        step: SegmentedBatch,
        layer: LayerAttention,
        results: torch.Tensor,
    ) -> None:
        plain = LayerAttention(scale=layer.scale, window=layer.window, softcap=layer.softcap)
        out, lse = self._backend.forward_lse(query, key_cache, value_cache, step.own, plain)
        results[..., :-1], results[..., -1] = out, lse

    def attend_past(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PastBatch,
        layer: LayerAttention,
        results: torch.Tensor,
    ) -> None:
        out, lse = self._backend.forward_past(query, key_cache, value_cache, batch, layer)
        results[..., :-1], results[..., -1] = out, lse

    def merge(
        self,
        query: torch.Tensor,
        results: torch.Tensor,
        step: SegmentedBatch,
        layer: LayerAttention,
    ) -> torch.Tensor:
        own, *others = self.slices(step)
        outs, lses = [results[own][..., :-1]], [results[own][..., -1]]
        for (sequences, batch), rows in zip(step.past, others, strict=True):
            for members in _rounds(sequences):
                queries = queries_of(step.own, [sequences[i] for i in members])
                found = rows_of(batch.query_lens, members) + rows.start
                whole = torch.full_like(results[own], -torch.inf)  # most see nothing of this part
                whole[queries.to(results.device)] = results[found.to(results.device)]
                outs.append(whole[..., :-1])
                lses.append(whole[..., -1])
        out, lse = merge_attention(outs, lses)
        if layer.sinks is not None:
            apply_sinks(out, lse, layer.sinks)
        return out.to(query.dtype)
