"""From a model and its options to an engine: driver, pages, slots, kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...allocator import (
    KVCache,
    KVLayout,
    LayerGeometry,
    MemoryLimit,
    PagedKVCache,
    PagedLayout,
    PagePool,
    SlotCache,
    parse_bytes,
)
from ...attention_backends import AttentionBackend, choose_backend, create_backend
from ...vmem import VmemDriver, open_driver
from ...vmem.errors import InvalidConfig
from ..execution.recordings import CudaRecorder, Recorder, Rerun
from ..execution.tape import TapeRecorder
from ..model.loading import LoadedModel
from ..scheduling.scheduler import Scheduler
from .config import EngineConfig, available_memory
from .engine import Engine
from .memory_profile import memory_for_kv

_AUTO_SHARE = 0.5  # of a machine's memory that is free when the engine is built
_ROW_TOKENS = 64  # about what a page should cover where the page size is ours to choose
_MIN_PAGE_BYTES, _MAX_PAGE_BYTES = 16 << 10, 2 << 20
_MAX_PAGES = 24_000  # each may need a mapping of its own, and a process has 65,530 by default
_BATCH_TOKENS = {"cpu": 256, "cuda": 2048}
READY_GROWTHS = 2  # steps' pages kept created, so that growth seldom waits for the system


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and the driver under it; the paged baseline has none."""

    engine: Engine
    driver: VmemDriver | None

    def close(self) -> None:
        """Give back all memory and address space."""
        if self.engine.runner.graphs is not None:
            self.engine.runner.graphs.forget()
        self.engine.cache.shutdown()
        if self.engine.states is not None:
            self.engine.states.clear()
        if self.driver is not None:
            self.driver.close()


def build_engine(loaded: LoadedModel, config: EngineConfig) -> BuiltEngine:
    """Put an engine together. Raises InvalidConfig or UnsupportedAttention by name."""
    needs = loaded.needs(paged=config.kv == "paged")
    if config.attention == "auto":
        backend = choose_backend(needs)
    else:
        backend = create_backend(config.attention, needs)
    no_graphs = why_no_graphs(loaded, config, backend)
    cache, driver = _build_cache(loaded, config, backend)
    scheduler = Scheduler(
        cache,
        max_seqs=config.max_seqs,
        max_batch_tokens=_max_batch_tokens(loaded, config),
        look_ahead_tokens=config.look_ahead_tokens,
        # A slot has keys and values from its start, but state of its last token only.
        prefix_reuse=config.prefix_reuse and not loaded.keeps_state,
        policy=config.policy,
    )
    recorder = None if no_graphs else _recorder(loaded, backend, driver)
    overlap = _overlaps(loaded, config)
    engine = Engine(loaded, cache, backend, scheduler, recorder, overlap=overlap)
    built = BuiltEngine(engine, driver)
    try:
        for index in range(len(loaded.geometry)):
            backend.check_cache(*cache.layer(index))
    except BaseException:
        built.close()
        raise
    return built


def why_no_graphs(
    loaded: LoadedModel, config: EngineConfig, backend: AttentionBackend
) -> str | None:
    """Why decode steps run kernel by kernel, in words; None if they are recorded.

    Raises InvalidConfig if `record_decodes=True` asks for what cannot be.
    """
    obstacle = None
    if loaded.keeps_state:
        obstacle = "layers with recurrent or convolution state cannot be recorded"
    elif config.kv == "paged":
        obstacle = "a paged cache cannot be recorded"
    elif any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules()):
        obstacle = "the model's forward hooks would not run in replayed steps"
    elif not backend.capabilities.graphs:
        obstacle = f"attention backend {backend.name!r} cannot be recorded"
    if config.record_decodes and obstacle:
        raise InvalidConfig(f"record_decodes is True, but {obstacle}; leave it None")
    if config.record_decodes is False:
        return "record_decodes is False"
    return obstacle


def _overlaps(loaded: LoadedModel, config: EngineConfig) -> bool:
    if config.overlap and loaded.keeps_state:
        raise InvalidConfig(
            "overlap is True, but layers with recurrent or convolution state go on from the step "
            "before; leave it None"
        )
    if config.overlap is None:
        return loaded.device.type == "cuda" and not loaded.keeps_state
    return config.overlap


def _recorder(
    loaded: LoadedModel, backend: AttentionBackend, driver: VmemDriver | None
) -> Recorder:
    if loaded.device.type != "cuda":
        return TapeRecorder() if backend.name == "native" else Rerun()
    assert driver is not None, "only virtual memory is recorded"
    return CudaRecorder(loaded.device, driver.still)


def _build_cache(
    loaded: LoadedModel, config: EngineConfig, backend: AttentionBackend
) -> tuple[SlotCache, VmemDriver | None]:
    max_len = config.max_len or loaded.max_positions
    if max_len > loaded.max_positions:
        raise InvalidConfig(
            f"max_len is {max_len}, and {loaded.name} takes {loaded.max_positions} positions "
            "here; lower max_len"
        )
    max_parked = config.max_seqs if config.max_parked is None else config.max_parked
    num_slots = config.max_seqs + max_parked
    limit = _limit(loaded, config, num_slots)
    if config.kv == "paged":
        paged = PagedLayout(loaded.geometry, loaded.dtype, max_len, config.block_tokens)
        limit = _at_most(limit, num_slots * paged.num_pages(max_len) * paged.page_bytes, config)
        assert not isinstance(limit, MemoryLimit), "refused by the config"
        return (
            PagedKVCache(
                paged,
                limit,
                num_slots=num_slots,
                max_parked=max_parked,
                device=loaded.device,
                sanitize=config.sanitize,
            ),
            None,
        )
    layers_per_range = config.layers_per_range
    if layers_per_range is None and loaded.device.type == "cpu":
        layers_per_range = 1
    rough = _at_most(limit, num_slots * max_len * _token_bytes(loaded), config)
    page_bytes = config.page_bytes or _page_bytes(loaded, layers_per_range, rough)
    driver = open_driver(loaded.device, page_bytes)
    try:
        layout = KVLayout(
            loaded.geometry,
            loaded.dtype,
            max_len,
            driver.page_bytes,
            layers_per_range=layers_per_range,
            split_kv=config.split_kv,
            over_read_tokens=backend.capabilities.over_read_tokens,
        )
        most = num_slots * layout.num_pages(max_len) * layout.page_bytes
        pool = PagePool(
            driver,
            _at_most(limit, most, config),
            low_watermark=READY_GROWTHS * layout.num_ranges,
            sanitize=config.sanitize,
        )
        return KVCache(layout, pool, num_slots=num_slots, max_parked=max_parked), driver
    except BaseException:
        driver.close()
        raise


def _max_batch_tokens(loaded: LoadedModel, config: EngineConfig) -> int:
    return config.max_batch_tokens or _BATCH_TOKENS[loaded.device.type]


def _limit(loaded: LoadedModel, config: EngineConfig, num_slots: int) -> int | MemoryLimit:
    """What keys and values may take; "auto" is what a GPU, or half of what a CPU, has left."""
    if isinstance(config.kv_memory, MemoryLimit):
        return config.kv_memory
    if config.kv_memory != "auto":
        return parse_bytes(config.kv_memory)
    if loaded.device.type == "cuda":
        return memory_for_kv(
            loaded,
            max_batch_tokens=_max_batch_tokens(loaded, config),
            max_seqs=config.max_seqs,
            num_slots=num_slots,
        )
    return int(_AUTO_SHARE * available_memory(loaded.device))


def _at_most(limit: int | MemoryLimit, most: int, config: EngineConfig) -> int | MemoryLimit:
    """The limit, but "auto" no more than the slots could ever use."""
    return min(limit, most) if config.kv_memory == "auto" and isinstance(limit, int) else limit


def _page_bytes(
    loaded: LoadedModel, layers_per_range: int | None, limit: int | MemoryLimit
) -> int | None:
    """A size for a CPU's pages; a GPU has one of its own."""
    if loaded.device.type != "cpu":
        return None
    limit_bytes = limit.num_bytes if isinstance(limit, MemoryLimit) else limit
    return host_page_bytes(loaded.geometry, loaded.dtype, layers_per_range, limit_bytes)


def host_page_bytes(
    geometry: Sequence[LayerGeometry],
    dtype: torch.dtype,
    layers_per_range: int | None,
    limit_bytes: int,
) -> int:
    """On a CPU, a power of two that covers about `_ROW_TOKENS` tokens of a range.

    More, where the pool's limit would otherwise mean more pages than can be mapped one by one.
    """
    widest = max(g.num_kv_heads * (g.key_dim + g.value_dim) for g in geometry)
    layers = min(layers_per_range or len(geometry), len(geometry))
    wanted = min(layers * widest * dtype.itemsize * _ROW_TOKENS, _MAX_PAGE_BYTES)
    wanted = max(wanted, _MIN_PAGE_BYTES, limit_bytes // _MAX_PAGES)
    return 1 << (wanted - 1).bit_length()


def _token_bytes(loaded: LoadedModel) -> int:
    """Bytes of one token's keys and values over all layers."""
    heads = sum(g.num_kv_heads * (g.key_dim + g.value_dim) for g in loaded.geometry)
    return heads * loaded.dtype.itemsize
