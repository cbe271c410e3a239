"""Carries out what a policy decides: slots are given, backed, and taken away.

Every step has a token budget. A request is admitted only when the pages of its whole prompt are
reserved. When memory runs short nevertheless, because the outputs of running requests grew, a
request gives its slot up and is computed again later. Which ones go on, and who gives way, is the
policy's to say (`policies`): it sees a `Snapshot` and answers with a `Plan`. A call that the system
refuses (DriverError) keeps one request waiting, as a shortage does, and tears no step.
"""

import time
from collections.abc import Sequence

from ...allocator import Slot, SlotCache
from ...vmem.errors import DriverError, OutOfPages, Shortage
from ..request.request import Batch, Padding, Request, RequestState, ScheduledRequest
from ..request.spec import SequenceKey
from .exits import Exits
from .kv_files import KVFiles
from .plan import Plan, Policy
from .snapshot import RunningRequest, Snapshot, WaitingRequest
from .waiting import WaitingQueue

Refusal = Shortage | DriverError
"""Why a request cannot have memory now. Nothing was changed by it."""

_COMPARED_AT_ONCE = 256  # tokens; comparing slices of lists is far faster than item by item


class Scheduler:
    """Chooses the next batch within its token and page budgets.

    Args:
        cache: where the slots are.
        policy: decides.
        max_seqs: requests that run at once.
        max_batch_tokens: tokens of one step.
        look_ahead_tokens: tokens mapped ahead of a decoding request, in the background.
        prefix_reuse: start a request from keys and values that others computed for its tokens.

    Attributes:
        running: in the order of admission.
        exits: how slots are let go.
        kv_files: files that requests may begin with.
        shortage: what kept the last step from giving any request a token, and whom it kept.
    """

    def __init__(
        self,
        cache: SlotCache,
        policy: Policy,
        *,
        max_seqs: int,
        max_batch_tokens: int,
        look_ahead_tokens: int = 0,
        prefix_reuse: bool = True,
    ) -> None:
        self.cache = cache
        self.policy = policy
        self.max_seqs = max_seqs
        self.max_batch_tokens = max_batch_tokens
        self.look_ahead_tokens = look_ahead_tokens
        self.prefix_reuse = prefix_reuse
        self.exits = Exits(cache)
        self.kv_files = KVFiles(self.exits)
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0
        self.shortage: tuple[Request, Refusal] | None = None
        self._requests: dict[SequenceKey, Request] = {}

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._requests)

    @property
    def requests(self) -> list[Request]:
        """All unfinished requests, in the order in which they were added."""
        return list(self._requests.values())

    def add(self, request: Request) -> None:
        """Queue a new request."""
        assert request.key not in self._requests, f"{request} is here already"
        self._requests[request.key] = request
        leader = self._requests.get(request.leader) if request.leader else None
        if leader is not None and leader.num_computed < leader.num_prompt_tokens:
            self.waiting.hold(request, leader.key)
        else:
            self.waiting.add(request)

    def schedule(self) -> Batch:
        """The next batch, its slots backed for every token in it.

        Empty if no request can go on: all of them wait for tokens of a step under way, or memory
        is short (`shortage`). No request is lost by that.
        """
        self.exits.retry()
        self._let_siblings_in()
        granted: dict[Request, int] = {}
        num_before = self.num_preemptions
        short: tuple[Request, Refusal] | None = None
        while True:
            snapshot = self._snapshot(granted, short[0] if short else None, num_before)
            missed = self._apply(self.policy.plan(snapshot), granted)
            if missed is None:
                break
            short = missed
        self.shortage = short if short and not granted else None
        batch = tuple(ScheduledRequest(request, count) for request, count in granted.items())
        self._look_ahead(batch)
        return Batch(batch, self._padding(batch))

    def finish(self, request: Request) -> None:
        """Let go of a finished request; its slot is parked with what was computed."""
        self._leave(request, keep=True)

    def abort(self, request: Request) -> None:
        """Drop a request at any point of its life; its pages go back at once."""
        self._leave(request, keep=False)

    # -- deciding ----------------------------------------------------------------------------

    def _snapshot(
        self, granted: dict[Request, int], short: Request | None, num_preemptions: int
    ) -> Snapshot:
        free = max(1, self.max_seqs - len(self.running))
        return Snapshot(
            max_batch_tokens=self.max_batch_tokens,
            max_seqs=self.max_seqs,
            running=tuple(
                RunningRequest(r.key, r.num_tokens, 0 if r.is_complete else r.num_uncomputed)
                for r in self.running
            ),
            waiting=tuple(
                WaitingRequest(r.key, r.num_tokens, r.was_admitted)
                for r in self.waiting.first(free)
            ),
            num_waiting=len(self.waiting),
            granted={request.key: count for request, count in granted.items()},
            short=short.key if short else None,
            num_preempted=self.num_preemptions - num_preemptions,
            pages_obtainable=self.cache.num_obtainable(),
        )

    def _let_siblings_in(self) -> None:
        """Requests whose leader has computed its prompt may start from its slot."""
        for request in self.running:
            if request.num_computed >= request.num_prompt_tokens:
                self.waiting.let_in(request.key)

    # -- doing -------------------------------------------------------------------------------

    def _apply(self, plan: Plan, granted: dict[Request, int]) -> tuple[Request, Refusal] | None:
        """Carry out a plan, as far as memory goes; returns whom it was too short for."""
        for key in plan.preempt:
            request = self._requests[key]
            granted.pop(request, None)
            self.preempt(request)
        for share in plan.shares:
            request = self._requests[share.key]
            assert request.slot is not None, f"{request} is not running"
            try:
                self.cache.grow(request.slot, request.num_computed + share.num_tokens)
            except (Shortage, DriverError) as refusal:
                return request, refusal
            granted[request] = share.num_tokens
        budget = plan.admit_tokens
        for key in plan.admit:
            request, share = self._requests[key], budget
            if plan.whole_prompts:
                share = request.num_tokens
                if share > budget and granted:
                    break
            if share <= 0:
                break
            try:
                granted[request] = self._admit(request, share)
            except (Shortage, DriverError) as refusal:
                return request, refusal
            budget -= granted[request]
        return None

    def preempt(self, request: Request, *, keep: bool = True) -> None:
        """Take a request's slot away; it will be computed again. Its tokens are kept.

        With `keep` the slot is parked, so that what is left of it by then is found again.
        """
        self._release(request, keep=keep)
        request.state = RequestState.WAITING
        request.num_computed = 0
        self.waiting.put_back(request)
        self.num_preemptions += 1

    def _leave(self, request: Request, *, keep: bool) -> None:
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.WAITING:  # new, or preempted with its last token pending
            self.waiting.remove(request)
        else:
            self._release(request, keep=keep)
        request.state = RequestState.FINISHED
        del self._requests[request.key]
        self.waiting.let_in(request.key)

    def _release(self, request: Request, *, keep: bool) -> None:
        slot, request.slot = request.slot, None
        assert slot is not None
        self.running.remove(request)
        computed = request.token_ids[: request.num_computed] if keep else ()
        self.exits.let_go(slot, computed, request.variant)

    # -- admission ---------------------------------------------------------------------------

    def _admit(self, request: Request, budget: int) -> int:
        """Open a slot and reserve the request's memory; returns the tokens to compute now.

        Raises a Shortage or DriverError, with the request still waiting.
        """
        tokens = self._reusable_tokens(request)
        donor, num_shared = self._live_donor(request, tokens)
        needed = self._tokens_to_admit(request)
        if self.running:  # what lacks memory for sure need not disturb what is parked
            num_there = max(num_shared, self.kv_files.longest_prefix(tokens, request.variant))
            own = self.cache.num_pages(needed) - self.cache.num_whole_pages(num_there)
            if own > self.cache.num_obtainable():
                raise OutOfPages(f"{own} pages are not to be had while others run")
        slot, num_cached = self._open_slot(request, tokens, donor, num_shared)
        count = min(request.num_tokens - num_cached, budget)
        try:
            self.cache.reserve(slot, needed)
            self.cache.grow(slot, num_cached + count)
        except (Shortage, DriverError):
            self.exits.let_go(slot, request.token_ids[:num_cached], request.variant)
            raise
        self.waiting.remove(request)
        request.slot = slot
        request.num_computed = num_cached
        request.state = RequestState.RUNNING
        if not request.was_admitted:
            request.scheduled_time_s = time.monotonic()
            request.num_cached = num_cached
            self.prefix_hit_tokens += num_cached
        self.running.append(request)
        return count

    def _tokens_to_admit(self, request: Request) -> int:
        """All it has, and a page's worth of its output if others run: else it is soon preempted."""
        if not self.running:
            return request.num_tokens
        remaining = request.max_tokens - request.num_output_tokens
        # The last token is never computed, so it needs no room.
        return request.num_tokens + min(remaining - 1, self.cache.growth_tokens)

    def _reusable_tokens(self, request: Request) -> Sequence[int]:
        """The tokens whose keys and values may come from elsewhere.

        At least the last token is always computed: its logits choose the next one. So is every
        prompt token whose own logits are wanted and not there yet.
        """
        if not self.prefix_reuse:
            return ()
        return request.token_ids[: min(request.num_tokens - 1, request.num_scored)]

    def _open_slot(
        self, request: Request, tokens: Sequence[int], donor: Request | None, num_shared: int
    ) -> tuple[Slot, int]:
        """A slot, and how many of `tokens` it already holds: a running request's, parked ones, or
        those of a file, if that spares a page's worth."""
        if self.kv_files:
            num_held = max(num_shared, self.cache.prefix_length(tokens, request.variant))
            least = num_held + self.cache.growth_tokens
            found = self.kv_files.open_slot(self.cache, tokens, request.variant, least=least)
            if found is not None:
                return found
        if donor is not None and num_shared > self.cache.prefix_length(tokens, request.variant):
            assert donor.slot is not None
            try:
                return self.cache.fork(donor.slot, num_shared), num_shared
            except Shortage:
                pass  # then with what is parked
        return self.cache.adopt(tokens, request.variant)

    def _live_donor(self, request: Request, tokens: Sequence[int]) -> tuple[Request | None, int]:
        """The running request that has computed the longest common prefix, a page's at least."""
        donor, longest = None, 0
        for other in self.running:
            if other.variant != request.variant:
                continue
            least = 1 if other.key == request.leader else self.cache.growth_tokens
            limit = min(len(tokens), other.num_computed)
            if limit > longest and limit >= least:
                shared = _common_prefix(tokens, other.token_ids, limit)
                if shared > longest and shared >= least:
                    donor, longest = other, shared
        return donor, longest

    # -- for the step --------------------------------------------------------------------------

    def _look_ahead(self, batch: Sequence[ScheduledRequest]) -> None:
        """Have the memory of the next step mapped while this one computes."""
        if not self.look_ahead_tokens or not self.cache.pool.num_available:
            return  # with no page to spare, it could only fail
        for item in batch:
            request, end = item.request, item.start + item.num_tokens
            assert request.slot is not None
            if item.samples:
                target = min(
                    end + self.look_ahead_tokens, request.num_prompt_tokens + request.max_tokens
                )
            else:
                target = min(end + self.max_batch_tokens, request.num_tokens)
            self.cache.look_ahead(request.slot, target)

    def _padding(self, batch: Sequence[ScheduledRequest]) -> Padding | None:
        """A position behind some decode's, on pages that its slot has: it maps and takes nothing.

        It is written before the request's own next token is, and read by nobody.
        """
        if any(item.num_tokens > 1 for item in batch):
            return None
        for item in batch:
            slot, behind = item.request.slot, item.start + 1
            assert slot is not None
            if behind < slot.ready_tokens:
                self.cache.grow(slot, behind + 1)
                return Padding(slot, behind, item.request.ids(item.start, behind)[0])
        return None


def _common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Tokens that `a` and `b` have in common from the start, at most `limit`."""
    for start in range(0, limit, _COMPARED_AT_ONCE):
        stop = min(start + _COMPARED_AT_ONCE, limit)
        if a[start:stop] != b[start:stop]:
            return next(i for i in range(start, stop) if a[i] != b[i])
    return limit
