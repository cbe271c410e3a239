"""Random attention problems for the backend tests: ragged batches over hostile caches.

Every row that a backend must not read is NaN: rows past each length, slots of nobody, other
layers of an interleaved allocation. One NaN in a result means one stray read.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from vkv.attention_backends import AttentionBackend, AttentionBatch, LayerAttention

BLOCK_SIZE = 16
SPARE_SLOTS = 2
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. `chunks` holds (query_len, kv_len) a sequence."""

    chunks: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    key_dim: int = 16
    value_dim: int | None = None  # None: as key_dim
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    interleaved: bool = False
    paged: bool = False
    block_size: int = BLOCK_SIZE
    readable_tile: int = 1  # rows up to a multiple of it are finite: a declared over-read
    max_len_multiple: int = 1
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A case made of tensors, in the order `AttentionBackend.forward` takes them."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    batch: AttentionBatch
    layer: LayerAttention
    case: Case = field(repr=False)

    @property
    def args(self) -> tuple:
        return self.query, self.key_cache, self.value_cache, self.batch, self.layer


def make_problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.seed)
    value_dim = case.value_dim or case.key_dim
    query_lens, kv_lens = zip(*case.chunks, strict=True)
    query = torch.randn(sum(query_lens), case.num_heads, case.key_dim, generator=generator)
    sinks = torch.randn(case.num_heads, generator=generator).to(case.device)
    make_cache = _paged_cache if case.paged else _slot_cache
    keys, values, places = make_cache(case, value_dim, kv_lens, generator)
    layer = LayerAttention(
        scale=case.key_dim**-0.5,
        window=case.window,
        softcap=case.softcap,
        sinks=sinks if case.sinks else None,
    )
    return Problem(
        query=query.to(case.device, case.dtype),
        key_cache=keys,
        value_cache=values,
        batch=_batch(query_lens, kv_lens, places, case),
        layer=layer,
        case=case,
    )


def _slot_cache(
    case: Case, value_dim: int, kv_lens: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Caches [num_slots, max_len, num_kv_heads, head_dim], and each sequence's slot."""
    tile = case.readable_tile
    granule = math.lcm(tile, case.max_len_multiple)
    max_len = -(-(max(kv_lens) + 3) // granule) * granule
    num_slots = len(kv_lens) + SPARE_SLOTS
    slots = torch.randperm(num_slots, generator=generator)[: len(kv_lens)].tolist()
    widths = case.num_kv_heads * case.key_dim, case.num_kv_heads * value_dim
    options = {"dtype": case.dtype, "device": case.device}
    if case.interleaved:  # [slot][token][layer][K then V]: the middle one of three layers
        whole = torch.full((num_slots, max_len, 3, sum(widths)), torch.nan, **options)
        flat = whole[:, :, 1, : widths[0]], whole[:, :, 1, widths[0] :]
    else:
        flat = tuple(torch.full((num_slots, max_len, w), torch.nan, **options) for w in widths)
    keys, values = (part.unflatten(2, (case.num_kv_heads, -1)) for part in flat)
    for slot, kv_len in zip(slots, kv_lens, strict=True):
        readable = -(-kv_len // tile) * tile
        for cache in (keys, values):
            cache[slot, :readable] = torch.randn(cache[slot, :readable].shape, generator=generator)
    return keys, values, slots


def _paged_cache(
    case: Case, value_dim: int, kv_lens: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """The same rows as `_slot_cache` with the same seed, in shuffled blocks; block lists."""
    keys, values, slots = _slot_cache(replace(case, paged=False), value_dim, kv_lens, generator)
    counts = [-(-kv_len // case.block_size) for kv_len in kv_lens]
    free = torch.randperm(sum(counts) + 1, generator=generator).tolist()
    tables = [[free.pop() for _ in range(count)] for count in counts]
    paged = []
    for cache in (keys, values):
        shape = (sum(counts) + 1, case.block_size, *cache.shape[2:])
        blocks = torch.full(shape, torch.nan, dtype=case.dtype, device=case.device)
        for slot, table, kv_len in zip(slots, tables, kv_lens, strict=True):
            for token in range(kv_len):
                blocks[table[token // case.block_size], token % case.block_size] = cache[
                    slot, token
                ]
        paged.append(blocks)
    return paged[0], paged[1], tables


def _batch(
    query_lens: tuple[int, ...], kv_lens: tuple[int, ...], places: list, case: Case
) -> AttentionBatch:
    def int32(values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=case.device)

    tables = None
    slots = list(places)
    if case.paged:
        widest = max(len(table) for table in places)
        tables = int32([table + [0] * (widest - len(table)) for table in places])
        slots = [0] * len(places)
    offsets = [0]
    for query_len in query_lens:
        offsets.append(offsets[-1] + query_len)
    nowhere = torch.empty(0, dtype=torch.int64)
    return AttentionBatch(
        query_lens=query_lens,
        kv_lens=kv_lens,
        slots=tuple(slots),
        cu_seqlens_q=int32(offsets),
        seqused_k=int32(list(kv_lens)),
        slot_ids=int32(slots),
        write_index=(nowhere, nowhere),
        block_tables=tables,
    )


def assert_matches(backend: AttentionBackend, truth: AttentionBackend, problem: Problem) -> None:
    """`backend` computes what `truth` does, with and without the LSE, within the rounding."""
    expected, expected_lse = truth.forward_lse(*problem.args)
    assert expected.isfinite().all(), "the case itself reads a poisoned row"
    rounding = TOLERANCE[problem.case.dtype]
    with_lse, lse = backend.forward_lse(*problem.args)
    for out in (backend.forward(*problem.args), with_lse):
        assert out.dtype == problem.case.dtype
        torch.testing.assert_close(out, expected, atol=rounding, rtol=rounding)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse, atol=max(rounding / 10, 2e-5), rtol=1e-5)
