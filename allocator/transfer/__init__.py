"""KV that moves: between caches, between tiers of memory, between processes."""

from .copier import Copier, CopyJob
from .kv_dir import KVDir
from .memory_tier import Fetch, MemoryTier, MoveStats, Store
from .segment_tier import Segment, SegmentTier
from .transfers import Incoming, Outgoing, TransferKey, Transfers, TransferState

__all__ = [
    "Copier",
    "CopyJob",
    "Fetch",
    "Incoming",
    "KVDir",
    "MemoryTier",
    "MoveStats",
    "Outgoing",
    "Segment",
    "SegmentTier",
    "Store",
    "TransferKey",
    "TransferState",
    "Transfers",
]
