"""Requests longer than the pool: their first tokens lie in the tier, and are attended there.

Of a request that may get more tokens than the pool holds, the slot has `local_tokens` at most. When
it would have more, all whole parts of it move to the end of the request's segment, and it goes on
with the rest. Only what is in the slot counts against the pool.

Source: Infinite-LLM, arXiv:2401.02669, section 5, with the host's memory as the creditor.
"""

from collections.abc import Sequence
from contextlib import suppress

from ...allocator import Exits, Slot, SlotCache
from ...allocator.transfer import SegmentTier
from ...vmem.errors import DriverError, Shortage
from ..request.request import Request
from .kv_files import KVFiles


class Segments:
    """Keeps the slots of long requests short.

    Args:
        cache: where the slots are.
        tier: where the beginnings go.
        exits: how slots of `cache` are let go.
        kv_files: files that a segment may begin with.
        local_tokens: the most tokens that a long request has in its slot; at least two parts.
    """

    def __init__(
        self,
        cache: SlotCache,
        tier: SegmentTier,
        exits: Exits,
        kv_files: KVFiles,
        *,
        local_tokens: int,
    ) -> None:
        self.tier = tier
        self.local_tokens = local_tokens
        self._cache = cache
        self._exits = exits
        self._kv_files = kv_files

    def is_long(self, request: Request) -> bool:
        """True of one that may outgrow the pool, and whose tokens are too many for a slot now."""
        return request.num_tokens > self.local_tokens and self._may_outgrow(request)

    def _may_outgrow(self, request: Request) -> bool:
        # The last token is never computed, so it needs no room.
        most = request.num_prompt_tokens + request.max_tokens - 1
        most = min(most, self._cache.max_len)
        return self._cache.num_pages(most) > self._cache.pool.limit_pages

    def open(self, request: Request, tokens: Sequence[int], budget: int) -> tuple[Slot, int]:
        """Give a long request its segment, and a slot for what follows.

        Returns the slot, and how many tokens to compute now, `budget` at most. `tokens` are those
        that may be found computed. Raises a Shortage or DriverError, with the request as it was.
        """
        parts, tier = self.tier.whole_parts, self.tier
        found = None
        near_by = tier.far.prefix_length(tokens, request.variant)
        if self._kv_files.may_have_some:
            least = near_by + tier.part_tokens
            found = self._kv_files.open_slot(
                tier.far, tokens, request.variant, least=least, exits=tier.exits
            )
        num_reserved = parts(request.num_tokens)
        segment = tier.begin(tokens, request.variant, num_reserved=num_reserved, found=found)
        slot = None
        try:
            slot = self._cache.open()
            left = min(request.num_tokens - segment.num_tokens, self.local_tokens)
            count = min(left, budget)
            self._cache.reserve(slot, left)
            self._cache.grow(slot, count)
        except (Shortage, DriverError):
            if slot is not None:
                self._exits.let_go(slot)
            tier.release(segment, tokens, request.variant)
            raise
        request.segment = segment
        return slot, count

    def make_room(self, request: Request, count: int) -> int:
        """Have room in a request's slot for `count` more tokens, or as many as it may have.

        Returns how many. Raises a Shortage or DriverError, with the request as it was.
        """
        slot = request.slot
        assert slot is not None
        num_local = request.num_computed - request.slot_start
        if num_local + count <= self.local_tokens or not self._may_outgrow(request):
            return count
        num_moving = self.tier.whole_parts(num_local)
        if num_moving:
            segment = request.segment or self.tier.begin(())
            try:
                fresh = self.tier.move(segment, slot, num_moving, num_local)
            except (Shortage, DriverError):
                if request.segment is None:
                    self.tier.release(segment, ())
                raise
            request.segment, request.slot = segment, fresh
            self._exits.let_go(slot)
            with suppress(Shortage, DriverError):  # then it asks again when it needs it
                left = request.num_tokens - segment.num_tokens
                self._cache.reserve(fresh, min(left, self.local_tokens))
        return min(count, self.local_tokens - (num_local - num_moving))

    def let_go(self, request: Request, slot: Slot, *, keep: bool) -> None:
        """Let the segment and the slot of a request go; with `keep`, the tier parks what it has."""
        segment, request.segment = request.segment, None
        assert segment is not None
        if keep:
            rest = self.tier.whole_parts(request.num_computed - segment.num_tokens)
            with suppress(Shortage, DriverError):  # then that is computed again
                if rest:
                    self.tier.append(segment, slot, rest)
        self._exits.let_go(slot)
        self.tier.release(segment, request.token_ids if keep else (), request.variant)

    def settle(self) -> None:
        """Give back what could not be given back before."""
        self.tier.exits.retry()
