"""The CUDA backends: their kernels on a GPU, and everything around the kernels without one.

Without a GPU the kernel is replaced by a stand-in that does what its documentation says with the
arguments it is given (`_attend` on the rows they name), so that a wrong start row, stride, page
number or window shows as a wrong result, and a stray row as a NaN.
"""

import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from attention_cases import Case, assert_matches, make_problem
from vkv.attention_backends import AttentionBackend, AttentionBatch, LayerAttention
from vkv.attention_backends.flash_attn import (
    FlashAttn3Backend,
    FlashAttnBackend,
    PagedFlashAttnBackend,
)
from vkv.attention_backends.flashinfer import FlashInferBackend, _PlanKey, workspace_bytes
from vkv.attention_backends.paged_flash import PagedFlashBackend
from vkv.attention_backends.paged_flashinfer import PagedFlashInferBackend
from vkv.attention_backends.reference import ReferenceBackend
from vkv.attention_backends.sdpa import SdpaBackend
from vkv.attention_backends.torch_flash import TorchFlashBackend
from vkv.vmem.errors import UnsupportedAttention

BACKENDS = [
    TorchFlashBackend,
    FlashAttnBackend,
    FlashAttn3Backend,
    FlashInferBackend,
    PagedFlashBackend,
    PagedFlashAttnBackend,
    PagedFlashInferBackend,
]
BATCHES = {
    "decode": ((1, 1), (1, 127), (1, 128), (1, 129), (1, 40)),
    "prefill": ((5, 5), (1, 1), (129, 129), (33, 33)),
    "mixed": ((1, 128), (1, 77), (7, 20), (130, 131), (3, 3), (1, 1)),
}
SMALL_BATCHES = {  # the stand-ins are slow
    "decode": ((1, 1), (1, 33), (1, 16)),
    "mixed": ((1, 20), (1, 7), (5, 9), (18, 18)),
}


def _cases(batches: dict, head_dim: int, **common) -> list[Case]:
    """The grid every CUDA backend is held to."""
    changes: list[dict] = [
        *({"num_heads": heads, "num_kv_heads": kv} for heads, kv in [(4, 4), (8, 2), (8, 1)]),
        *({"window": window} for window in (1, 17, 128, 1000)),
        {"interleaved": True},
        {"sinks": True},
        {"sinks": True, "window": 17, "interleaved": True},
        {"softcap": 1.5},
        {"softcap": 1.5, "window": 17},
    ]
    return [
        Case(chunks=chunks, key_dim=head_dim, **{**common, **change})
        for chunks in batches.values()
        for change in changes
    ]


def _check_all(backend: AttentionBackend, cases: list[Case]) -> None:
    for case in cases:
        if case.softcap is not None and not backend.capabilities.softcap:
            continue
        problem = make_problem(case)
        backend.check_cache(problem.key_cache, problem.value_cache)
        assert_matches(backend, ReferenceBackend(), problem)


def _attend(query, keys, values, scale, window, softcap=None):
    """Truth for one sequence: [n, heads, dim] over [kv_len, kv_heads, dim]."""
    unused = torch.empty(0, dtype=torch.int32)
    batch = AttentionBatch(
        query_lens=(query.shape[0],),
        kv_lens=(keys.shape[0],),
        slots=(0,),
        cu_seqlens_q=unused,
        seqused_k=unused,
        slot_ids=unused,
        write_index=(unused, unused),
    )
    layer = LayerAttention(scale=scale, window=window, softcap=softcap)
    return ReferenceBackend().forward_lse(query, keys[None], values[None], batch, layer)


def _window(left: int | None, right: int | None) -> int | None:
    """Kernels count the keys to the left of the query's own; None or -1 is no limit."""
    if left is None or left < 0:
        return None
    assert right == 0
    return left + 1


def _unpaged(blocks: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The rows of all sequences, one sequence after the other."""
    gathered = [blocks[table].flatten(0, 1)[:n] for table, n in zip(tables, lengths, strict=True)]
    return torch.cat(gathered)


@pytest.fixture
def flash_operator(monkeypatch) -> None:
    def kernel(query, k, v, cum_q, starts, max_q, max_k, dropout_p, is_causal, debug, *, scale,
               window_size_left, window_size_right, seqused_k,
               block_table=None):  # fmt: skip
        for offsets in (cum_q, starts, seqused_k):
            assert offsets.dtype == torch.int32
            assert offsets.is_contiguous()
        assert cum_q.shape == starts.shape == (len(seqused_k) + 1,)
        assert (dropout_p, is_causal, debug) == (0.0, True, False)
        assert max_q == cum_q.diff().max()
        assert max_k == seqused_k.max()
        if block_table is not None:  # blocks, which are laid end to end here
            assert torch.equal(starts.diff(), seqused_k)
            assert block_table.dtype == torch.int32
            k, v = (_unpaged(part, block_table, seqused_k) for part in (k, v))
        parts = [
            _attend(query[a:b], k[s : s + n], v[s : s + n], scale,
                    _window(window_size_left, window_size_right))
            for a, b, s, n in zip(cum_q, cum_q[1:], starts, seqused_k, strict=False)
        ]  # fmt: skip
        out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        return out, lse.T, None, None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)


@pytest.fixture
def torch_flash(flash_operator) -> TorchFlashBackend:
    return TorchFlashBackend()


@pytest.fixture
def paged_flash(flash_operator) -> PagedFlashBackend:
    return PagedFlashBackend()


@pytest.fixture
def flash_attn_package(monkeypatch) -> None:
    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, cache_batch_idx=None,
                                block_table=None, softmax_scale, causal, window_size, softcap,
                                return_softmax_lse):  # fmt: skip
        places = cache_batch_idx if block_table is None else block_table
        assert places is not None
        assert q.dim() == 4
        assert len(q) == len(cache_seqlens) == len(places)
        assert causal
        assert return_softmax_lse
        if block_table is None:
            rows = [(k_cache[slot], v_cache[slot]) for slot in cache_batch_idx]
        else:
            rows = [(k_cache[t].flatten(0, 1), v_cache[t].flatten(0, 1)) for t in block_table]
        parts = [
            _attend(q[i], k[:n], v[:n], softmax_scale, _window(*window_size), softcap or None)
            for i, ((k, v), n) in enumerate(zip(rows, cache_seqlens, strict=True))
        ]
        out, lse = (torch.stack(part) for part in zip(*parts, strict=True))
        return out, lse.transpose(1, 2)  # [batch, heads, seqlen_q]

    module = SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.fixture
def flash_attn(flash_attn_package) -> FlashAttnBackend:
    return FlashAttnBackend()


@pytest.fixture
def paged_flash_attn(flash_attn_package) -> PagedFlashAttnBackend:
    return PagedFlashAttnBackend()


@pytest.fixture
def flash_attn_3(monkeypatch) -> FlashAttn3Backend:
    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, cache_batch_idx,
                                cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size,
                                softcap, return_softmax_lse):  # fmt: skip
        assert causal
        assert return_softmax_lse
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        parts = [
            _attend(q[a:b], k_cache[slot, :n], v_cache[slot, :n], softmax_scale,
                    _window(*window_size), softcap or None)
            for a, b, slot, n in zip(
                cu_seqlens_q, cu_seqlens_q[1:], cache_batch_idx, cache_seqlens, strict=False
            )
        ]  # fmt: skip
        out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        return out, lse.T  # [heads, total_q]

    module = SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    return FlashAttn3Backend()


class PagedPrefillStandIn:
    """`flashinfer.BatchPrefillWithPagedKVCacheWrapper`: planned once, run for many layers."""

    plans = 0

    def __init__(self, workspace, kv_layout, *, backend):
        assert (kv_layout, backend) == ("NHD", "fa2"), "fa3 reads past the length"
        assert workspace.dtype == torch.uint8

    def plan(self, qo_indptr, kv_indptr, indices, last_page_len, num_qo_heads, num_kv_heads,
             head_dim_qk, page_size, *, causal, sm_scale, window_left, logits_soft_cap,
             q_data_type):  # fmt: skip
        assert causal
        for host in (qo_indptr, kv_indptr, indices, last_page_len):
            assert host.dtype == torch.int32
            assert host.device.type == "cpu"
        assert 1 <= last_page_len.min() <= last_page_len.max() <= page_size
        type(self).plans += 1
        self.planned = (num_qo_heads, num_kv_heads, head_dim_qk, page_size, q_data_type)
        self.rows = list(pairwise(qo_indptr))
        self.pages = [indices[a:b] for a, b in pairwise(kv_indptr)]
        self.lengths = [
            (len(pages) - 1) * page_size + last
            for pages, last in zip(self.pages, last_page_len, strict=True)
        ]
        self.maths = (sm_scale, _window(window_left, 0), logits_soft_cap)

    def run(self, q, paged_kv_cache, *, out=None, return_lse=False):
        keys, values = paged_kv_cache
        assert self.planned == (q.shape[1], *keys.shape[2:], keys.shape[1], q.dtype)
        parts = [
            _attend(q[a:b], keys[pages].flatten(0, 1)[:n], values[pages].flatten(0, 1)[:n],
                    *self.maths)
            for (a, b), pages, n in zip(self.rows, self.pages, self.lengths, strict=True)
        ]  # fmt: skip
        result, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        if return_lse:
            return result, lse / math.log(2)  # [total_q, heads], a power of two
        return result if out is None else out.copy_(result)


@pytest.fixture
def flashinfer_package(monkeypatch) -> None:
    monkeypatch.setattr(PagedPrefillStandIn, "plans", 0)
    module = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=PagedPrefillStandIn)
    monkeypatch.setitem(sys.modules, "flashinfer", module)


@pytest.fixture
def flashinfer(flashinfer_package) -> FlashInferBackend:
    return FlashInferBackend()


@pytest.fixture
def paged_flashinfer(flashinfer_package) -> PagedFlashInferBackend:
    return PagedFlashInferBackend()


def _shape_of_cache(backend: AttentionBackend) -> dict:
    """What the cases for `backend` are made with."""
    capabilities = backend.capabilities
    if capabilities.paged:
        return {"paged": True, "block_size": max(16, capabilities.block_multiple)}
    return {"max_len_multiple": 16}


@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS])
def test_arguments_name_the_right_rows(name, request):
    backend = request.getfixturevalue(name)
    _check_all(backend, _cases(SMALL_BATCHES, 8, **_shape_of_cache(backend)))


@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS])
def test_writes_into_out(name, request):
    backend = request.getfixturevalue(name)
    for sinks in (False, True):
        problem = make_problem(
            Case(chunks=SMALL_BATCHES["mixed"], sinks=sinks, **_shape_of_cache(backend))
        )
        out = torch.full_like(problem.query, torch.nan)
        assert backend.forward(*problem.args, out=out) is out
        torch.testing.assert_close(out, backend.forward(*problem.args), atol=0, rtol=0)


def test_flashinfer_plans_once_a_step_and_kind_of_layer(flashinfer):
    problem = make_problem(Case(chunks=SMALL_BATCHES["decode"], max_len_multiple=16))
    tensors = (problem.query, problem.key_cache, problem.value_cache)
    plain = problem.layer
    windowed = LayerAttention(scale=plain.scale, window=5)
    for _ in range(3):
        for layer in (plain, windowed):
            flashinfer.forward(*tensors, problem.batch, layer)
    assert PagedPrefillStandIn.plans == 2
    again = make_problem(Case(chunks=SMALL_BATCHES["decode"], max_len_multiple=16)).batch
    flashinfer.forward(*tensors, again, plain)
    assert PagedPrefillStandIn.plans == 3


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(64, 8, 128), (32, 2, 128), (32, 8, 64), (8, 8, 256)],
)
def test_flashinfer_has_room_for_any_plan(num_heads, num_kv_heads, head_dim):
    """Counted as `PrefillPlan` does, over all numbers of blocks that it may choose."""
    room = workspace_bytes(num_heads, num_kv_heads, head_dim, torch.device("cpu"))
    tile = 128 if head_dim < 256 else 64
    for blocks in range(1, 2 * 132 // num_kv_heads + 1):
        outputs = -(-num_heads * blocks * tile * head_dim * 4 // 16) * 16
        assert outputs + num_heads * blocks * tile * 4 <= room
    assert room < 1.1 * (outputs + num_heads * blocks * tile * 4)


def test_flashinfer_makes_a_larger_workspace_for_layers_that_want_one(flashinfer):
    keys = [
        _PlanKey(heads, 2, 128, torch.bfloat16, 8, 16, 1.0, None, None) for heads in (8, 32, 16)
    ]
    sizes = []
    for key in keys:
        flashinfer._wrapper(key, torch.device("cpu"))
        sizes.append(flashinfer._workspace.numel())
    assert sizes[0] < sizes[1] == sizes[2]


@pytest.mark.parametrize("name", ["torch_flash", "paged_flash"])
def test_decodes_of_a_mixed_step_have_a_call_of_their_own(name, request, monkeypatch):
    """In one call with a chunk the kernel would read KV once for each query head of theirs."""
    backend = request.getfixturevalue(name)
    kernel, calls = torch.ops.aten._flash_attention_forward, []

    def spy(*args, **kwargs):
        calls.append((args[3].tolist(), args[5], args[6], kwargs["seqused_k"].tolist()))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", spy)
    decodes, chunks_behind = ((1, 20), (1, 7)), ((5, 9), (18, 18), (1, 3))
    for chunks, expected in (
        (decodes + chunks_behind, [([0, 1, 2], 1, 20), ([0, 5, 23, 24], 18, 18)]),
        (decodes, [([0, 1, 2], 1, 20)]),
        (chunks_behind, [([0, 5, 23, 24], 18, 18)]),
    ):
        calls.clear()
        problem = make_problem(Case(chunks=chunks, key_dim=8, **_shape_of_cache(backend)))
        backend.forward_lse(*problem.args)
        assert [call[:3] for call in calls] == expected
        assert [n for call in calls for n in call[3]] == [length for _, length in chunks]


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3"])
def test_kernels_are_told_how_long_contexts_are_and_not_how_long_slots(name, request):
    backend = request.getfixturevalue(name)
    kernel, lengths = backend._kernel, []

    def spy(query, keys, values, **kwargs):
        lengths.append((keys.shape[1], values.shape[1]))
        return kernel(query, keys, values, **kwargs)

    backend._kernel = spy
    problem = make_problem(Case(chunks=((1, 20), (1, 7), (5, 9)), max_len_multiple=16))
    backend.forward(*problem.args)
    assert lengths == ([(20, 20), (9, 9)] if name == "flash_attn" else [(20, 20)])


def _cache(num_slots, max_len, row_stride=16, slot_stride=None):
    """A cache of one head of 16, of any size: the meta device holds no data."""
    slot_stride = slot_stride or max_len * row_stride
    return torch.empty_strided(
        (num_slots, max_len, 1, 16), (slot_stride, row_stride, 16, 1), device="meta"
    )


def test_torch_flash_refuses_what_it_cannot_address():
    backend = object.__new__(TorchFlashBackend)
    good = _cache(4, 64)
    backend.check_cache(good, good)
    ragged = _cache(4, 64, row_stride=32, slot_stride=64 * 32 + 16)
    with pytest.raises(UnsupportedAttention, match=r"slot stride 2064 is no whole number.*32"):
        backend.check_cache(ragged, ragged)
    huge = _cache(2**11, 2**20)
    with pytest.raises(UnsupportedAttention, match=r"2147483648 rows.*int32"):
        backend.check_cache(huge, huge)
    padded = _cache(4, 64, slot_stride=80 * 16)
    with pytest.raises(UnsupportedAttention, match=r"64 rows apart for keys and 80 for values"):
        backend.check_cache(good, padded)


def test_flashinfer_refuses_what_it_cannot_address(flashinfer):
    good = _cache(4, 64)
    flashinfer.check_cache(good, good)
    with pytest.raises(UnsupportedAttention, match=r"equal strides"):
        flashinfer.check_cache(good, _cache(4, 64, row_stride=32))
    odd = _cache(4, 65)
    with pytest.raises(UnsupportedAttention, match=r"slots of 65 tokens.*pages of 16"):
        flashinfer.check_cache(odd, odd)
    far = _cache(4, 128, row_stride=2**25)
    with pytest.raises(UnsupportedAttention, match=r"4294967296 elements apart exceed"):
        flashinfer.check_cache(far, far)
    many = _cache(2**15, 2**20)
    flashinfer.check_cache(many, many)
    with pytest.raises(UnsupportedAttention, match=r"int32 page numbers"):
        flashinfer.check_cache(_cache(2**18, 2**20), _cache(2**18, 2**20))


@pytest.mark.parametrize("name", ["paged_flash", "paged_flash_attn"])
def test_paged_kernels_refuse_small_blocks(name, request):
    backend = request.getfixturevalue(name)
    good, small = _cache(4, 512), _cache(4, 16)
    backend.check_cache(good, good)
    with pytest.raises(UnsupportedAttention, match=r"blocks of 16 tokens.*multiple of 256"):
        backend.check_cache(small, small)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_kernels(backend, dtype, head_dim):
    if reason := backend.unavailable_reason():
        pytest.skip(f"{backend.name} {reason}")
    capabilities = backend.capabilities
    if head_dim > capabilities.max_head_dim or head_dim % capabilities.head_dim_multiple:
        pytest.skip(f"{backend.name} does not offer a head size of {head_dim}")
    common = {"dtype": dtype, "device": "cuda", **_shape_of_cache(backend)}
    if not capabilities.paged:
        common |= {"readable_tile": capabilities.over_read_tokens, "max_len_multiple": 128}
    lacking = _check_built(backend(), _cases(BATCHES, head_dim, **common))
    if lacking:
        pytest.skip(f"not built ahead, and compiling is switched off: {lacking}")


def _check_built(backend: AttentionBackend, cases: list[Case]) -> str:
    """`_check_all`, but for the cases whose kernels are not there and may not be compiled now.

    They are named in the result, so that the test shows as skipped, not as passed.
    """
    lacking: set[str] = set()
    for case in cases:
        try:
            _check_all(backend, [case])
        except RuntimeError as error:  # FlashInfer's, whose class is only there with the package
            if type(error).__name__ != "MissingJITCacheError":
                raise
            lacking.add(f"window {case.window is not None}, softcap {case.softcap is not None}")
    return "; ".join(sorted(lacking))


@pytest.mark.gpu
def test_cpu_backends_run_on_a_gpu_too():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    for dtype in (torch.float32, torch.bfloat16):
        _check_all(SdpaBackend(), _cases(BATCHES, 64, dtype=dtype, device="cuda"))
