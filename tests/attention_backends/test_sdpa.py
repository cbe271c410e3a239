"""`sdpa` and `paged_sdpa` against the reference, feature by feature and at random."""

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, assert_matches, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from vkv.attention_backends.paged_sdpa import PagedSdpaBackend
from vkv.attention_backends.reference import ReferenceBackend
from vkv.attention_backends.sdpa import SdpaBackend
from vkv.attention_backends.tile_kernels import flash_cpu, materialised
from vkv.attention_backends.tiles import Mask, plan_step

DECODE = ((1, 1), (1, 127), (1, 128), (1, 129), (1, 40))
PREFILL = ((5, 5), (1, 1), (129, 129), (33, 33))
CHUNKED = ((7, 20), (1, 128), (130, 131), (3, 3), (16, 300), (1, 1))
BATCHES = {"decode": DECODE, "prefill": PREFILL, "mixed": CHUNKED}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(case: Case) -> None:
    backend = PagedSdpaBackend() if case.paged else SdpaBackend()
    assert_matches(backend, ReferenceBackend(), make_problem(case))


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "paged"])
@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ragged_batches(chunks, dtype, paged):
    check(Case(chunks=chunks, dtype=dtype, paged=paged))


@pytest.mark.parametrize("interleaved", [False, True], ids=["plain", "interleaved"])
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128)]
)
def test_head_sizes_in_both_layouts(key_dim, value_dim, interleaved):
    for dtype in (torch.float32, torch.bfloat16):
        for chunks in (((1, 129), (1, 1)), ((5, 9), (4, 4))):
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
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 2), (8, 1), (6, 2)])
def test_grouped_heads(chunks, heads):
    check(Case(chunks=chunks, num_heads=heads[0], num_kv_heads=heads[1]))


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "paged"])
@pytest.mark.parametrize("window", [1, 2, 17, 128, 1000])
@pytest.mark.parametrize("chunks", [*BATCHES.values(), ((300, 400),), ((40, 50), (40, 40))])
def test_windows(chunks, window, paged):
    check(Case(chunks=chunks, window=window, paged=paged))
    check(Case(chunks=chunks, window=window, paged=paged, softcap=2.0))


@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcap_and_sinks(chunks, window, sinks, softcap, dtype):
    case = Case(chunks=chunks, window=window, sinks=sinks, softcap=softcap, dtype=dtype)
    check(case)


def test_bounded_tiles_merge_over_keys_longer_than_one_tile():
    check(Case(chunks=((130, 2300),), num_heads=2, num_kv_heads=1, softcap=3.0))
    # The first queries of a block see no key of its last tile.
    check(Case(chunks=((200, 1100),), num_heads=2, num_kv_heads=1, softcap=3.0))
    check(Case(chunks=((3, 5000),), num_heads=2, num_kv_heads=1, softcap=3.0, window=2100))


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("window", [None, 17])
def test_both_tile_kernels_agree(window, bounded):
    problem = make_problem(Case(chunks=((40, 90), (150, 1300)), window=window, sinks=False))
    grouped = problem.query.unflatten(1, (2, 2))
    kinds = set()
    for sequence in plan_step(problem.batch, window, bounded=bounded).sequences:
        slot, tokens = sequence.slot, slice(sequence.first_key, sequence.kv_len)
        keys = problem.key_cache[slot, tokens].transpose(0, 1).unsqueeze(0)
        values = problem.value_cache[slot, tokens].transpose(0, 1).unsqueeze(0)
        for block in sequence.blocks:
            for tile in block.tiles:
                kinds.add(tile.mask)
                part = (
                    grouped[block.queries],
                    keys[:, :, tile.keys],
                    values[:, :, tile.keys],
                    tile,
                )
                seen = materialised(*part, problem.layer)
                torch.testing.assert_close(flash_cpu(*part, problem.layer), seen)
    assert Mask.BAND in kinds or Mask.CAUSAL in kinds


def test_writes_into_out():
    for chunks in BATCHES.values():
        problem = make_problem(Case(chunks=chunks))
        out = torch.full_like(problem.query, torch.nan)
        assert SdpaBackend().forward(*problem.args, out=out) is out
        torch.testing.assert_close(out, SdpaBackend().forward(*problem.args), atol=0, rtol=0)


def test_one_backend_serves_many_batches_and_layers():
    backend = SdpaBackend()
    for seed in range(3):
        for window in (None, 4, 9):
            case = Case(chunks=((5 + seed, 20), (1, 30)), window=window, seed=seed)
            assert_matches(backend, ReferenceBackend(), make_problem(case))


@st.composite
def cases(draw) -> Case:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    chunk = st.tuples(st.integers(1, 40), st.integers(0, 150)).map(lambda c: (c[0], sum(c)))
    return Case(
        chunks=tuple(draw(st.lists(chunk, min_size=1, max_size=4))),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        key_dim=draw(st.sampled_from([8, 16, 24])),
        value_dim=draw(st.sampled_from([None, 8, 16])),
        window=draw(st.none() | st.integers(1, 200)),
        softcap=draw(st.none() | st.floats(0.5, 50)),
        sinks=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        paged=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_random_ragged_batches(case):
    check(case)


@settings(max_examples=20, deadline=None)
@given(case=cases().filter(lambda case: not case.paged))
def test_paged_equals_contiguous(case):
    slots = SdpaBackend().forward(*make_problem(case).args)
    paged = PagedSdpaBackend().forward(*make_problem(replace(case, paged=True)).args)
    torch.testing.assert_close(paged, slots, atol=1e-6, rtol=1e-6)
