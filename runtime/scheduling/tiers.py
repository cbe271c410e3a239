"""What stands behind the cache: host memory, and files; what leaves a slot may come back."""

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from ...allocator import Exits, Slot, SlotCache
from ...allocator.transfer import Fetch, KVDir
from ...vmem.errors import VkvError
from ..request.request import Request
from .kv_files import KVFiles
from .segments import Segments
from .swapping import Swapping

_LOOK_S = 0.005  # between two looks whether what was called back has left
_REFUSALS = (VkvError, OSError)

_log = logging.getLogger(__name__)


class Guest(Protocol):
    """Who else has slots of the cache, pinned or being filled, beside its requests."""

    def give_way(self) -> bool:
        """Memory is short: unpin what no live request needs. False if that frees nothing."""
        ...

    def forget(self) -> None:
        """The model changed: keep nothing that was computed."""
        ...


class Lender(Protocol):
    """Who holds tokens of other engines' requests in slots of the cache."""

    @property
    def is_leaving(self) -> bool:
        """True while somebody has time to take away what was called back: memory is coming."""
        ...

    def give_way(self) -> bool:
        """Memory is short: call something back. False if nothing is free by that yet."""
        ...

    def forget(self) -> None:
        """The model changed: keep nothing that was computed."""
        ...


class Tiers:
    """The tiers behind a cache; either may be missing.

    One class, since the scheduler asks for all of them together, whichever there are.

    Args:
        cache: before them.
        swapping: moves what slots hold to host memory and back; None to drop it.
        kv_dir: where it is saved as files by itself; None for nowhere.

    Attributes:
        exits: how slots are let go.
        kv_files: files that requests may begin with, those of `kv_dir` and of opened sessions.
        guests: asked to give way, and told of changes.
        lenders: the same, but not asked where no request lacks memory.
        segments: keeps requests that are longer than the pool; None to have none.
    """

    def __init__(
        self, cache: SlotCache, swapping: Swapping | None = None, kv_dir: KVDir | None = None
    ) -> None:
        self.swapping = swapping
        self.exits = Exits(cache)
        self.kv_files = KVFiles(self.exits, kv_dir)
        self.guests: list[Guest] = []
        self.lenders: list[Lender] = []
        self.segments: Segments | None = None
        self._cache = cache

    @property
    def is_settled(self) -> bool:
        """False while slots of finished requests are copied or written, until `settle` has taken
        note that they are."""
        is_storing = self.swapping is not None and self.swapping.is_leaving
        return not (is_storing or self.kv_files.is_saving)

    def settle(self) -> None:
        """Take note of what was copied and written meanwhile."""
        if self.swapping is not None:
            self.swapping.tier.settle()
        if self.segments is not None:
            self.segments.settle()
        self.kv_files.settle()

    # -- there -------------------------------------------------------------------------------

    def make_room(self, request: Request, count: int) -> int:
        """Let a running request have `count` more tokens in its slot, or as many as it may have,
        which is returned. Raises a Shortage or DriverError."""
        return count if self.segments is None else self.segments.make_room(request, count)

    def leave(
        self, request: Request, slot: Slot, computed: Sequence[int], *, comes_back: bool
    ) -> None:
        """A request is about to let go of `slot`, which holds the tokens `computed`.

        Never fails: what cannot be copied is computed again.
        """
        try:
            self.kv_files.save(slot, computed, request.variant)
        except _REFUSALS as error:
            _log.warning("what %r has computed is not saved: %s", request, error)
        try:
            if self.swapping is not None:
                self.swapping.leave(request, slot, comes_back=comes_back)
        except _REFUSALS as error:
            _log.warning("what %r has computed is not copied: %s", request, error)

    def release(self, request: Request) -> None:
        """A request will not come back."""
        if self.swapping is not None:
            self.swapping.release(request)

    def give_way(self, *, for_requests: bool = True) -> bool:
        """Memory is short: stop reading slots for files and for other engines, and `for_requests`
        call back what is lent. False if that frees nothing."""
        gave_way = [self.kv_files.give_way(), *(guest.give_way() for guest in self.guests)]
        return any(gave_way) or (for_requests and any(one.give_way() for one in self.lenders))

    def lend_out(
        self, running: Sequence[Request], refused: Request, wanted_tokens: int
    ) -> Request | None:
        """As of `Segments`."""
        if self.segments is None:
            return None
        return self.segments.lend_out(running, refused, wanted_tokens)

    def recall(self, running: Sequence[Request]) -> list[Request]:
        """As of `Segments`."""
        return [] if self.segments is None else self.segments.recall(running)

    def note_redo(self, request: Request) -> None:
        """As of `Gaps`: there is no memory for what others have lost of a request."""
        if self.segments is not None:
            self.segments.gaps.note_redo(request)

    @property
    def is_leaving(self) -> bool:
        """True while slots are pinned until they have been copied: their memory is coming."""
        if self.swapping is not None and self.swapping.is_leaving:
            return True
        return any(lender.is_leaving for lender in self.lenders)

    # -- and back ----------------------------------------------------------------------------

    @property
    def may_have_some(self) -> bool:
        """False if nothing can come back from anywhere."""
        return self.swapping is not None or self.kv_files.may_have_some

    def num_in_files(self, request: Request, tokens: Sequence[int]) -> int:
        """How many of `tokens` a request could begin with that take no memory, or little."""
        return self.kv_files.longest_prefix(tokens, request.variant)

    def open_slot(
        self, request: Request, tokens: Sequence[int], num_near: int
    ) -> tuple[Slot, int] | None:
        """A slot that begins with a file, and how many of `tokens` it has; None if no file spares
        a page's worth beside the `num_near` that are at hand."""
        if not self.kv_files.may_have_some:
            return None
        least = num_near + self._cache.growth_tokens
        return self.kv_files.open_slot(
            self._cache, tokens, request.variant, owner=request.spec.owner, least=least
        )

    def fetch(
        self, request: Request, tokens: Sequence[int], num_near: int, num_reserved: int
    ) -> Fetch | None:
        """Begin to copy back what host memory has of a request, if that is the best there is.

        Raises a Shortage or DriverError.
        """
        if self.swapping is None or not request.can_fetch:
            return None
        num_near = max(num_near, self.num_in_files(request, tokens))
        return self.swapping.fetch(request, tokens, num_near, num_reserved)

    def arrive(self, request: Request) -> bool:
        """Give a request the slot that was filled for it; False, with all undone, if it failed."""
        assert self.swapping is not None
        assert request.fetch is not None
        request.slot = self.swapping.arrive(request, request.fetch)
        if request.slot is not None:
            request.num_computed = request.fetch.num_tokens
        request.fetch = None
        request.can_fetch = request.slot is not None
        return request.can_fetch

    def is_moving(self, running: Iterable[Request]) -> bool:
        """True while something leaves or comes back: what a request lacks may be there soon."""
        return self.is_leaving or any(request.fetch is not None for request in running)

    def wait(self, running: Iterable[Request], timeout_s: float) -> None:
        """Wait a moment for what leaves or comes back. For when nothing else can go on."""
        fetch = next((request.fetch for request in running if request.fetch is not None), None)
        if fetch is not None:
            fetch.wait(timeout_s)
        elif self.swapping is not None and self.swapping.is_leaving:
            self.swapping.wait(timeout_s)
        elif any(lender.is_leaving for lender in self.lenders):
            time.sleep(min(timeout_s, _LOOK_S))
        elif self.swapping is not None:
            self.swapping.wait(timeout_s)

    # -- for the engine ----------------------------------------------------------------------

    def note_step(self, num_tokens: int, time_s: float) -> None:
        """A step computed so many tokens in so long."""
        if self.swapping is not None:
            self.swapping.note_step(num_tokens, time_s)
        if self.segments is not None and num_tokens:
            self.segments.loans.note_step(time_s)

    def trim(self) -> int:
        """Give memory back that no request waits for; returns the bytes."""
        self.give_way(for_requests=False)
        return 0 if self.swapping is None else self.swapping.trim()

    def forget(self) -> None:
        """Drop all that is there: the model changed."""
        for guest in (*self.guests, *self.lenders):  # first: what they have pinned cannot go
            guest.forget()
        if self.swapping is not None:
            self.swapping.forget()
        self.kv_files.forget()

    def close(self) -> None:
        """Give all back. No request may be left."""
        self.kv_files.forget()
        if self.swapping is not None:
            self.swapping.close()


def live_donor(
    running: Iterable[Request], request: Request, tokens: Sequence[int], growth_tokens: int
) -> tuple[Request | None, int]:
    """The running request that has computed the longest common prefix, a page's at least."""
    donor, longest = None, 0
    for other in running:
        if other.variant != request.variant or other.slot is None or other.is_spread:
            continue
        least = 1 if other.key == request.leader else growth_tokens
        limit = min(len(tokens), other.num_computed)
        if limit > longest and limit >= least:
            shared = common_prefix(tokens, other.token_ids[:limit])
            if shared > longest and shared >= least:
                donor, longest = other, shared
    return donor, longest


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that `a` and `b` have in common from the start."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:  # they agree up to `low`, and not up to `high`
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low if high == 0 or a[low] != b[low] else low + 1
