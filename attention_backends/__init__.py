"""Attention over contiguous KV slots, by kernels that know nothing of virtual memory.

A backend is one small file: `AttentionBackend` says what it does, `Capabilities` what it can.
Ask for one by name with `create_backend`, or let `choose_backend` pick.
"""

from .base import (
    AttentionBackend,
    AttentionBatch,
    AttentionNeeds,
    Capabilities,
    LayerAttention,
    PastBatch,
)
from .merge import merge_attention
from .registry import (
    BackendChoice,
    BackendDescription,
    backend_names,
    choose_backend,
    create_backend,
    describe_backends,
    explain_choice,
    partial_attention,
)
from .segments import ByLogSumExp, PartialAttention, SegmentedBatch, queries_of

__all__ = [
    "AttentionBackend",
    "AttentionBatch",
    "AttentionNeeds",
    "BackendChoice",
    "BackendDescription",
    "ByLogSumExp",
    "Capabilities",
    "LayerAttention",
    "PartialAttention",
    "PastBatch",
    "SegmentedBatch",
    "backend_names",
    "choose_backend",
    "create_backend",
    "describe_backends",
    "explain_choice",
    "merge_attention",
    "partial_attention",
    "queries_of",
]
