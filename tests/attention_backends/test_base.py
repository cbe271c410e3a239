"""The batch contract, per-step preparation, and the reference on hand-made numbers."""

import gc
import math

import pytest
import torch
from attention_cases import Case, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from vkv.attention_backends import AttentionBatch, merge_attention
from vkv.attention_backends.base import PerStep
from vkv.attention_backends.reference import ReferenceBackend
from vkv.attention_backends.tiles import Mask, hidden_keys, plan_step


def test_batch_counts():
    batch = make_problem(Case(chunks=((3, 9), (1, 20)))).batch
    assert (batch.num_seqs, batch.num_tokens) == (2, 4)
    assert (batch.max_seqlen_q, batch.max_seqlen_k) == (3, 20)


def test_prepared_once_a_step():
    first, second = (make_problem(Case(chunks=((1, 2),))).batch for _ in range(2))
    prepared: PerStep[int] = PerStep()
    assert prepared.get(first, "a", lambda: 1) == 1
    assert prepared.get(first, "a", lambda: 2) == 1
    assert prepared.get(first, "b", lambda: 3) == 3
    assert prepared.get(second, "a", lambda: 4) == 4
    assert prepared.get(first, "a", lambda: 5) == 5, "only the current batch is kept"


def test_a_batch_is_not_kept_alive_and_its_id_not_mistaken():
    prepared: PerStep[int] = PerStep()
    for step in range(5):  # freed batches hand their address, hence their id, to the next
        batch = make_problem(Case(chunks=((1, 2),))).batch
        assert prepared.get(batch, None, lambda step=step: step) == step
        del batch
        gc.collect()


def test_reference_on_numbers_done_by_hand():
    problem = make_problem(Case(chunks=((2, 2),), num_heads=1, num_kv_heads=1, key_dim=1))
    slot = problem.batch.slots[0]
    problem.query[:] = torch.tensor([[[1.0]], [[1.0]]])
    problem.key_cache[slot, :2, 0, 0] = torch.tensor([0.0, math.log(3.0)])
    problem.value_cache[slot, :2, 0, 0] = torch.tensor([10.0, 20.0])
    out, lse = ReferenceBackend().forward_lse(*problem.args)
    assert out.flatten().tolist() == pytest.approx([10.0, (10 + 3 * 20) / 4])
    assert lse.flatten().tolist() == pytest.approx([0.0, math.log(4.0)])


def test_reference_sink_takes_probability():
    problem = make_problem(Case(chunks=((1, 1),), num_heads=1, num_kv_heads=1, sinks=True))
    assert problem.layer.sinks is not None
    without = make_problem(Case(chunks=((1, 1),), num_heads=1, num_kv_heads=1))
    _, lse = ReferenceBackend().forward_lse(*without.args)
    out, _ = ReferenceBackend().forward_lse(*problem.args)
    value = problem.value_cache[problem.batch.slots[0], 0]
    share = lse.exp() / (lse.exp() + problem.layer.sinks.exp())
    torch.testing.assert_close(out[0], value * share.T)


@settings(max_examples=30, deadline=None)
@given(
    chunks=st.lists(
        st.tuples(st.integers(1, 150), st.integers(0, 1500)).map(lambda c: (c[0], sum(c))),
        min_size=1,
        max_size=3,
    ),
    window=st.none() | st.integers(1, 1500),
    bounded=st.booleans(),
)
def test_tiles_cover_exactly_the_visible_keys(chunks, window, bounded):
    batch = _bare_batch(chunks)
    plan = plan_step(batch, window, bounded=bounded)
    row = 0
    for (query_len, kv_len), sequence in zip(chunks, plan.sequences, strict=True):
        for block in sequence.blocks:
            assert block.queries.start == row
            num_rows = block.queries.stop - row
            row = block.queries.stop
            first = kv_len - query_len + block.queries.start - sequence.blocks[0].queries.start
            seen = torch.zeros(num_rows, kv_len, dtype=torch.int32)
            for tile in block.tiles:
                keys = tile.keys
                assert 0 <= keys.start < keys.stop, "kernels divide by the number of keys"
                seen[:, keys.start + sequence.first_key : keys.stop + sequence.first_key] += (
                    _visible(tile, num_rows, window)
                )
            wanted = ~hidden_keys(num_rows, kv_len, first, window, torch.device("cpu"))
            assert torch.equal(seen, wanted.int())
    assert row == batch.num_tokens


@pytest.mark.parametrize("window", [None, 1, 50, 1000])
def test_a_decode_is_one_unmasked_tile(window):
    plan = plan_step(_bare_batch([(1, 1), (1, 300)]), window, bounded=False)
    assert plan.decode_only
    for sequence in plan.sequences:
        (block,) = sequence.blocks
        (tile,) = block.tiles
        seen = min(sequence.kv_len, window or sequence.kv_len)
        assert tile.mask is Mask.NONE
        assert tile.keys == slice(0, seen)
        assert sequence.first_key == sequence.kv_len - seen


def _bare_batch(chunks):
    query_lens, kv_lens = zip(*chunks, strict=True)
    empty = torch.empty(0, dtype=torch.int32)
    return AttentionBatch(
        query_lens=query_lens,
        kv_lens=kv_lens,
        slots=tuple(range(len(chunks))),
        cu_seqlens_q=empty,
        seqused_k=empty,
        slot_ids=empty,
        write_index=(empty, empty),
    )


def _visible(tile, num_rows: int, window: int | None) -> torch.Tensor:
    """What a kernel shows of a tile, by its mask kind, int32 [num_rows, num_keys]."""
    num_keys = tile.keys.stop - tile.keys.start
    if tile.mask is Mask.NONE:
        return torch.ones(num_rows, num_keys, dtype=torch.int32)
    if tile.mask is Mask.CAUSAL:
        assert num_keys == num_rows
        return torch.ones(num_rows, num_keys, dtype=torch.int32).tril()
    hidden = hidden_keys(num_rows, num_keys, tile.offset, window, torch.device("cpu"))
    return (~hidden).int()


def _parts(count: int, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    outs = [torch.randn(3, 2, 8, generator=generator) for _ in range(count)]
    return outs, [torch.randn(3, 2, generator=generator) * 5 for _ in range(count)]


def test_merge_is_associative_and_commutative():
    (a, b, c), (x, y, z) = _parts(3)
    whole = merge_attention([a, b, c], [x, y, z])
    left = merge_attention([a, b], [x, y])
    torch.testing.assert_close(merge_attention([left[0], c], [left[1], z]), whole)
    torch.testing.assert_close(merge_attention([c, a, b], [z, x, y]), whole)


def test_merge_of_one_part_is_itself():
    (out,), (lse,) = _parts(1)
    torch.testing.assert_close(merge_attention([out], [lse]), (out, lse))


def test_merge_ignores_empty_parts_whatever_they_hold():
    (out, junk), (lse, _) = _parts(2)
    empty = torch.full_like(lse, -torch.inf)
    merged = merge_attention([out, torch.full_like(junk, torch.nan)], [lse, empty])
    torch.testing.assert_close(merged, (out, lse))


def test_merge_of_nothing_but_empty_parts_is_zero():
    (a, b), (lse, _) = _parts(2)
    empty = torch.full_like(lse, -torch.inf)
    out, merged_lse = merge_attention([a, b], [empty, empty])
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(merged_lse, empty)


def test_merge_shows_a_nan_of_a_part_that_saw_keys():
    (a, b), lses = _parts(2)
    b[0, 0, 0] = torch.nan
    out, _ = merge_attention([a, b], lses)
    assert out[0, 0, 0].isnan()
    assert out.isnan().sum() == 1


def test_merge_survives_extreme_logits_and_keeps_the_dtype():
    (a, b), (lse, _) = _parts(2)
    out, merged = merge_attention([a.bfloat16(), b.bfloat16()], [lse + 1e4, lse - 1e4])
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, a.bfloat16())
    torch.testing.assert_close(merged, lse + 1e4)
