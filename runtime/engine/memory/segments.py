"""Room for requests that are longer than the pool: their first tokens lie in the tier."""

import bisect
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from ....allocator import KVCache, SlotCache
from ....allocator.transfer import SegmentTier, tokens_in
from ....attention_backends import AttentionBackend, create_backend, partial_attention
from ....vmem.errors import InvalidOperation, UnsupportedAttention
from ...execution.model_runner import ModelRunner
from ...model.loading import LoadedModel
from ...model.segments import (
    HolderLost,
    LocalHolder,
    RemoteHolder,
    SegmentedAttention,
    SegmentServer,
)
from ...scheduling.scheduler import Scheduler
from ...scheduling.segments import Segments
from ...scheduling.tiers import Tiers

if TYPE_CHECKING:
    from ..engine import Engine

_log = logging.getLogger(__name__)

PART_TOKENS = 512  # what moves is a multiple of it: the grid of `native`'s sums
SPARE_TOKENS = PART_TOKENS  # that an engine keeps for its own requests while it lends
NOTICE_S = 0.5  # for borrowers to take away what is called back
PAUSE_S = 1.0  # after which a lender takes tokens in again
_SHARE = 2  # a long request has one of so many parts of the pool at most


def add_segments(
    loaded: LoadedModel,
    backend: AttentionBackend,
    cache: SlotCache,
    runner: ModelRunner,
    tiers: Tiers,
    *,
    shares_attention: bool,
) -> str | None:
    """Let requests outgrow the pool that begin in the tier; or say, in words, why none can yet.

    `shares_attention` is as of `DeviceProfile`.
    """
    if loaded.keeps_state:
        return "layers with recurrent or convolution state need them in one place"
    if not shares_attention:
        return f"that {loaded.device} and host memory attend to one request together is not proven"
    if not isinstance(cache, KVCache):
        return "the paged baseline keeps a request's tokens in its own pool"
    local_tokens = _local_tokens(cache)
    if local_tokens < 2 * PART_TOKENS:
        return f"for that the pool must hold {2 * _SHARE * PART_TOKENS} tokens at least"
    try:
        here = partial_attention(backend)
        there = partial_attention(create_backend(backend.name, loaded.needs(paged=False)))
    except UnsupportedAttention as error:
        return str(error)
    runner.segmented = SegmentedAttention(here, {})
    tier, make_way = None, _nothing
    if tiers.swapping is not None:
        far, make_way = tiers.swapping.tier.far, tiers.swapping.tier.give_way
        tier = SegmentTier(cache, far, PART_TOKENS)
        runner.segmented.holders[tier.holder] = LocalHolder(far, there)
    tiers.segments = Segments(
        cache,
        tiers.exits,
        tiers.kv_files,
        tier=tier,
        make_way=make_way,
        part_tokens=PART_TOKENS,
        local_tokens=local_tokens,
        num_layers=len(loaded.geometry),
    )
    return None if tier is not None else "without swap_memory there is no tier for its first tokens"


def segment_server(loaded: LoadedModel, engine: "Engine") -> SegmentServer | None:
    """What lends an engine's memory to others, and gives way where that is short; None if requests
    of its model cannot be longer than a pool."""
    if engine.scheduler.tiers.segments is None:
        return None
    backend = create_backend(engine.runner.backend.name, loaded.needs(paged=False))
    server = SegmentServer(
        engine.cache,
        partial_attention(backend),
        loaded.attention,
        loaded.dtype,
        spare_tokens=SPARE_TOKENS,
        pause_s=PAUSE_S,
        notice_s=NOTICE_S,
        exits=engine.scheduler.exits,
    )
    engine.scheduler.tiers.lenders.append(server)
    engine.lender = server
    return server


def connect_creditor(engine: "Engine", creditor: RemoteHolder) -> None:
    """Have another engine take tokens in, as far as `Loans.limits` says."""
    segments, segmented = engine.scheduler.tiers.segments, engine.runner.segmented
    assert segments is not None
    assert segmented is not None
    segments.loans.creditors[creditor.name] = segmented.holders[creditor.name] = creditor


def disconnect_creditor(engine: "Engine", name: str) -> None:
    """Ask another engine for nothing more. It may have no tokens of any request."""
    segments, segmented = engine.scheduler.tiers.segments, engine.runner.segmented
    assert segments is not None
    assert segmented is not None
    assert not segments.loans.num_lent(name), name
    segments.loans.creditors.pop(name, None)
    segmented.holders.pop(name, None)


def add_creditor(engine: "Engine", creditor: RemoteHolder, num_tokens: int) -> None:
    """Have another engine take tokens of requests that outgrow the pool, about so many.

    It stays the caller's to close. Raises InvalidOperation, with the reason, if no request can be
    longer than the pool here.
    """
    segments, segmented = engine.scheduler.tiers.segments, engine.runner.segmented
    if segments is None or segmented is None:
        raise InvalidOperation(
            f"no request can be longer than the pool here: {engine.admission.why_not_longer}"
        )
    connect_creditor(engine, creditor)
    longest = engine.admission.longest
    if engine.admission.why_not_longer is not None:  # the first tokens that lie elsewhere are these
        longest = max(longest, segments.local_tokens + num_tokens)
    else:
        longest += num_tokens
    longest = min(longest, engine.cache.max_len - 1)
    engine.admission = replace(engine.admission, longest=longest, why_not_longer=None)


def take_back(scheduler: Scheduler, lost: HolderLost) -> None:
    """Have tokens that are lost computed again; all of a request's where there is no memory for
    less, or where it began in the tier. It costs no other request anything."""
    _log.warning("%s; those tokens are computed again", lost)
    segments = scheduler.tiers.segments
    assert segments is not None, "nobody has tokens of requests"
    if lost.loans is None:
        segments.loans.creditors.pop(lost.holder, None)
    for request in scheduler.running[::-1]:  # so that they come back in their order
        there = [one for one in request.all_lent if one.holder == lost.holder]
        gone = [one for one in there if lost.loans is None or one.loan in lost.loans]
        if lost.loans is None:
            segments.loans.num_lost += len(gone)
        else:
            segments.loans.num_called_back += len(gone)
        if request.segment is not None and request.segment.holder == lost.holder:
            scheduler.preempt(request, keep=False)
        elif gone and not segments.gaps.open(request, gone):
            scheduler.preempt(request)


def _nothing() -> bool:
    return False


def longest_alone(cache: SlotCache) -> int:
    """Tokens of the longest sequence that the pool of a cache could hold if it were alone."""
    return tokens_in(cache, cache.pool.limit_pages)


def _local_tokens(cache: SlotCache) -> int:
    """Tokens that a long request has in its slot at most: whole parts, of a share of the pool."""
    share = cache.pool.limit_pages // _SHARE
    parts = range(0, cache.max_len + 1, PART_TOKENS)
    return parts[bisect.bisect_right(parts, share, key=cache.num_pages) - 1]
