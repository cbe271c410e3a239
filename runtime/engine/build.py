"""From a model and its options to an engine: driver, pages, slots, kernels."""

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ...allocator import (
    KVCache,
    KVLayout,
    MemoryLimit,
    PagedKVCache,
    PagedLayout,
    PageGeometry,
    PagePool,
    SlotCache,
    parse_bytes,
)
from ...attention_backends import AttentionBackend, choose_backend, create_backend
from ...vmem import VmemDriver, open_driver
from ...vmem.errors import InvalidConfig
from ..adapters.adapters import Adapters
from ..blocks.places import Source, locate
from ..chains.chains import Chains
from ..chains.family import neighbours
from ..execution.grammars import Grammars
from ..execution.model_runner import ModelRunner
from ..execution.recordings import Recorder
from ..execution.recurrent_runner import RecurrentRunner
from ..model.ends import generation_ends, read_generation_config, sampling_defaults
from ..model.fingerprint import ModelFingerprint
from ..model.forward import Forward
from ..model.loading import LoadedModel, load_model
from ..model.recurrent_state import RecurrentState
from ..model.repeatability import why_not_repeatable
from ..model.weights import ModelWatch
from ..scheduling.plan import Order
from ..scheduling.policies import POLICIES, Fair, Fcfs, Priority
from ..scheduling.scheduler import Scheduler
from ..scheduling.tiers import Tiers
from ..speculation import Speculation
from .admission import Admission
from .config import EngineConfig
from .devices import DeviceProfile, device_profile, resolve_device
from .engine import Engine
from .loop import EngineLoop
from .memory.closing import Closing
from .memory.drafters import RunnerMakers, build_speculation, load_draft, max_rows
from .memory.extra_weights import ExtraWeights
from .memory.memory_profile import step_bytes
from .memory.segments import add_segments, longest_alone
from .memory.tiers import build_tiers

_log = logging.getLogger(__name__)

READY_GROWTHS = 2  # as many growth steps' pages are kept created, so that few wait for the system


def load(
    source: Source,
    model: Source = None,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
    config: EngineConfig,
) -> LoadedModel:
    """The model that an engine of this `config` runs; arguments as of `LLM`."""
    generation = read_generation_config(config.generation_config)
    place, stored = locate(source, model)
    loaded = load_model(
        place,
        tokenizer=tokenizer,
        device=resolve_device(device),
        dtype=dtype,
        pack_weights=config.pack_weights,
        repeatable=config.repeatable,
        lm_head_bits=config.lm_head_bits,
        activation_bits=config.activation_bits,
        stored=stored,
    )
    if config.generation_config == "auto":
        generation = getattr(loaded.model, "generation_config", None)
    ends = {token for token in generation_ends(generation) if 0 <= token < loaded.vocab_size}
    return replace(
        loaded,
        sampling_defaults=sampling_defaults(generation, loaded.name),
        eos_token_ids=loaded.eos_token_ids | ends,
    )


def build_loop(loaded: LoadedModel, config: EngineConfig) -> EngineLoop:
    """Put an engine together. Raises InvalidConfig or UnsupportedAttention by name."""
    profile = device_profile(loaded.device)
    backend = _build_backend(loaded, config)
    draft = load_draft(loaded, config)
    # Which may refuse, before memory is taken.
    why_not_recorded(loaded, config, backend)
    _check_repeatable(loaded, config, backend)
    fingerprint = ModelFingerprint(
        loaded.model,
        loaded.files,
        (loaded.dtype, config.lm_head_bits, config.activation_bits, config.repeatable),
    )
    closing = Closing()
    try:
        cache, driver = _open_cache(loaded, config, backend, profile, closing)
        adapters = _build_adapters(loaded, config, cache, profile)
        closing.add(adapters.close)
        chains = _build_chains(loaded, config, cache)
        if chains is not None:
            closing.add(chains.close)
        runner = _build_runner(loaded, config, backend, cache, driver, profile, adapters, chains)
        speculation = build_speculation(
            loaded,
            config,
            cache,
            draft,
            _runner_makers(loaded, config, backend, cache, driver, profile),
            config.max_batch_tokens or profile.max_batch_tokens,
        )
        if speculation is not None:
            closing.add(speculation.drafter.close)
        tiers = build_tiers(loaded, config, cache, runner, fingerprint)
        closing.add(functools.partial(_let_go, runner, tiers))
        why_not_longer = add_segments(
            loaded, backend, cache, runner, tiers, shares_attention=profile.shares_attention
        )
        engine = Engine(
            runner,
            cache,
            _build_scheduler(loaded, config, cache, tiers, profile, speculation),
            _build_admission(loaded, config, cache, tiers, why_not_longer),
            eos_token_ids=loaded.eos_token_ids,
            grammars=_build_grammars(loaded, chains),
            watch=ModelWatch(loaded),
            fingerprint=fingerprint,
            extras=ExtraWeights(adapters, chains),
            overlap=_overlaps(loaded, config, profile),
            step_bytes=step_bytes(
                loaded,
                max_batch_tokens=config.max_batch_tokens or profile.max_batch_tokens,
                max_seqs=max_rows(config),
            ),
        )
        return EngineLoop(engine, closing.close, shortage_wait_s=config.shortage_wait_s)
    except BaseException:
        closing.close()
        raise


def _build_backend(loaded: LoadedModel, config: EngineConfig) -> AttentionBackend:
    needs = loaded.needs(paged=config.kv == "paged")
    if config.attention == "auto":
        return choose_backend(needs)
    return create_backend(config.attention, needs)


def _let_go(runner: ModelRunner, tiers: Tiers) -> None:
    """What they have of the cache, before that closes."""
    if runner.recordings is not None:
        runner.recordings.forget()
    runner.forget()
    tiers.close()


def why_not_recorded(
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
    elif loaded.has_forward_hooks:
        obstacle = "the model's forward hooks would not run in replayed steps"
    elif not backend.capabilities.graphs:
        obstacle = f"attention backend {backend.name!r} cannot be recorded"
    if config.record_decodes and obstacle:
        raise InvalidConfig(f"record_decodes is True, but {obstacle}; leave it None")
    if config.record_decodes is False:
        return "record_decodes is False"
    return obstacle


def _check_repeatable(loaded: LoadedModel, config: EngineConfig, backend: AttentionBackend) -> None:
    """Raises InvalidConfig if `repeatable=True` asks for what does not hold."""
    if not config.repeatable:
        return
    obstacle = None
    if loaded.keeps_state:
        obstacle = "recurrent state is summed chunk by chunk"
    elif not backend.capabilities.repeatable:
        obstacle = (
            f"attention backend {backend.name!r} sums in an order that depends on the batch, and "
            "only 'native' does not (a CPU's, of float32 and bfloat16)"
        )
    obstacle = obstacle or why_not_repeatable(loaded.model)
    if obstacle:
        raise InvalidConfig(f"repeatable is True, but {obstacle}; leave it False")


def _build_runner(
    loaded: LoadedModel,
    config: EngineConfig,
    backend: AttentionBackend,
    cache: SlotCache,
    driver: VmemDriver | None,
    profile: DeviceProfile,
    adapters: Adapters | None = None,
    chains: Chains | None = None,
    forward: Forward | None = None,
) -> ModelRunner:
    """A runner of a model, or of what of it `forward` runs."""
    forward = forward or Forward(loaded.model)
    if loaded.keeps_state:
        return RecurrentRunner(
            forward,
            cache,
            backend,
            loaded.attention,
            loaded.device,
            attention_layers=loaded.attention_layers,
            states=RecurrentState(loaded.model.config, cache.num_slots),
            vocab_size=loaded.vocab_size,
            adapters=adapters,
        )
    recorder: Recorder | None = None
    if driver is not None and why_not_recorded(loaded, config, backend) is None:
        recorder = profile.recorder(driver)
    return ModelRunner(
        forward,
        cache,
        backend,
        loaded.attention,
        loaded.device,
        recorder=recorder,
        max_seqs=config.max_seqs,
        adapters=adapters,
        chains=chains,
    )


def _runner_makers(
    loaded: LoadedModel,
    config: EngineConfig,
    backend: AttentionBackend,
    cache: SlotCache,
    driver: VmemDriver | None,
    profile: DeviceProfile,
) -> RunnerMakers:
    """How what guesses is run."""
    return RunnerMakers(
        same=lambda forward: _build_runner(
            loaded, config, backend, cache, driver, profile, forward=forward
        ),
        alone=lambda draft, own: _build_alone(draft, own, profile),
    )


def _build_alone(
    loaded: LoadedModel, config: EngineConfig, profile: DeviceProfile
) -> tuple[ModelRunner, Callable[[], None]]:
    """A runner of another model with a cache of its own, and what closes that."""
    backend = choose_backend(loaded.needs(paged=False))
    closing = Closing()
    try:
        cache, driver = _open_cache(loaded, config, backend, profile, closing)
        runner = _build_runner(loaded, config, backend, cache, driver, profile)
        return runner, closing.close
    except BaseException:
        closing.close()
        raise


def _build_adapters(
    loaded: LoadedModel, config: EngineConfig, cache: SlotCache, profile: DeviceProfile
) -> Adapters:
    """None of them in memory yet. The paged baseline, which has all of its pages, counts them
    beside it."""
    adapters = Adapters(
        loaded.model,
        dtype=loaded.dtype,
        limit=_limit_of(cache),
        products=profile.products(loaded.dtype),
    )
    try:
        for name, path in (config.adapters or {}).items():
            adapters.load(name, path)
    except BaseException:
        adapters.close()
        raise
    return adapters


def _limit_of(cache: SlotCache) -> MemoryLimit:
    """What further weights count under."""
    limit = cache.pool.shared_limit
    return limit or MemoryLimit(cache.pool.limit_pages * cache.pool.driver.page_bytes)


def _build_chains(loaded: LoadedModel, config: EngineConfig, cache: SlotCache) -> Chains | None:
    """The models of the same zoo that run beside this one; none of them in memory yet."""
    if not config.models:
        return None
    chain, others = neighbours(loaded.name, config.models)
    return Chains(
        loaded,
        chain,
        others,
        limit=_limit_of(cache),
        repeatable=config.repeatable,
        lm_head_bits=config.lm_head_bits,
        activation_bits=config.activation_bits,
        generation_config=str(config.generation_config),
    )


def _build_scheduler(
    loaded: LoadedModel,
    config: EngineConfig,
    cache: SlotCache,
    tiers: Tiers,
    profile: DeviceProfile,
    speculation: Speculation | None,
) -> Scheduler:
    return Scheduler(
        cache,
        POLICIES[config.policy](_order(config)),
        max_seqs=config.max_seqs,
        max_batch_tokens=config.max_batch_tokens or profile.max_batch_tokens,
        look_ahead_tokens=config.look_ahead_tokens,
        # A slot has keys and values from its start, but state of its last token only.
        prefix_reuse=config.prefix_reuse and not loaded.keeps_state,
        tiers=tiers,
        tenant_weights=config.tenant_weights,
        speculation=speculation,
    )


def _order(config: EngineConfig) -> Order:
    if config.scheduling_policy == "priority":
        return Priority(config.priority_aging_s)
    return Fair() if config.scheduling_policy == "fair" else Fcfs()


def _build_grammars(loaded: LoadedModel, chains: Chains | None) -> Grammars | None:
    """For all models that run together: they have one vocabulary, and ends of their own."""
    if loaded.tokenizer is None:
        return None
    ends = set(loaded.eos_token_ids)
    for voice in chains.voices.values() if chains is not None else ():
        ends |= voice.eos_token_ids if voice is not None else set()
    return Grammars(loaded.tokenizer, loaded.vocab_size, ends)


def _build_admission(
    loaded: LoadedModel,
    config: EngineConfig,
    cache: SlotCache,
    tiers: Tiers,
    why_not_longer: str | None,
) -> Admission:
    longest = longest_alone(cache)
    if tiers.segments is not None and tiers.segments.tier is not None:
        longest = max(longest, longest_alone(tiers.segments.tier.far))
    return Admission(
        vocab_size=loaded.vocab_size,
        max_len=cache.max_len,
        limit_pages=cache.pool.limit_pages,
        longest=longest,
        why_not_longer=why_not_longer,
        num_pages=functools.partial(_num_pages, cache.geometry),  # which a process may send
        takes_priority=config.scheduling_policy == "priority",
    )


def _num_pages(geometry: PageGeometry, num_tokens: int) -> int:
    return sum(geometry.pages_per_range(num_tokens))


def _overlaps(loaded: LoadedModel, config: EngineConfig, profile: DeviceProfile) -> bool:
    if config.overlap and loaded.keeps_state:
        raise InvalidConfig(
            "overlap is True, but layers with recurrent or convolution state go on from the step "
            "before; leave it None"
        )
    if config.overlap is None:
        return profile.overlaps and not loaded.keeps_state and config.speculative is None
    return config.overlap


# -- the cache -------------------------------------------------------------------------------


def _open_cache(
    loaded: LoadedModel,
    config: EngineConfig,
    backend: AttentionBackend,
    profile: DeviceProfile,
    closing: Closing,
) -> tuple[SlotCache, VmemDriver | None]:
    """A cache that `backend` takes, and its driver, which the paged baseline has not; `closing`
    gives back their memory and address space.
    """
    cache, driver = _build_cache(loaded, config, backend, profile)
    if driver is not None:
        closing.add(driver.close)
    closing.add(cache.shutdown)
    for index in range(len(loaded.geometry)):
        backend.check_cache(*cache.layer(index))
    return cache, driver


def _build_cache(
    loaded: LoadedModel, config: EngineConfig, backend: AttentionBackend, profile: DeviceProfile
) -> tuple[SlotCache, VmemDriver | None]:
    max_len = config.max_len or loaded.max_positions
    if max_len > loaded.max_positions:
        raise InvalidConfig(
            f"max_len is {max_len}, and {loaded.name} takes {loaded.max_positions} positions "
            "here; lower max_len"
        )
    max_parked = config.max_seqs if config.max_parked is None else config.max_parked
    num_slots = config.max_seqs + max_parked
    given = _limit(loaded, config, num_slots, profile)
    if config.kv == "paged":
        paged = PagedLayout(loaded.geometry, loaded.dtype, max_len, config.block_tokens)
        assert not isinstance(given, MemoryLimit), "refused by the config"
        return (
            PagedKVCache(
                paged,
                min(given, num_slots * paged.num_pages(max_len) * paged.page_bytes),
                num_slots=num_slots,
                max_parked=max_parked,
                device=loaded.device,
                sanitize=config.sanitize,
            ),
            None,
        )
    limit = given if isinstance(given, MemoryLimit) else MemoryLimit(given)
    layers_per_range = config.layers_per_range or profile.layers_per_range
    page_bytes = config.page_bytes
    if page_bytes is None:
        rough = min(limit.num_bytes, num_slots * max_len * _token_bytes(loaded))
        page_bytes = profile.page_bytes(loaded.geometry, loaded.dtype, layers_per_range, rough)
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
            limit,
            most_bytes=None if limit is given else most,  # one that several keep is theirs
            low_watermark=READY_GROWTHS * layout.num_ranges,
            sanitize=config.sanitize,
        )
        cache = KVCache(
            layout, pool, num_slots=num_slots, max_parked=max_parked, movable=config.movable
        )
        return cache, driver
    except BaseException:
        driver.close()
        raise


def _limit(
    loaded: LoadedModel, config: EngineConfig, num_slots: int, profile: DeviceProfile
) -> int | MemoryLimit:
    """What keys and values may take."""
    if isinstance(config.kv_memory, MemoryLimit):
        return config.kv_memory
    if config.kv_memory != "auto":
        wanted, available = parse_bytes(config.kv_memory), profile.available_bytes()
        if wanted > available:
            _log.warning(
                "kv_memory is %r, and this machine has %.1f GiB left: the limit is that",
                config.kv_memory,
                available / 2**30,
            )
        return min(wanted, available)
    return profile.auto_kv_bytes(
        loaded,
        max_batch_tokens=config.max_batch_tokens or profile.max_batch_tokens,
        max_seqs=config.max_seqs,
        num_slots=num_slots,
    )


def _token_bytes(loaded: LoadedModel) -> int:
    """Bytes of one token's keys and values over all layers."""
    heads = sum(g.num_kv_heads * (g.key_dim + g.value_dim) for g in loaded.geometry)
    return heads * loaded.dtype.itemsize
