"""vkv: a virtual-memory KV-cache runtime for large language models.

    import vkv

    with vkv.LLM() as llm:
        for piece in llm.stream("hello"):
            print(piece, end="", flush=True)

Names are loaded when first used, so that `import vkv` itself is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocator import (
        KVCache,
        KVLayout,
        LayerGeometry,
        MemoryLimit,
        PagedKVCache,
        PagePool,
        Slot,
    )
    from .runtime.blocks.zoo import BlockZoo
    from .runtime.cluster.cluster import Cluster
    from .runtime.engine.config import EngineConfig
    from .runtime.engine.stats import EngineStats
    from .runtime.frontend.async_llm import AsyncLLM
    from .runtime.frontend.llm import LLM
    from .runtime.frontend.sessions.session import Session
    from .runtime.frontend.text_stream import StreamDelta
    from .runtime.request.outputs import CompletionOutput, RequestOutput
    from .runtime.request.sampling_params import SamplingParams
    from .runtime.request.structured_outputs import StructuredOutputsParams
    from .runtime.virtual_cache.attention import ATTENTION
    from .runtime.virtual_cache.cache import VirtualCache
    from .vmem import open_driver
    from .vmem.errors import VkvError

_HOMES = {
    "AsyncLLM": ".runtime.frontend.async_llm",
    "BlockZoo": ".runtime.blocks.zoo",
    "Cluster": ".runtime.cluster.cluster",
    "LLM": ".runtime.frontend.llm",
    "Session": ".runtime.frontend.sessions.session",
    "StreamDelta": ".runtime.frontend.text_stream",
    "SamplingParams": ".runtime.request.sampling_params",
    "StructuredOutputsParams": ".runtime.request.structured_outputs",
    "RequestOutput": ".runtime.request.outputs",
    "CompletionOutput": ".runtime.request.outputs",
    "EngineConfig": ".runtime.engine.config",
    "EngineStats": ".runtime.engine.stats",
    "ATTENTION": ".runtime.virtual_cache.attention",
    "VirtualCache": ".runtime.virtual_cache.cache",
    "KVCache": ".allocator",
    "KVLayout": ".allocator",
    "LayerGeometry": ".allocator",
    "MemoryLimit": ".allocator",
    "PagePool": ".allocator",
    "PagedKVCache": ".allocator",
    "Slot": ".allocator",
    "open_driver": ".vmem",
    "VkvError": ".vmem.errors",
}

__all__ = [
    "ATTENTION",
    "LLM",
    "AsyncLLM",
    "BlockZoo",
    "Cluster",
    "CompletionOutput",
    "EngineConfig",
    "EngineStats",
    "KVCache",
    "KVLayout",
    "LayerGeometry",
    "MemoryLimit",
    "PagePool",
    "PagedKVCache",
    "RequestOutput",
    "SamplingParams",
    "Session",
    "Slot",
    "StreamDelta",
    "StructuredOutputsParams",
    "VirtualCache",
    "VkvError",
    "open_driver",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vkv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
