"""vkv's own CPU kernels: attention that reads a key and value once for all queries of a share.

A small C library (`native/`) over contiguous strided slots. Of how memory is arranged it knows the
strides of tokens, heads and slots alone.
"""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch

from ..vmem.errors import NativeUnavailable, UnsupportedAttention
from ..vmem.native_function import NativeFunction
from ..vmem.native_library import load_library, openmp_parallel
from .base import (
    AttentionBackend,
    AttentionBatch,
    Capabilities,
    LayerAttention,
    PastBatch,
    PerStep,
)

PART_TOKENS = 512  # the grid of sums, from token 0 on
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum vkv_dtype


class AttentionArgs(ctypes.Structure):
    """`struct vkv_attention` of `native/attention.h`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", "lse")),
        *((name, ctypes.c_void_p) for name in ("sinks", "workspace")),
        ("workspace_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("query_starts", "kv_lens", "slots")),
        *((name, ctypes.c_void_p) for name in ("positions", "first_parts", "sums", "sum_rows")),
        *((name, ctypes.c_int64) for name in ("query_token_stride", "query_head_stride")),
        ("key_slot_stride", ctypes.c_int64),
        ("key_token_stride", ctypes.c_int64),
        ("key_head_stride", ctypes.c_int64),
        ("value_slot_stride", ctypes.c_int64),
        ("value_token_stride", ctypes.c_int64),
        ("value_head_stride", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("out_token_stride", "out_head_stride")),
        *((name, ctypes.c_int32) for name in ("num_seqs", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int32) for name in ("key_dim", "value_dim", "dtype", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    )


class Rows(ctypes.Structure):
    """`struct vkv_rows` of `native/attention.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "cache")),
        *((name, ctypes.c_int64) for name in ("row_token_stride", "row_head_stride")),
        *((name, ctypes.c_int64) for name in ("slot_stride", "token_stride", "head_stride")),
        *((name, ctypes.c_int32) for name in ("num_heads", "dim", "item_bytes")),
    )


class Sequences(ctypes.Structure):
    """`struct vkv_sequences` of `native/attention.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query_starts", "kv_lens", "slots")),
        ("num_seqs", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL:
    """The kernels. Raises NativeUnavailable if they are not built and cannot be compiled here."""
    library = load_library(Path(__file__).parent)
    library.vkv_instruction_set.argtypes = [ctypes.c_int32]
    library.vkv_instruction_set.restype = ctypes.c_char_p
    return library


@dataclass(frozen=True)
class _Sequences:
    """The batch as the kernels read it: int32 on the host, kept alive for the step.

    Attributes:
        positions, first_parts, sum_rows: as of `struct vkv_attention`; None for all of a sequence.
    """

    query_starts: torch.Tensor
    kv_lens: torch.Tensor
    slots: torch.Tensor
    struct: Sequences
    positions: torch.Tensor | None = None
    first_parts: torch.Tensor | None = None
    sum_rows: torch.Tensor | None = None  # int64


class NativeBackend(AttentionBackend):
    name = "native"
    capabilities = Capabilities(
        devices=frozenset({"cpu"}), dtypes=frozenset(DTYPES), graphs=True, repeatable=True
    )

    def __init__(self) -> None:
        self._attend_kernel = NativeFunction(library(), "attend", AttentionArgs)
        self._store_kernel = NativeFunction(library(), "store", Rows, Sequences)
        self._parallel = openmp_parallel()
        self._sequences: PerStep[_Sequences] = PerStep()

    @classmethod
    def unavailable_reason(cls) -> str | None:
        try:
            library()
        except NativeUnavailable as error:
            return str(error)
        return None

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> None:
        sequences = self._sequences.get(batch, None, lambda: _on_host(batch))
        for rows, target in ((key, key_cache), (value, value_cache)):
            if rows.dtype != target.dtype:
                raise _mixed(f"new keys or values are {rows.dtype}", target)
            if rows.stride(2) != 1:
                rows = rows.contiguous()
            args = Rows(
                rows=rows.data_ptr(),
                cache=target.data_ptr(),
                row_token_stride=rows.stride(0),
                row_head_stride=rows.stride(1),
                slot_stride=target.stride(0),
                token_stride=target.stride(1),
                head_stride=target.stride(2),
                num_heads=rows.shape[1],
                dim=rows.shape[2],
                item_bytes=rows.element_size(),
            )
            self._store_kernel(args, sequences.struct)

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if out is None:
            out = query.new_empty(*query.shape[:2], value_cache.shape[3])
        sequences = self._sequences.get(batch, None, lambda: _on_host(batch))
        self._attend(query, key_cache, value_cache, sequences, layer, out)
        return out

    def forward_lse(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = query.new_empty(*query.shape[:2], value_cache.shape[3])
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        sequences = self._sequences.get(batch, None, lambda: _on_host(batch))
        self._attend(query, key_cache, value_cache, sequences, layer, out, lse)
        return out, lse

    def forward_past(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PastBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = query.new_empty(*query.shape[:2], value_cache.shape[3])
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        sequences = self._sequences.get(batch, None, lambda: _past_on_host(batch))
        plain = replace(layer, sinks=None)
        self._attend(query, key_cache, value_cache, sequences, plain, out, lse)
        return out, lse

    def sum_up(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch | PastBatch,
        layer: LayerAttention,
        first_parts: Sequence[int],
        sum_rows: Sequence[int],
        sums: torch.Tensor,
    ) -> None:
        """Fill `sums`, float32 [rows, num_heads, value_head_dim + 2], with the nodes of each
        sequence's keys (`native/sums.h`).

        Args:
            first_parts: which part of `PART_TOKENS` keys each sequence's slot begins with.
            sum_rows: the row of `sums` where each one's first node begins. A node has a row for
                each of its sequence's queries.
        """

        def build() -> _Sequences:
            on_host = _past_on_host(batch) if isinstance(batch, PastBatch) else _on_host(batch)
            parts = torch.tensor(first_parts, dtype=torch.int32)
            rows = torch.tensor(sum_rows, dtype=torch.int64)
            return replace(on_host, first_parts=parts, sum_rows=rows)

        assert sums.is_contiguous()
        assert sums.dtype == torch.float32
        sequences = self._sequences.get(batch, (*first_parts, *sum_rows), build)
        self._attend(query, key_cache, value_cache, sequences, layer, None, None, sums)

    def _attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        sequences: _Sequences,
        layer: LayerAttention,
        out: torch.Tensor | None,
        lse: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> None:
        """Fill `out` and, if given, `lse`; or `sums` alone."""
        if not query.dtype == key_cache.dtype == value_cache.dtype:
            other = key_cache if query.dtype != key_cache.dtype else value_cache
            raise _mixed(f"queries are {query.dtype}", other)
        if query.stride(2) != 1:
            query = query.contiguous()
        sinks = None if layer.sinks is None else layer.sinks.detach().float().contiguous()
        args = AttentionArgs(
            query=query.data_ptr(),
            keys=key_cache.data_ptr(),
            values=value_cache.data_ptr(),
            out=address(out),
            lse=address(lse),
            sinks=address(sinks),
            query_starts=sequences.query_starts.data_ptr(),
            kv_lens=sequences.kv_lens.data_ptr(),
            slots=sequences.slots.data_ptr(),
            positions=address(sequences.positions),
            first_parts=address(sequences.first_parts),
            sums=address(sums),
            sum_rows=address(sequences.sum_rows),
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            key_slot_stride=key_cache.stride(0),
            key_token_stride=key_cache.stride(1),
            key_head_stride=key_cache.stride(2),
            value_slot_stride=value_cache.stride(0),
            value_token_stride=value_cache.stride(1),
            value_head_stride=value_cache.stride(2),
            out_token_stride=0 if out is None else out.stride(0),
            out_head_stride=0 if out is None else out.stride(1),
            num_seqs=len(sequences.slots),
            num_heads=query.shape[1],
            num_kv_heads=key_cache.shape[2],
            key_dim=query.shape[2],
            value_dim=value_cache.shape[3],
            dtype=DTYPES[query.dtype],
            window=layer.window or 0,
            scale=layer.scale,
            softcap=layer.softcap or 0.0,
            num_threads=torch.get_num_threads(),
            parallel=self._parallel,
        )
        self._attend_kernel(args)


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers begin."""
    return None if tensor is None else tensor.data_ptr()


def _mixed(found: str, cache: torch.Tensor) -> UnsupportedAttention:
    return UnsupportedAttention(
        f"{found} and the cache is {cache.dtype}, and kernels take both for the same; load all of "
        "the model's weights in one dtype, such as dtype='bfloat16'"
    )


def _on_host(batch: AttentionBatch) -> _Sequences:
    return _sequences(batch.cu_seqlens_q, batch.seqused_k, batch.slot_ids)


def _past_on_host(batch: PastBatch) -> _Sequences:
    def int32(numbers: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.int32)

    sequences = _sequences(
        int32(accumulate(batch.query_lens, initial=0)), int32(batch.kv_lens), int32(batch.slots)
    )
    pairs = zip(batch.positions, batch.key_starts, strict=True)
    return replace(sequences, positions=int32(position - start for position, start in pairs))


def _sequences(
    query_starts: torch.Tensor, kv_lens: torch.Tensor, slots: torch.Tensor
) -> _Sequences:
    struct = Sequences(
        query_starts=query_starts.data_ptr(),
        kv_lens=kv_lens.data_ptr(),
        slots=slots.data_ptr(),
        num_seqs=len(slots),
    )
    return _Sequences(query_starts=query_starts, kv_lens=kv_lens, slots=slots, struct=struct)
