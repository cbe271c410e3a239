"""KV that moves: between caches, between tiers of memory, between processes."""

from .copier import Copier, CopyJob
from .kv_dir import KVDir
from .memory_tier import Fetch, MemoryTier, MoveStats, Store
from .segment_tier import (
    Lent,
    Remainder,
    Segment,
    SegmentTier,
    part_of,
    put_before,
    put_behind,
    split_off,
    staging,
    tokens_in,
)
from .transfers import Incoming, Outgoing, Spans, TransferKey, Transfers, TransferState

__all__ = [
    "Copier",
    "CopyJob",
    "Fetch",
    "Incoming",
    "KVDir",
    "Lent",
    "MemoryTier",
    "MoveStats",
    "Outgoing",
    "Remainder",
    "Segment",
    "SegmentTier",
    "Spans",
    "Store",
    "TransferKey",
    "TransferState",
    "Transfers",
    "part_of",
    "put_before",
    "put_behind",
    "split_off",
    "staging",
    "tokens_in",
]
