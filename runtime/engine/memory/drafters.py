"""Who guesses for an engine: looks in the text, a model of its own, or the model itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedModel

from ....allocator import MemoryLimit, SlotCache
from ....vmem.errors import InvalidConfig
from ...blocks.places import locate
from ...execution.model_runner import ModelRunner
from ...model.forward import Forward
from ...model.loading import LoadedModel, load_model
from ...model.weights import ModelWatch
from ...speculation import Drafter, DraftModel, PromptLookup, Speculation, Surrogate
from ..config import EngineConfig


@dataclass(frozen=True, kw_only=True)
class RunnerMakers:
    """How an engine's runners are made.

    Attributes:
        same: one of another model over the engine's own cache.
        alone: one with a cache of its own, which is not the engine's, and what closes that.
    """

    same: Callable[[Forward], ModelRunner]
    alone: Callable[[LoadedModel, EngineConfig], tuple[ModelRunner, Callable[[], None]]]


def max_rows(config: EngineConfig) -> int:
    """Tokens of a step, at most, that are sampled or verified."""
    guessed = 0 if config.speculative is None else config.speculative_tokens
    return max(config.max_seqs, 1 + guessed)


def load_draft(loaded: LoadedModel, config: EngineConfig) -> LoadedModel | None:
    """The model that guesses for another, if `speculative` names one.

    Raises InvalidConfig if `speculative` asks for what cannot be, BadZoo as `locate` does,
    BadCheckpoint and UnsupportedModel as `load_model`.
    """
    if config.speculative is None:
        return None
    if loaded.keeps_state:
        given = config.speculative if isinstance(config.speculative, str) else "a model"
        raise InvalidConfig(
            f"speculative is {given!r}, but layers with recurrent or convolution state do not "
            "forget a token that was guessed wrong; leave it None"
        )
    if not config.has_draft_model:
        return None
    source = cast("str | PreTrainedModel", config.speculative)
    if source is loaded.model:
        raise InvalidConfig(
            "speculative is the very model that is to verify; use 'surrogate', or another model"
        )
    is_object = isinstance(source, PreTrainedModel)
    place, stored = locate(source)
    draft = load_model(
        place,
        device=loaded.device,
        dtype="auto" if is_object else loaded.dtype,
        pack_weights=config.pack_weights,
        stored=stored,
    )
    if draft.vocab_size != loaded.vocab_size:
        raise InvalidConfig(
            f"speculative is {draft.name}, which has {draft.vocab_size} tokens, and {loaded.name} "
            f"has {loaded.vocab_size}; use a draft model with the same vocabulary"
        )
    if draft.keeps_state:
        raise InvalidConfig(
            f"speculative is {draft.name}, some of whose layers have recurrent or convolution "
            "state and do not forget a token that was guessed wrong; use another draft model"
        )
    return draft


def build_speculation(
    loaded: LoadedModel,
    config: EngineConfig,
    cache: SlotCache,
    draft: LoadedModel | None,
    makers: RunnerMakers,
    max_batch_tokens: int,
) -> Speculation | None:
    """What `config.speculative` asks for; None if nothing.

    Args:
        draft: as of `load_draft`.
        max_batch_tokens: of the engine's steps.
    """
    if config.speculative is None:
        return None
    drafter: Drafter
    if draft is not None:
        drafter = _build_draft_model(draft, config, cache, makers, max_batch_tokens)
    elif config.surrogate_share is not None:
        drafter = Surrogate(
            loaded.model,
            config.surrogate_share,
            vocab_size=loaded.vocab_size,
            make_runner=makers.same,
        )
    else:
        drafter = PromptLookup()
    return Speculation(drafter, max_tokens=config.speculative_tokens, max_rows=max_rows(config))


def _build_draft_model(
    draft: LoadedModel,
    config: EngineConfig,
    cache: SlotCache,
    makers: RunnerMakers,
    max_batch_tokens: int,
) -> DraftModel:
    """A small model with a cache under the engine's limit; the paged baseline, which has all of its
    pages, is as much again."""
    limit = cache.pool.shared_limit
    if limit is None:
        limit = MemoryLimit(cache.pool.limit_pages * cache.pool.driver.page_bytes)
    own = replace(
        config,
        kv="virtual",
        kv_memory=limit,
        max_len=min(cache.max_len, draft.max_positions),
        max_parked=config.max_seqs,  # all are, between two guesses
        attention="auto",
        page_bytes=None,
        layers_per_range=None,
        record_decodes=None if config.record_decodes else config.record_decodes,
        movable=False,
        repeatable=False,
        speculative=None,
    )
    runner, close = makers.alone(draft, own)
    return DraftModel(runner, close, watch=ModelWatch(draft), chunk_tokens=max_batch_tokens)
