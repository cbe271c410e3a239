"""FlashInfer's paged kernels over contiguous slots, by page numbers that are pure arithmetic.

A contiguous cache is a paged one whose pages happen to be neighbours: slots of L rows are seen as
`(slots · L/P, P, heads, dim)`, and a sequence's pages are `slot · L/P + 0, 1, 2, …`. The kernels
run unmodified, with 64-bit offsets and split contexts.

One wrapper serves prompt chunks and decodes: the decode wrapper, with tensor cores, dispatches to
the same kernel. Its `fa2` form never loads a row past the length, which `fa3` would.

Written against flashinfer-python 0.6.18; run on no GPU yet.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch

from ..vmem.errors import UnsupportedAttention
from .base import AttentionBackend, AttentionBatch, Capabilities, LayerAttention, PerStep
from .cuda import missing_gpu, missing_package
from .sinks import apply_sinks, sinks_lse

_PROCESSORS = 132  # of a device that is not asked: an H100's
PAGE_SIZES = (128, 64, 32, 16)  # no larger: contexts are split in whole pages
MAX_STRIDE = 2**32  # the kernels keep strides as uint32 elements


class _PlanKey(NamedTuple):
    """What a plan depends on beside the batch; layers that agree in it share one plan."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    pages_per_slot: int
    page_size: int
    scale: float
    window: int | None
    softcap: float | None


class _Planned:
    """A wrapper, and when its last plan had left the host.

    A plan is copied to the device from a pinned buffer, behind the work launched before it. A host
    that runs ahead would overwrite it with the next plan before the device has read it.
    """

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        self.wrapper = wrapper
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def mark_copied(self) -> None:
        if self._copied is not None:
            self._copied.record()

    def wait_until_copied(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()


class FlashInferBackend(AttentionBackend):
    name = "flashinfer"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        max_head_dim=256,
        head_dim_multiple=64,
        unequal_head_dims=False,
    )

    def __init__(self) -> None:
        self._wrapper_class: Any = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper
        self._wrappers: dict[_PlanKey, _Planned] = {}  # a few: one for each kind of layer
        self._planned: PerStep[Any] = PerStep()
        self._workspace: torch.Tensor | None = None  # the largest so far

    @classmethod
    def unavailable_reason(cls) -> str | None:
        remedy = "pip install 'vkv[flashinfer]' (its kernels are compiled with nvcc at first use)"
        return missing_gpu() or missing_package("flashinfer", remedy)

    def check_cache(self, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
        paged_view(key_cache, value_cache)

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if layer.sinks is None:
            wrapper, pages = self._plan(query, key_cache, value_cache, batch, layer)
            return wrapper.run(query, pages, out=out)
        result, lse = self._run_lse(query, key_cache, value_cache, batch, layer)
        apply_sinks(result, lse, layer.sinks)
        return result if out is None else out.copy_(result)

    def forward_lse(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self._run_lse(query, key_cache, value_cache, batch, layer)
        if layer.sinks is not None:
            apply_sinks(out, lse, layer.sinks)
            lse = sinks_lse(lse, layer.sinks)
        return out, lse

    def _run_lse(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wrapper, pages = self._plan(query, key_cache, value_cache, batch, layer)
        out, lse = wrapper.run(query, pages, return_lse=True)
        return out, lse * math.log(2)  # FlashInfer counts in powers of two

    def _plan(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        layer: LayerAttention,
    ) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
        """The wrapper, planned for this step, and the cache as pages of keys and of values."""
        keys, values, pages_per_slot = self._pages(key_cache, value_cache)
        key = _PlanKey(
            num_heads=query.shape[1],
            num_kv_heads=keys.shape[2],
            head_dim=query.shape[2],
            dtype=query.dtype,
            pages_per_slot=pages_per_slot,
            page_size=keys.shape[1],
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
        )
        return self._planned.get(batch, key, lambda: self._make_plan(batch, key)), (keys, values)

    def _pages(
        self, key_cache: torch.Tensor, value_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Pages of keys and of values, and how many of them a slot has."""
        return paged_view(key_cache, value_cache)

    def _page_numbers(
        self, batch: AttentionBatch, counts: Sequence[int], pages_per_slot: int
    ) -> torch.Tensor:
        """int32, the pages of each sequence in turn, `counts` of each."""
        first_pages = [slot * pages_per_slot for slot in batch.slots]
        return torch.cat(
            [
                torch.arange(first, first + count, dtype=torch.int32)
                for first, count in zip(first_pages, counts, strict=True)
            ]
        )

    def _make_plan(self, batch: AttentionBatch, key: _PlanKey) -> Any:
        planned = self._wrapper(key, batch.seqused_k.device)
        planned.wait_until_copied()
        # Host tensors: the plan is made on the host, and reads device tensors back.
        counts = [-(-kv_len // key.page_size) for kv_len in batch.kv_lens]
        last_page_len = [
            kv_len - (count - 1) * key.page_size
            for kv_len, count in zip(batch.kv_lens, counts, strict=True)
        ]
        planned.wrapper.plan(
            _offsets(batch.query_lens),
            _offsets(counts),
            self._page_numbers(batch, counts, key.pages_per_slot),
            torch.tensor(last_page_len, dtype=torch.int32),
            key.num_heads,
            key.num_kv_heads,
            key.head_dim,
            key.page_size,
            causal=True,
            sm_scale=key.scale,
            window_left=-1 if key.window is None else key.window - 1,
            logits_soft_cap=key.softcap,
            q_data_type=key.dtype,
        )
        planned.mark_copied()
        return planned.wrapper

    def _wrapper(self, key: _PlanKey, device: torch.device) -> _Planned:
        """A wrapper keeps its own plan; the scratch of a running kernel can be shared by all."""
        if key not in self._wrappers:
            needed = workspace_bytes(key.num_heads, key.num_kv_heads, key.head_dim, device)
            if self._workspace is None or self._workspace.numel() < needed:
                self._workspace = torch.empty(needed, dtype=torch.uint8, device=device)
            wrapper = self._wrapper_class(self._workspace, "NHD", backend="fa2")
            self._wrappers[key] = _Planned(wrapper, device)
        return self._wrappers[key]


def workspace_bytes(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> int:
    """What the parts of split contexts can take: a plan that needs more than it has raises.

    Contexts are split while that makes no more than two blocks of work a processor, and each block
    leaves a float32 tile of outputs and their log-sum-exps, of each query head of its KV head.
    Source: FlashInfer's `PrefillPlan` (include/flashinfer/attention/scheduler.cuh).
    """
    processors = _PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    tile = 128 if head_dim < 256 else 64  # rows, at most
    blocks = max(1, 2 * processors // num_kv_heads)
    parts = num_heads * blocks * tile
    return parts * head_dim * 4 + parts * 4 + 2 * 16  # two arrays, each aligned


def paged_view(
    key_cache: torch.Tensor, value_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """See slots `[num_slots, max_len, heads, dim]` as pages `[num_pages, P, heads, dim]`.

    Returns the pages of keys and of values, and the pages a slot has. Raises
    UnsupportedAttention where strides do not allow it.
    """
    if key_cache.stride() != value_cache.stride():
        raise UnsupportedAttention(
            f"flashinfer: keys and values must have equal strides, not {key_cache.stride()} and "
            f"{value_cache.stride()}"
        )
    num_slots, max_len, num_kv_heads, head_dim = key_cache.shape
    slot_stride, row_stride, head_stride, _ = key_cache.stride()
    rows_per_slot, remainder = divmod(slot_stride, row_stride)
    common = math.gcd(rows_per_slot, max_len)  # the last slot must hold whole pages, too
    page_size = next((size for size in PAGE_SIZES if common % size == 0), None)
    if remainder or page_size is None:
        raise UnsupportedAttention(
            f"flashinfer: slots of {max_len} tokens, {slot_stride} elements apart at {row_stride} "
            f"a token, do not divide into pages of {PAGE_SIZES[-1]}; choose max_len accordingly"
        )
    page_stride = page_size * row_stride
    if page_stride >= MAX_STRIDE:
        raise UnsupportedAttention(
            f"flashinfer: pages {page_stride} elements apart exceed its 32-bit strides; interleave "
            f"fewer layers in one range"
        )
    pages_per_slot = rows_per_slot // page_size
    num_pages = (num_slots - 1) * pages_per_slot + max_len // page_size
    if num_pages >= 2**31:
        raise UnsupportedAttention(f"flashinfer: {num_pages} pages outgrow int32 page numbers")
    shape = (num_pages, page_size, num_kv_heads, head_dim)
    strides = (page_stride, row_stride, head_stride, 1)
    keys, values = (cache.as_strided(shape, strides) for cache in (key_cache, value_cache))
    return keys, values, pages_per_slot


def _offsets(lengths: list[int] | tuple[int, ...]) -> torch.Tensor:
    """[0, l0, l0 + l1, …], int32 on the host."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
