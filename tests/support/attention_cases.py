"""Random attention problems for the backend tests: ragged batches over hostile caches.

Every row that a backend must not read is NaN: rows past each length, slots of nobody, other
layers of an interleaved allocation. One NaN in a result means one stray read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from vkv.attention_backends import (
    AttentionBackend,
    AttentionBatch,
    LayerAttention,
    PartialAttention,
    PastBatch,
    SegmentedBatch,
)

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


@dataclass(frozen=True, kw_only=True)
class CutProblem:
    """A problem whose keys lie in several caches: those of the last ones, and of each segment."""

    problem: Problem
    step: SegmentedBatch
    own: tuple[torch.Tensor, torch.Tensor]
    places: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def solve(self, partial: PartialAttention) -> torch.Tensor:
        """Attend to each part by itself, and merge."""
        query, layer, step = self.problem.query, self.problem.layer, self.step
        own_rows, *past_rows = slices = partial.slices(step)
        results = partial.empty(query, slices[-1].stop, self.own[1].shape[3]).fill_(torch.nan)
        partial.attend_own(query, *self.own, step, layer, results[own_rows])
        starts = [sum(step.own.query_lens[:b]) for b in range(step.own.num_seqs)]
        for (members, batch), rows, caches in zip(step.past, past_rows, self.places, strict=True):
            queries = [query[starts[b] : starts[b] + step.own.query_lens[b]] for b in members]
            partial.attend_past(torch.cat(queries), *caches, batch, layer, results[rows])
        return partial.merge(query, results, step, layer)


def cut_problem(problem: Problem, cuts: Sequence[Sequence[int]]) -> CutProblem:
    """Cut the keys of each sequence of a contiguous problem.

    Args:
        cuts: of each sequence, where segments end, in order, none behind its first query; equal
            ones make empty segments. Each segment lies in a cache of its own, among NaN.
    """
    batch = problem.batch
    firsts = [n - q for q, n in zip(batch.query_lens, batch.kv_lens, strict=True)]
    starts = [stops[-1] if stops else 0 for stops in cuts]
    own_lens = [n - start for n, start in zip(batch.kv_lens, starts, strict=True)]
    past, places = [], []
    for index in range(max(map(len, cuts))):
        members = tuple(b for b, stops in enumerate(cuts) if index < len(stops))
        stops = [cuts[b][index] for b in members]
        begins = [cuts[b][index - 1] if index else 0 for b in members]
        slots = tuple(range(len(members)))[::-1]
        places.append(
            tuple(
                _stretches(cache, [batch.slots[b] for b in members], begins, stops, slots)
                for cache in (problem.key_cache, problem.value_cache)
            )
        )
        past.append(
            (
                members,
                PastBatch(
                    query_lens=tuple(batch.query_lens[b] for b in members),
                    positions=tuple(firsts[b] for b in members),
                    key_starts=tuple(begins),
                    key_stops=tuple(stops),
                    slots=slots,
                ),
            )
        )
    own_slots = list(range(batch.num_seqs))[::-1]
    own = tuple(
        _stretches(cache, batch.slots, starts, batch.kv_lens, own_slots)
        for cache in (problem.key_cache, problem.value_cache)
    )
    step = SegmentedBatch(
        own=_batch(batch.query_lens, tuple(own_lens), own_slots, problem.case),
        key_starts=tuple(starts),
        past=tuple(past),
    )
    return CutProblem(problem=problem, step=step, own=own, places=tuple(places))


def _stretches(
    cache: torch.Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    stops: Sequence[int],
    goals: Sequence[int],
) -> torch.Tensor:
    """A cache that has rows `start … stop` of each slot from row 0 of the goal on, and NaN."""
    length = max(stop - start for start, stop in zip(starts, stops, strict=True)) + 2
    made = torch.full((len(slots) + 1, length, *cache.shape[2:]), torch.nan, dtype=cache.dtype)
    made = made.to(cache.device)
    for slot, start, stop, goal in zip(slots, starts, stops, goals, strict=True):
        made[goal, : stop - start] = cache[slot, start:stop]
    return made
