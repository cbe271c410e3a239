"""The tiers behind an engine's KV: host memory that slots are copied to, and a folder."""

import logging
from dataclasses import replace
from pathlib import Path

from ....allocator import (
    KVCache,
    KVLayout,
    PagedLayout,
    PagePool,
    SlotCache,
    parse_bytes,
)
from ....allocator.transfer import Copier, KVDir, MemoryTier
from ....vmem import HostDriver, linux
from ....vmem.errors import InvalidConfig, UnsupportedModel
from ...execution.model_runner import ModelRunner
from ...model.fingerprint import ModelFingerprint
from ...model.loading import LoadedModel
from ...scheduling.swapping import Swapping
from ...scheduling.tiers import Tiers
from ..config import EngineConfig

_log = logging.getLogger(__name__)

_MOST_SLOTS = 1024
_MOST_VIRTUAL_BYTES = 8 << 40  # address space of the tier; a process has 128 TiB in all
_PAGE_BYTES = 64 << 10  # where the cache itself has no pages of the host


def build_tiers(
    loaded: LoadedModel,
    config: EngineConfig,
    cache: SlotCache,
    runner: ModelRunner,
    fingerprint: ModelFingerprint,
) -> Tiers:
    """What `config` wants behind a cache. Raises InvalidConfig or UnsupportedModel."""
    kv_dir = _build_kv_dir(loaded, config, cache, fingerprint)  # which holds nothing yet
    return Tiers(cache, _build_swapping(loaded, config, cache, runner), kv_dir)


def _build_swapping(
    loaded: LoadedModel, config: EngineConfig, cache: SlotCache, runner: ModelRunner
) -> Swapping | None:
    """The tier that `config.swap_memory` asks for; None if it asks for none.

    Raises InvalidConfig if the memory could not hold even one page of every range.
    """
    if config.swap_memory is None:
        return None
    wanted, available = parse_bytes(config.swap_memory), linux.available_bytes()
    if wanted > available:
        _log.warning(
            "swap_memory is %r, and this machine has %.1f GiB left: the limit is that",
            config.swap_memory,
            available / 2**30,
        )
    layout = _layout(cache)
    limit = min(wanted, available)
    if limit < layout.growth_bytes:
        raise InvalidConfig(
            f"swap_memory is {config.swap_memory!r}, which holds not even {layout.growth_tokens} "
            f"tokens; give it at least {layout.growth_bytes} bytes"
        )
    driver = HostDriver(layout.page_bytes, max_mappings=linux.max_map_count() // 4)
    try:
        num_slots = max(2, min(_MOST_SLOTS, _MOST_VIRTUAL_BYTES // layout.slot_bytes))
        pool = PagePool(driver, limit, sanitize=config.sanitize)
        far = TierCache(layout, pool, driver, num_slots=num_slots)
    except BaseException:
        driver.close()
        raise
    return Swapping(
        MemoryTier(cache, far, Copier(loaded.device)), runner, keeps_state=loaded.keeps_state
    )


def _build_kv_dir(
    loaded: LoadedModel, config: EngineConfig, cache: SlotCache, fingerprint: ModelFingerprint
) -> KVDir | None:
    """The folder that `config.kv_dir` asks for; None if it asks for none.

    Raises InvalidConfig if it cannot be used, UnsupportedModel if the model keeps more than keys
    and values of its tokens.
    """
    if config.kv_dir is None:
        return None
    if loaded.keeps_state:
        raise UnsupportedModel(
            f"{type(loaded.model).__name__} has layers with recurrent or convolution state, which "
            "files do not hold; leave kv_dir out"
        )
    return KVDir(
        Path(config.kv_dir).expanduser().absolute(),
        parse_bytes(config.kv_dir_limit),
        cache,
        fingerprint.value(),
    )


class TierCache(KVCache):
    """A cache that closes its driver, too, when it is shut down."""

    def __init__(
        self, layout: KVLayout, pool: PagePool, driver: HostDriver, *, num_slots: int
    ) -> None:
        super().__init__(layout, pool, num_slots=num_slots, max_parked=num_slots)
        self._driver = driver

    def shutdown(self) -> None:
        super().shutdown()
        self._driver.close()


def _layout(cache: SlotCache) -> KVLayout:
    """Slots on the host whose tokens have the same bytes as those of `cache`."""
    geometry = cache.geometry
    if isinstance(geometry, KVLayout):
        return replace(geometry, over_read_tokens=1)
    assert isinstance(geometry, PagedLayout)
    return KVLayout(
        geometry.layers,
        geometry.dtype,
        geometry.max_len,
        _PAGE_BYTES,
        layers_per_range=1,
        split_kv=True,
    )
