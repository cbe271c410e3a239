"""Room for requests that are longer than the pool: their first tokens lie in the tier."""

import bisect

from ....allocator import KVCache, SlotCache
from ....allocator.transfer import SegmentTier
from ....attention_backends import AttentionBackend, create_backend, partial_attention
from ....vmem.errors import UnsupportedAttention
from ...execution.model_runner import ModelRunner
from ...model.loading import LoadedModel
from ...model.segments import LocalHolder, SegmentedAttention
from ...scheduling.segments import Segments
from ...scheduling.tiers import Tiers

PART_TOKENS = 512  # what moves is a multiple of it: the grid of `native`'s sums
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
    """Let requests begin in the tier that outgrow the pool; or say, in words, why none can.

    `shares_attention` is as of `DeviceProfile`.
    """
    if tiers.swapping is None:
        return "without swap_memory there is no tier for its first tokens"
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
    far = tiers.swapping.tier.far
    tier = SegmentTier(cache, far, tiers.exits, PART_TOKENS)
    tiers.segments = Segments(cache, tier, tiers.exits, tiers.kv_files, local_tokens=local_tokens)
    runner.segmented = SegmentedAttention(here, {tier.holder: LocalHolder(far, there)})
    return None


def longest_alone(cache: SlotCache) -> int:
    """Tokens of the longest sequence that the pool of a cache could hold if it were alone."""
    limit = cache.pool.limit_pages
    return bisect.bisect_right(range(cache.max_len), limit, key=cache.num_pages) - 1


def _local_tokens(cache: SlotCache) -> int:
    """Tokens that a long request has in its slot at most: whole parts, of a share of the pool."""
    share = cache.pool.limit_pages // _SHARE
    parts = range(0, cache.max_len + 1, PART_TOKENS)
    return parts[bisect.bisect_right(parts, share, key=cache.num_pages) - 1]
