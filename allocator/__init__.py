"""Pages, slots and their geometry: contiguous KV that grows page by page."""

from .exits import Exits
from .kv_cache import KVCache
from .kv_file import KVFile
from .kv_file_format import KVFacts
from .kv_file_writer import KVFileWriter
from .layout import KVLayout, LayerGeometry, PageGeometry, TokenFormat
from .memory_limit import MemoryLimit, parse_bytes
from .page_map import Lane, PageMap, PageRuns, SlotPages
from .page_pool import PagePool, Reservation, Sanitize
from .paged_kv_cache import PagedKVCache, PagedLayout
from .parking import common_prefix
from .slot import Slot, SlotState
from .slot_cache import SlotCache
from .stats import KVStats

__all__ = [
    "Exits",
    "KVCache",
    "KVFacts",
    "KVFile",
    "KVFileWriter",
    "KVLayout",
    "KVStats",
    "Lane",
    "LayerGeometry",
    "MemoryLimit",
    "PageGeometry",
    "PageMap",
    "PagePool",
    "PageRuns",
    "PagedKVCache",
    "PagedLayout",
    "Reservation",
    "Sanitize",
    "Slot",
    "SlotCache",
    "SlotPages",
    "SlotState",
    "TokenFormat",
    "common_prefix",
    "parse_bytes",
]
