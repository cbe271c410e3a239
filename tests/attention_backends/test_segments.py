"""Attention over keys in several places equals attention over them in one."""

import ctypes
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from attention_cases import TOLERANCE, Case, Problem, cut_problem, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from vkv.attention_backends import AttentionNeeds, ByLogSumExp, create_backend, partial_attention
from vkv.attention_backends import native as native_module
from vkv.attention_backends.native import NativeBackend
from vkv.attention_backends.native_segments import ByHalves
from vkv.attention_backends.reference import ReferenceBackend
from vkv.vmem.errors import InvalidOperation, UnsupportedAttention

CHUNKS = ((7, 20), (1, 128), (30, 131), (3, 3), (16, 300), (1, 1), (2, 900))

needs_native = pytest.mark.skipif(
    NativeBackend.unavailable_reason() is not None, reason="no C compiler, no built kernels"
)
BACKENDS = ["reference", "sdpa", pytest.param("native", marks=needs_native)]
HERE = ["reference", "sdpa"] + ["native"] * (NativeBackend.unavailable_reason() is None)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def backend_for(name: str, case: Case):
    dims = frozenset({(case.key_dim, case.value_dim or case.key_dim)})
    return create_backend(name, AttentionNeeds(device="cpu", dtype=case.dtype, head_dims=dims))


def cuts_of(problem: Problem, fractions: Sequence[float], grid: int = 1) -> list[list[int]]:
    """Cuts at these parts of each sequence's past, on a grid."""
    pairs = zip(problem.batch.query_lens, problem.batch.kv_lens, strict=True)
    return [[int((n - q) * f) // grid * grid for f in sorted(fractions)] for q, n in pairs]


def check_equal(name: str, case: Case, cuts_for: Sequence[float]) -> None:
    problem = make_problem(case)
    expected = ReferenceBackend().forward(*problem.args)
    cut = cut_problem(problem, cuts_of(problem, cuts_for))
    out = cut.solve(ByLogSumExp(backend_for(name, case)))
    rounding = TOLERANCE[case.dtype]
    torch.testing.assert_close(out, expected, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("num_segments", range(1, 9))
def test_one_to_eight_segments(name: str, num_segments: int) -> None:
    fractions = [(i + 1) / num_segments for i in range(num_segments)]  # the last up to the queries
    check_equal(name, Case(chunks=CHUNKS), fractions)


_KINDS = [
    Case(
        chunks=((3, 40), (1, 71), (9, 9), (1, 18)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    for window, softcap, sinks, (heads, kv_heads), (key_dim, value_dim) in itertools.product(
        (None, 1, 20), (None, 1.5), (False, True), ((3, 3), (8, 2)), ((16, 16), (24, 10))
    )
]


def _drawn_cuts(case: Case, num_segments: int, draw: random.Random) -> list[list[int]]:
    """Anywhere, so that stretches may be empty; of each sequence one has a single token."""
    cuts = []
    for query_len, kv_len in case.chunks:
        past = kv_len - query_len
        at = sorted(draw.randint(0, past) for _ in range(num_segments))
        if num_segments > 1 and past:
            place = draw.randrange(num_segments - 1)
            at[place + 1] = min(past, at[place] + 1)
        cuts.append(sorted(at))
    return cuts


@pytest.mark.parametrize("name", BACKENDS)
def test_each_kind_of_layer_in_one_to_eight_segments_cut_anywhere(name: str) -> None:
    """Windows, caps, sinks, grouped heads and unequal head sizes, each with each."""
    draw, lengths = random.Random(5), set()
    for case in _KINDS:
        problem = make_problem(case)
        expected = ReferenceBackend().forward(*problem.args)
        partial = ByLogSumExp(backend_for(name, case))
        for num_segments in range(1, 9):
            cuts = _drawn_cuts(case, num_segments, draw)
            lengths |= {b - a for of_one in cuts for a, b in itertools.pairwise([0, *of_one])}
            out = cut_problem(problem, cuts).solve(partial)
            torch.testing.assert_close(
                out, expected, atol=2e-5, rtol=2e-5, msg=lambda m, c=case, k=cuts: f"{c} {k}: {m}"
            )
    assert {0, 1} <= lengths


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("fractions", [(0.0,), (0.0, 0.0, 0.5, 0.5), (1.0, 1.0), (0.3, 0.6)])
@pytest.mark.parametrize("window", [None, 1, 17, 200])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_windows_caps_and_sinks_over_empty_and_uneven_segments(
    name: str, fractions: tuple[float, ...], window: int | None, sinks: bool, softcap: float | None
) -> None:
    check_equal(name, Case(chunks=CHUNKS, window=window, sinks=sinks, softcap=softcap), fractions)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("dims", [(16, 16), (24, 10), (64, 128)])
def test_grouped_heads_and_unequal_head_sizes(
    name: str, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    case = Case(chunks=CHUNKS, num_heads=heads[0], num_kv_heads=heads[1])
    case = replace(case, key_dim=dims[0], value_dim=dims[1], window=90)
    for dtype in (torch.float32, torch.bfloat16):
        check_equal(name, replace(case, dtype=dtype), (0.2, 0.9))


@pytest.mark.parametrize("name", BACKENDS)
def test_segments_of_one_token(name: str) -> None:
    problem = make_problem(Case(chunks=((2, 9), (1, 8)), window=4, sinks=True))
    cut = cut_problem(problem, [list(range(1, 8)), list(range(1, 8))])
    out = cut.solve(ByLogSumExp(backend_for(name, problem.case)))
    torch.testing.assert_close(out, ReferenceBackend().forward(*problem.args))


@st.composite
def cut_cases(draw) -> tuple[Case, list[list[int]]]:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    chunk = st.tuples(st.integers(1, 40), st.integers(0, 300)).map(lambda c: (c[0], sum(c)))
    chunks = tuple(draw(st.lists(chunk, min_size=1, max_size=4)))
    cuts = [sorted(draw(st.lists(st.integers(0, n - q), max_size=8))) for q, n in chunks]
    case = Case(
        chunks=chunks,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        key_dim=draw(st.sampled_from([8, 16, 33])),
        value_dim=draw(st.sampled_from([None, 8, 16])),
        window=draw(st.none() | st.integers(1, 300)),
        softcap=draw(st.none() | st.floats(0.5, 50)),
        sinks=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 2**16)),
    )
    return case, cuts


@settings(max_examples=80, deadline=None)
@given(drawn=cut_cases(), name=st.sampled_from(HERE))
def test_any_cut(drawn: tuple[Case, list[list[int]]], name: str) -> None:
    case, cuts = drawn
    if name == "native" and case.dtype == torch.float64:
        name = "sdpa"
    problem = make_problem(case)
    out = cut_problem(problem, cuts).solve(ByLogSumExp(backend_for(name, case)))
    rounding = max(TOLERANCE[case.dtype], 1e-6)  # the log-sum-exp is float32
    expected = ReferenceBackend().forward(*problem.args)
    torch.testing.assert_close(out, expected, atol=rounding, rtol=rounding)


# -- to the bit ------------------------------------------------------------------------------


def check_bits(case: Case, cuts: Sequence[Sequence[int]]) -> None:
    problem = make_problem(case)
    expected = NativeBackend().forward(*problem.args)
    cut = cut_problem(problem, cuts)
    out = cut.solve(partial_attention(NativeBackend()))
    assert torch.equal(out, expected), (out - expected).abs().max()


LONG = ((1, 5000), (70, 2600), (3, 513), (1, 30), (600, 3700), (1, 512), (2, 4097))


@needs_native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_segments", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("window", [None, 40, 1500])
def test_native_gives_the_bits_of_one_slot(
    dtype: torch.dtype, num_segments: int, window: int | None
) -> None:
    case = Case(chunks=LONG, dtype=dtype, window=window, sinks=window == 1500, key_dim=32)
    fractions = [(i + 1) / num_segments for i in range(num_segments)]
    check_bits(case, cuts_of(make_problem(case), fractions, grid=512) if fractions else [[]] * 7)


@needs_native
@pytest.mark.parametrize("limit", [b"portable", b"avx2", b"avx512", b"avx512_bf16"])
@pytest.mark.parametrize("dims", [(64, 64), (40, 24)], ids=["whole vectors", "odd"])
def test_with_every_instruction_set(limit: bytes, dims: tuple[int, int]) -> None:
    library = native_module.library()
    library.vkv_limit_instruction_set.argtypes = [ctypes.c_char_p]
    library.vkv_limit_instruction_set(limit)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(chunks=((1, 2500), (40, 1700)), dtype=dtype, window=1100, num_heads=8)
            case = replace(case, key_dim=dims[0], value_dim=dims[1], softcap=3.0)
            for cuts in ([[512, 2048], [1024]], [[1536], [512, 512, 1536]], [[2048], []]):
                check_bits(case, cuts)
    finally:
        library.vkv_limit_instruction_set(b"avx512_bf16")


@st.composite
def aligned_cases(draw) -> tuple[Case, list[list[int]]]:
    chunk = st.tuples(st.integers(1, 600), st.integers(0, 6000)).map(lambda c: (c[0], sum(c)))
    chunks = tuple(draw(st.lists(chunk, min_size=1, max_size=3)))
    cuts = [
        sorted(512 * i for i in draw(st.lists(st.integers(0, (n - q) // 512), max_size=8)))
        for q, n in chunks
    ]
    case = Case(
        chunks=chunks,
        num_heads=4,
        num_kv_heads=draw(st.sampled_from([1, 2, 4])),
        key_dim=draw(st.sampled_from([8, 32])),
        value_dim=draw(st.sampled_from([None, 16])),
        window=draw(st.none() | st.integers(1, 5000)),
        softcap=draw(st.none() | st.floats(0.5, 50)),
        sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 2**16)),
    )
    return case, cuts


@needs_native
@settings(max_examples=40, deadline=None)
@given(drawn=aligned_cases())
def test_any_cut_on_the_grid_keeps_the_bits(drawn: tuple[Case, list[list[int]]]) -> None:
    check_bits(*drawn)


@needs_native
def test_results_are_few_whatever_the_length() -> None:
    """What travels is in the order of queries, not of keys."""
    problem = make_problem(Case(chunks=((1, 64 * 1024 + 1),), num_heads=1, num_kv_heads=1))
    cut = cut_problem(problem, [[33 * 512, 64 * 1024]])
    partial = partial_attention(NativeBackend())
    assert isinstance(partial, ByHalves)
    rows = [partial.num_past_rows(batch) for _, batch in cut.step.past]
    assert max(rows) <= 2 * 7  # 2 log2 of 64 or 128 parts


def test_what_cannot_be_is_refused_by_name() -> None:
    problem = make_problem(Case(chunks=((1, 900),)))
    if NativeBackend.unavailable_reason() is None:
        with pytest.raises(InvalidOperation, match="begins at token 100; cut at multiples of 512"):
            cut_problem(problem, [[100]]).solve(partial_attention(NativeBackend()))
    needs = AttentionNeeds(
        device="cpu", dtype=torch.float32, head_dims=frozenset({(16, 16)}), paged=True
    )
    with pytest.raises(UnsupportedAttention, match=r"paged_sdpa.*contiguous slots"):
        partial_attention(create_backend("paged_sdpa", needs))
