"""`native` against the reference: every instruction set of this machine, feature by feature."""

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
import torch
from attention_cases import Case, assert_matches, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from vkv.attention_backends import AttentionBatch, LayerAttention, native
from vkv.attention_backends.native import NativeBackend
from vkv.attention_backends.reference import ReferenceBackend
from vkv.vmem import open_driver
from vkv.vmem.errors import UnsupportedAttention

DECODE = ((1, 1), (1, 63), (1, 64), (1, 65), (1, 129), (1, 700))
PREFILL = ((5, 5), (1, 1), (129, 129), (33, 33))
CHUNKED = ((7, 20), (1, 128), (130, 131), (3, 3), (16, 300), (1, 1), (2, 2000))
BATCHES = {"decode": DECODE, "prefill": PREFILL, "mixed": CHUNKED}
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(
    NativeBackend.unavailable_reason() is not None, reason="no C compiler, no built kernels"
)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(case: Case) -> None:
    assert_matches(NativeBackend(), ReferenceBackend(), make_problem(case))


@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_batches(chunks, dtype):
    check(Case(chunks=chunks, dtype=dtype))


@pytest.mark.parametrize("interleaved", [False, True], ids=["plain", "interleaved"])
@pytest.mark.parametrize(
    ("key_dim", "value_dim"),
    [(1, 1), (5, 7), (16, 16), (17, 33), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)],
)
def test_head_sizes_in_both_layouts(key_dim, value_dim, interleaved):
    for dtype in DTYPES:
        for chunks in (((1, 129), (1, 1)), ((5, 9), (4, 4)), ((70, 150),)):
            check(
                Case(
                    chunks=chunks,
                    key_dim=key_dim,
                    value_dim=value_dim,
                    dtype=dtype,
                    interleaved=interleaved,
                )
            )


@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 2), (8, 1), (6, 2), (71, 1), (5, 5)])
def test_grouped_heads(chunks, heads):
    check(Case(chunks=chunks, num_heads=heads[0], num_kv_heads=heads[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", range(1, 10))
def test_few_rows_read_as_they_lie(dtype, group):
    """Each number of query rows of a KV head, over heads of whole vectors and an odd one."""
    lengths = (1, 31, 32, 33, 64, 95, 600)
    for key_dim, value_dim in ((32, 96), (64, 64), (160, 32), (80, 64)):
        case = Case(
            chunks=tuple((1, length) for length in lengths),
            num_heads=2 * group,
            key_dim=key_dim,
            value_dim=value_dim,
            dtype=dtype,
        )
        check(case)
        check(replace(case, window=40, softcap=5.0, sinks=True, interleaved=True))


@pytest.mark.parametrize("window", [1, 2, 17, 64, 128, 1000])
@pytest.mark.parametrize("chunks", [*BATCHES.values(), ((300, 400),), ((40, 50), (40, 40))])
def test_windows(chunks, window):
    check(Case(chunks=chunks, window=window))
    check(Case(chunks=chunks, window=window, softcap=2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_sinks(chunks, window, sinks, softcap, dtype):
    check(Case(chunks=chunks, window=window, sinks=sinks, softcap=softcap, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_neither_overflow_nor_vanish(dtype):
    problem = make_problem(Case(chunks=((40, 200), (1, 300)), dtype=dtype))
    layer = replace(problem.layer, scale=problem.layer.scale * 40)
    args = (*problem.args[:4], layer)
    out, lse = NativeBackend().forward_lse(*args)
    expected, expected_lse = ReferenceBackend().forward_lse(*args)
    torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(lse, expected_lse, atol=2e-2, rtol=1e-4)


def test_every_instruction_set_of_this_machine():
    """The narrower paths, which this machine would not choose by itself."""
    library = native.library()
    library.vkv_limit_instruction_set.argtypes = [ctypes.c_char_p]
    narrowest_first = [b"portable", b"avx2", b"avx512", b"avx512_bf16"]
    widest = [narrowest_first.index(library.vkv_instruction_set(i)) for i in range(len(DTYPES))]
    try:
        for limit, name in enumerate(narrowest_first):
            library.vkv_limit_instruction_set(name)
            for index, dtype in enumerate(DTYPES):
                used = library.vkv_instruction_set(index)
                assert used == narrowest_first[min(limit, widest[index])]
                for chunks in BATCHES.values():
                    for key_dim, value_dim in ((16, 24), (72, 64), (64, 32), (32, 64)):
                        case = Case(chunks=chunks, dtype=dtype, key_dim=key_dim)
                        check(replace(case, value_dim=value_dim, window=90, sinks=True))
                    case = Case(chunks=chunks, dtype=dtype, num_heads=16, num_kv_heads=2)
                    check(replace(case, key_dim=64, value_dim=64))  # eight rows of a KV head
    finally:
        library.vkv_limit_instruction_set(b"avx512_bf16")


@pytest.mark.parametrize("limit", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("dims", "group", "kind"),
    [
        ((64, 64), 4, "whole vectors"),
        ((96, 32), 1, "alone"),
        ((64, 128), 7, "seven rows"),
        ((40, 24), 4, "odd"),
        ((64, 64), 4, "capped, with sinks"),
        ((64, 32), 3, "heads apart"),
    ],
)
def test_a_query_has_one_result_to_the_bit(limit, dtype, window, dims, group, kind):
    """Whichever chunks its sequence comes in, beside what others, by however many threads."""
    generator = torch.Generator().manual_seed(len(limit) + dims[0])
    lengths, kv_heads = (1300, 70, 519), 2
    heads = kv_heads * group
    randn = partial(torch.randn, generator=generator)
    caches = [randn(3, 1300, kv_heads, dim).to(dtype) for dim in dims]
    queries = [4 * randn(length, heads, dims[0]).to(dtype) for length in lengths]
    layer = LayerAttention(scale=dims[0] ** -0.5, window=window)
    if kind == "capped, with sinks":
        layer = replace(layer, softcap=2.0, sinks=randn(heads))
    if kind == "heads apart":
        caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]

    def attend(spans: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Results of the queries from a first to a last position of each (slot, first, last)."""
        batch = batch_of([(last - first, last) for _, first, last in spans], [s for s, *_ in spans])
        query = torch.cat([queries[slot][first:last] for slot, first, last in spans])
        out = NativeBackend().forward(query, *caches, batch, layer)
        return list(out.split(batch.query_lens))

    library = native.library()
    library.vkv_limit_instruction_set.argtypes = [ctypes.c_char_p]
    library.vkv_limit_instruction_set(limit.encode())
    try:
        torch.set_num_threads(1)
        whole = [attend([(slot, 0, length)])[0] for slot, length in enumerate(lengths)]
        for trial in range(12):
            torch.set_num_threads(int(torch.randint(1, 4, (), generator=generator)))
            spans = []
            for slot in torch.randperm(3, generator=generator)[: 1 + trial % 3].tolist():
                count = (1, 2, 5, 33, 300)[int(torch.randint(5, (), generator=generator))]
                count = min(count, lengths[slot])
                first = torch.randint(lengths[slot] - count + 1, (), generator=generator)
                spans.append((slot, int(first), int(first) + count))
            for out, (slot, first, last) in zip(attend(spans), spans, strict=True):
                assert torch.equal(out, whole[slot][first:last]), (slot, first, last)
    finally:
        library.vkv_limit_instruction_set(b"avx512_bf16")


def batch_of(chunks: Sequence[tuple[int, int]], slots: Sequence[int]) -> AttentionBatch:
    counts, lens = [c for c, _ in chunks], [n for _, n in chunks]
    rows = torch.tensor([slot for slot, n in zip(slots, counts, strict=True) for _ in range(n)])
    positions = torch.tensor([p for n, end in chunks for p in range(end - n, end)])
    return AttentionBatch(
        query_lens=tuple(counts),
        kv_lens=tuple(lens),
        slots=tuple(slots),
        cu_seqlens_q=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        seqused_k=torch.tensor(lens, dtype=torch.int32),
        slot_ids=torch.tensor(slots, dtype=torch.int32),
        write_index=(rows, positions),
        block_tables=None,
    )


@pytest.mark.parametrize("dim", [64, 32])  # a page of 16 tokens, and in bfloat16 of 32
def test_rows_past_the_length_may_be_unmapped(dim):
    """Behind the last row lies a page that faults when it is touched, also by whole steps."""
    page, heads = mmap.PAGESIZE, 2
    for dtype in DTYPES:
        growth_bytes = heads * dim * dtype.itemsize
        length = page // growth_bytes
        with open_driver("cpu", page) as driver:
            caches = []
            for _ in range(2):
                address = driver.reserve(4 * page)
                driver.map(address, driver.create(1))
                shape = (1, 4 * page // growth_bytes, heads, dim)
                strides = (shape[1] * heads * dim, heads * dim, dim, 1)
                cache = driver.tensor(address, shape, strides, dtype)
                cache[:, :length] = torch.randn(1, length, heads, dim)
                caches.append(cache)
            for queries in (1, length):
                case = Case(chunks=((queries, length),), key_dim=dim, dtype=dtype)
                problem = make_problem(case)
                batch = replace(problem.batch, slots=(0,), slot_ids=torch.tensor([0]).int())
                args = (problem.query, *caches, batch, problem.layer)
                tight = [cache[:, :length] for cache in caches]
                expected = ReferenceBackend().forward(problem.query, *tight, *args[3:])
                out = NativeBackend().forward(*args)
                torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)
            del cache, caches, args, tight, expected


def test_strided_queries_and_results():
    problem = make_problem(Case(chunks=CHUNKED))
    expected = NativeBackend().forward(*problem.args)
    query = problem.query.transpose(0, 1).contiguous().transpose(0, 1)
    out = torch.empty_like(query)
    assert NativeBackend().forward(query, *problem.args[1:], out=out) is out
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    wide = problem.query.repeat_interleave(2, dim=2)[:, :, ::2]
    again = NativeBackend().forward(wide, *problem.args[1:])
    torch.testing.assert_close(again, expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 64])
def test_heads_that_lie_apart(dtype, dim):
    """The tokens of each KV head side by side, of keys or values or both: decodes and chunks."""
    for chunks in BATCHES.values():
        problem = make_problem(
            Case(chunks=chunks, dtype=dtype, num_heads=8, num_kv_heads=4, key_dim=dim)
        )
        query, keys, values, *rest = problem.args
        apart = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (keys, values)]
        expected = NativeBackend().forward(*problem.args)
        for caches in ((apart[0], values), (keys, apart[1]), apart):
            out = NativeBackend().forward(query, *caches, *rest)
            assert torch.equal(out, expected)


def test_one_backend_serves_many_batches_and_layers():
    backend = NativeBackend()
    for seed in range(3):
        for window in (None, 4, 9):
            case = Case(chunks=((5 + seed, 20), (1, 30)), window=window, seed=seed)
            assert_matches(backend, ReferenceBackend(), make_problem(case))


def workspace_bytes(
    chunks: Sequence[tuple[int, int]], heads: tuple[int, int], dim: int, num_threads: int
) -> int:
    """What the kernel asks for, told of a problem whose tensors need not be there."""
    batch = batch_of(chunks, range(len(chunks)))
    args = native.AttentionArgs(
        query_starts=batch.cu_seqlens_q.data_ptr(),
        kv_lens=batch.seqused_k.data_ptr(),
        slots=batch.slot_ids.data_ptr(),
        key_head_stride=dim,
        value_head_stride=dim,
        num_seqs=len(chunks),
        num_heads=heads[0],
        num_kv_heads=heads[1],
        key_dim=dim,
        value_dim=dim,
        num_threads=num_threads,
    )
    attend = native.library().vkv_attend
    attend.restype = ctypes.c_int64
    return attend(ctypes.byref(args))


def test_a_share_has_few_rows_of_a_prompt_beside_decodes():
    """At most 512: the workspace holds a share's rows for each thread."""
    chunks = ((1, 300),) * 31 + ((512, 512),)
    alone = workspace_bytes(chunks[-1:], (32, 32), 128, num_threads=2)
    assert workspace_bytes(chunks, (32, 32), 128, num_threads=2) < 1.2 * alone < 4 << 20


def test_parts_of_decodes_take_no_room_for_the_rows_of_a_prompt():
    decodes, chunk = ((1, 128 << 10),) * 2, ((512, 512),)
    apart = [workspace_bytes(chunks, (32, 8), 128, num_threads=16) for chunks in (decodes, chunk)]
    assert workspace_bytes(decodes + chunk, (32, 8), 128, num_threads=16) < 2 * sum(apart)


def test_tensors_of_different_dtypes_are_refused():
    """Which would be read or written as what they are not."""
    problem = make_problem(Case(chunks=((1, 9),), dtype=torch.bfloat16))
    query, keys, values, batch, layer = problem.args
    backend, wide, before = NativeBackend(), (keys.float(), values.float()), keys.clone()
    for caches in (wide, (keys, wide[1]), (wide[0], values)):
        with pytest.raises(UnsupportedAttention, match=r"bfloat16 and the cache is torch\.float32"):
            backend.forward(query, *caches, batch, layer)
    new = torch.ones(1, *keys.shape[2:])
    with pytest.raises(UnsupportedAttention, match=r"float32 and the cache is torch\.bfloat16"):
        backend.store(new, new, keys, values, batch)
    torch.testing.assert_close(keys, before, equal_nan=True)


def test_of_no_sequence_there_is_nothing_to_do():
    problem = make_problem(Case(chunks=((1, 9),)))
    out, lse = NativeBackend().forward_lse(
        problem.query[:0], *problem.args[1:3], batch_of((), ()), problem.layer
    )
    assert out.shape == (0, *problem.query.shape[1:])
    assert lse.shape == out.shape[:2]


@st.composite
def cases(draw) -> Case:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    chunk = st.tuples(st.integers(1, 90), st.integers(0, 300)).map(lambda c: (c[0], sum(c)))
    return Case(
        chunks=tuple(draw(st.lists(chunk, min_size=1, max_size=4))),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 4, 7])),
        key_dim=draw(st.sampled_from([8, 16, 24, 33])),
        value_dim=draw(st.sampled_from([None, 8, 16])),
        window=draw(st.none() | st.integers(1, 300)),
        softcap=draw(st.none() | st.floats(0.5, 50)),
        sinks=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_random_ragged_batches(case):
    check(case)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False], ids=["whole rows", "heads apart"])
def test_new_rows_are_stored_where_the_batch_says(dtype: torch.dtype, contiguous: bool) -> None:
    heads, dim, chunks, slots = 3, 5, ((4, 9), (1, 1), (2, 30)), (2, 0, 3)
    key, value = (
        torch.randn(heads, sum(n for n, _ in chunks), dim).to(dtype).transpose(0, 1)
        for _ in range(2)
    )
    shape = (4, 32, heads, dim) if contiguous else (4, heads, 32, dim)
    found = [torch.randn(shape).to(dtype) for _ in range(2)]
    found = found if contiguous else [cache.transpose(1, 2) for cache in found]
    if contiguous:
        key, value = key.contiguous(), value.contiguous()
    expected = [cache.clone() for cache in found]
    batch = batch_of(chunks, slots)
    NativeBackend().store(key, value, *found, batch)
    ReferenceBackend().store(key, value, *expected, batch)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
