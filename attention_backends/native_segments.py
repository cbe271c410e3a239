"""Segments with vkv's own kernels: the bits of attention in one place, however keys are cut."""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..vmem.errors import InvalidOperation
from ..vmem.native_function import NativeFunction
from .base import LayerAttention, PastBatch, PerStep
from .native import DTYPES, PART_TOKENS, NativeBackend, address, library
from .segments import PartialAttention, SegmentedBatch


class MergeArgs(ctypes.Structure):
    """`struct vkv_merge` of `native/attention.h`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sums", "node_rows", "node_parts", "node_starts")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "out", "lse", "sinks")),
        *((name, ctypes.c_int64) for name in ("out_token_stride", "out_head_stride")),
        *((name, ctypes.c_int32) for name in ("num_seqs", "num_heads", "value_dim", "dtype")),
    )


@dataclass(frozen=True)
class _Nodes:
    """The nodes of a step's sequences, as `struct vkv_merge` reads them."""

    rows: torch.Tensor
    parts: torch.Tensor
    starts: torch.Tensor


class ByHalves(PartialAttention):
    """Sums of keys by halves, as `native` adds them up in one slot (`native/sums.h`).

    So a result does not depend on where its keys are, to the bit. Segments begin at multiples of
    `part_tokens`; of one with `n` times as many keys come at most `2 log2 n` rows a query.
    """

    num_extra = 2  # the peak that sums are relative to, and the weights' sum
    part_tokens = PART_TOKENS

    def __init__(self, backend: NativeBackend) -> None:
        self._backend = backend
        self._merge_kernel = NativeFunction(library(), "merge", MergeArgs)
        self._nodes: PerStep[_Nodes] = PerStep()
        self._own_places: PerStep[_Places] = PerStep()
        self._past_places: PerStep[_Places] = PerStep()

    def num_own_rows(self, step: SegmentedBatch) -> int:
        return _own_places(step).num_rows

    def num_past_rows(self, batch: PastBatch) -> int:
        return _past_places(batch).num_rows

    def attend_own(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        step: SegmentedBatch,
        layer: LayerAttention,
        results: torch.Tensor,
    ) -> None:
        places = self._own_places.get(step, None, lambda: _own_places(step))
        where = places.first_parts, places.first_rows
        self._backend.sum_up(query, key_cache, value_cache, step.own, layer, *where, results)

    def attend_past(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PastBatch,
        layer: LayerAttention,
        results: torch.Tensor,
    ) -> None:
        places = self._past_places.get(batch, None, lambda: _past_places(batch))
        if not places.num_rows:  # of no memory there is no address either
            return
        where = places.first_parts, places.first_rows
        self._backend.sum_up(query, key_cache, value_cache, batch, layer, *where, results)

    def merge(
        self,
        query: torch.Tensor,
        results: torch.Tensor,
        step: SegmentedBatch,
        layer: LayerAttention,
    ) -> torch.Tensor:
        nodes = self._nodes.get(step, None, lambda: self._nodes_of(step))
        sinks = None if layer.sinks is None else layer.sinks.detach().float().contiguous()
        value_dim = results.shape[2] - self.num_extra
        out = query.new_empty(*query.shape[:2], value_dim)
        args = MergeArgs(
            sums=results.data_ptr(),
            node_rows=nodes.rows.data_ptr(),
            node_parts=nodes.parts.data_ptr(),
            node_starts=nodes.starts.data_ptr(),
            query_starts=step.own.cu_seqlens_q.data_ptr(),
            out=out.data_ptr(),
            sinks=address(sinks),
            out_token_stride=out.stride(0),
            out_head_stride=out.stride(1),
            num_seqs=step.own.num_seqs,
            num_heads=query.shape[1],
            value_dim=value_dim,
            dtype=DTYPES[query.dtype],
        )
        self._merge_kernel(args)
        return out

    def _nodes_of(self, step: SegmentedBatch) -> _Nodes:
        found: list[list[tuple[int, int]]] = [[] for _ in step.key_starts]  # (part, row)
        places = [(range(step.own.num_seqs), _own_places(step))]
        places += [(sequences, _past_places(batch)) for sequences, batch in step.past]
        for rows, (sequences, place) in zip(self.slices(step), places, strict=True):
            for i, sequence in enumerate(sequences):
                row = rows.start + place.first_rows[i]
                for part in place.nodes[i]:
                    found[sequence].append((part, row))
                    row += step.own.query_lens[sequence]
        nodes = [node for of_one in found for node in sorted(of_one)]
        return _Nodes(
            rows=torch.tensor([row for _, row in nodes], dtype=torch.int64),
            parts=torch.tensor([part for part, _ in nodes], dtype=torch.int32),
            starts=torch.tensor(list(accumulate(map(len, found), initial=0)), dtype=torch.int32),
        )


@dataclass(frozen=True)
class _Places:
    """Of each sequence of a batch, the nodes that its keys make, and where they go.

    Attributes:
        nodes: the first part of each node.
        first_parts, first_rows: as of `NativeBackend.sum_up`.
        num_rows: of all.
    """

    nodes: list[list[int]]
    first_parts: list[int]
    first_rows: list[int]
    num_rows: int


def _own_places(step: SegmentedBatch) -> _Places:
    return _places(step.own.query_lens, step.key_starts, step.own.kv_lens)


def _past_places(batch: PastBatch) -> _Places:
    return _places(batch.query_lens, batch.key_starts, batch.kv_lens)


def _places(query_lens: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> _Places:
    parts = [_part(start) for start in starts]
    nodes = [
        list(_nodes(part, part - (-length // PART_TOKENS)))
        for part, length in zip(parts, lengths, strict=True)
    ]
    counts = [n * len(of_one) for n, of_one in zip(query_lens, nodes, strict=True)]
    *rows, num_rows = accumulate(counts, initial=0)
    return _Places(nodes, parts, rows, num_rows)


def _part(start: int) -> int:
    """The part that begins at a token."""
    if start % PART_TOKENS:
        raise InvalidOperation(
            f"a segment begins at token {start}; cut at multiples of {PART_TOKENS}, or its sums "
            "would be others than in one slot"
        )
    return start // PART_TOKENS


def _nodes(part: int, last: int) -> Iterator[int]:
    """The first parts of the fewest nodes that the parts from `part` to `last` are made of."""
    while part < last:
        yield part
        size = part & -part or 1 << 30
        while part + size > last:
            size >>= 1
        part += size
