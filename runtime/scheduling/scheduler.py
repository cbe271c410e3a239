"""Which tokens go through the model next: Dynamic SplitFuse over reserved memory.

Every step has a token budget. Requests that decode come first, one token each; what is left is
filled with chunks of prompts, those under way before new ones. A request is admitted only when
the pages of its whole prompt are reserved. When memory runs short nevertheless, because the
outputs of running requests grew, the last arrived gives its slot up and is computed again later.

Source: DeepSpeed-FastGen, arXiv:2401.08671, section 3 (Dynamic SplitFuse).

To compare with, there is the policy that it replaced, *prefill first*: a step takes whole prompts
if one can be admitted, and decodes only if none can, as Orca and vLLM 0.2 did.
"""

from collections import deque
from collections.abc import Sequence
from typing import Literal

from ...allocator import Slot, SlotCache
from ...vmem.errors import Shortage
from ..request.request import Request, RequestState, ScheduledRequest

Policy = Literal["splitfuse", "prefill_first"]

_COMPARED_AT_ONCE = 256  # tokens; comparing slices of lists is far faster than item by item


class Scheduler:
    """Chooses the next batch within its token and page budgets.

    Args:
        cache: where the slots are.
        max_seqs: requests that run at once.
        max_batch_tokens: tokens of one step.
        look_ahead_tokens: tokens mapped ahead of a decoding request, in the background.
        prefix_reuse: start a request from rows that others computed for the same tokens.
        policy: "splitfuse", or the baseline "prefill_first", whose steps exceed
            `max_batch_tokens` where a single prompt does.
    """

    def __init__(
        self,
        cache: SlotCache,
        *,
        max_seqs: int,
        max_batch_tokens: int,
        look_ahead_tokens: int = 0,
        prefix_reuse: bool = True,
        policy: Policy = "splitfuse",
    ) -> None:
        self.cache = cache
        self.max_seqs = max_seqs
        self.max_batch_tokens = max_batch_tokens
        self.look_ahead_tokens = look_ahead_tokens
        self.prefix_reuse = prefix_reuse
        self.policy = policy
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of admission
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self.waiting.append(request)

    def schedule(self) -> list[ScheduledRequest]:
        """The next batch, its slots backed for every token in it.

        Raises a Shortage if not even one request can go on; all of them are kept.
        """
        batch: dict[Request, int] = {}
        if self.policy == "splitfuse":
            self._split_and_fuse(batch)
        else:
            self._prefill_first(batch)
        scheduled = [ScheduledRequest(request, count) for request, count in batch.items()]
        self._look_ahead(scheduled)
        return scheduled

    def finish(self, request: Request) -> None:
        """Let go of a finished request; its slot is parked with what was computed."""
        if request.state is RequestState.WAITING:  # preempted while its last token was pending
            self.waiting.remove(request)
        else:
            self._release(request, keep=True)
        request.state = RequestState.FINISHED

    def abort(self, request: Request) -> None:
        """Drop a request at any point of its life; its pages go back at once."""
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        elif request.state is RequestState.RUNNING:
            self._release(request, keep=False)
        request.state = RequestState.FINISHED

    # -- policies ----------------------------------------------------------------------------

    def _split_and_fuse(self, batch: dict[Request, int]) -> None:
        """Decodes, then chunks of prompts under way, then of new ones, while the budget lasts."""
        preemptions_before = self.num_preemptions
        budget = self.max_batch_tokens
        decodes = [r for r in self.running if r.num_uncomputed == 1]
        prompts = [r for r in self.running if r.num_uncomputed > 1]
        for request in [*decodes, *prompts]:
            budget = self._continue(request, budget, batch)
        if self.num_preemptions == preemptions_before:
            self._admit(budget, batch)

    def _prefill_first(self, batch: dict[Request, int]) -> None:
        """Whole prompts; decodes only if there are none.

        One that exceeds the budget goes alone. A prompt runs already if its step failed.
        """
        budget = self.max_batch_tokens
        for request in [r for r in self.running if r.num_uncomputed > 1]:
            budget -= request.num_uncomputed
            self._continue(request, request.num_uncomputed, batch)
        self._admit(budget, batch)
        if not batch:
            for request in list(self.running):
                budget = self._continue(request, budget, batch)

    # -- running requests --------------------------------------------------------------------

    def _continue(self, request: Request, budget: int, batch: dict[Request, int]) -> int:
        """Give a running request its share of the budget; returns what is left of that.

        Where memory is short, others are preempted, from the batch too if they are in it.
        """
        if request.is_complete:
            return budget
        while budget and request.state is RequestState.RUNNING:
            assert request.slot is not None
            count = min(request.num_uncomputed, budget)
            try:
                self.cache.grow(request.slot, request.num_computed + count)
            except Shortage:
                if self.running == [request]:
                    raise
                victim = self.running[-1]
                self._preempt(victim)
                budget += batch.pop(victim, 0)
            else:
                batch[request] = count
                return budget - count
        return budget

    def _preempt(self, request: Request) -> None:
        """Take a request's slot away; it will be computed again. Its tokens are kept."""
        self._release(request, keep=True)
        request.state = RequestState.WAITING
        request.num_computed = 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request, *, keep: bool) -> None:
        assert request.slot is not None
        if keep:
            self.cache.park(request.slot, request.token_ids[: request.num_computed])
        else:
            self.cache.close(request.slot)
        request.slot = None
        self.running.remove(request)

    # -- admission ---------------------------------------------------------------------------

    def _admit(self, budget: int, batch: dict[Request, int]) -> None:
        """Admit waiting requests, in order, while the budgets last."""
        position = 0  # behind those that wait for their leader
        while budget > 0 and position < len(self.waiting) and len(self.running) < self.max_seqs:
            request = self.waiting[position]
            if self._waits_for_leader(request):
                position += 1
                continue
            share = budget
            if self.policy == "prefill_first":  # all of it or nothing, but never nothing at all
                share = request.num_tokens
                if batch and share > budget:
                    break
            count = self._try_admit(request, share)
            if not count:
                break
            del self.waiting[position]
            batch[request] = count
            budget -= count

    @staticmethod
    def _waits_for_leader(request: Request) -> bool:
        """True while another request computes the very prompt whose rows this one will share."""
        leader = request.leader
        return (
            leader is not None
            and not leader.is_finished
            and leader.num_computed < leader.num_prompt_tokens
            and not request.was_admitted
        )

    def _try_admit(self, request: Request, budget: int) -> int:
        """Open a slot and reserve the request's memory.

        Returns the tokens to compute now, `budget` at most; 0 if the request has to wait.
        """
        tokens = self._reusable_tokens(request)
        donor, num_shared = self._live_donor(request, tokens)
        needed = self._tokens_to_admit(request)
        if self.running:  # what lacks memory for sure need not disturb what is parked
            own = self.cache.num_pages(needed) - self.cache.num_whole_pages(num_shared)
            if own > self.cache.num_obtainable():
                return 0
        slot, num_cached = self._open_slot(tokens, donor, num_shared)
        count = min(request.num_tokens - num_cached, budget)
        try:
            self.cache.reserve(slot, needed)
            self.cache.grow(slot, num_cached + count)
        except Shortage:
            self.cache.park(slot, request.token_ids[:num_cached])
            if not self.running:
                raise
            return 0
        request.slot = slot
        request.num_computed = num_cached
        request.state = RequestState.RUNNING
        if not request.was_admitted:
            request.was_admitted = True
            request.num_cached = num_cached
            self.prefix_hit_tokens += num_cached
        self.running.append(request)
        return count

    def _tokens_to_admit(self, request: Request) -> int:
        """All the request has, and a step of growth if others run: else it is soon preempted."""
        if not self.running:
            return request.num_tokens
        remaining = request.max_tokens - request.num_output_tokens
        # The last token is never computed, so it needs no room.
        return request.num_tokens + min(remaining - 1, self.cache.growth_tokens)

    def _reusable_tokens(self, request: Request) -> Sequence[int]:
        """The tokens whose rows may come from elsewhere.

        At least the last token is always computed: its logits choose the next one. So is every
        prompt token whose own logits are wanted and not there yet.
        """
        if not self.prefix_reuse:
            return ()
        return request.token_ids[: min(request.num_tokens - 1, request.num_scored)]

    def _open_slot(
        self, tokens: Sequence[int], donor: Request | None, num_shared: int
    ) -> tuple[Slot, int]:
        """A slot, and how many of `tokens` it already holds: a running request's or parked ones."""
        if donor is not None and num_shared > self.cache.prefix_length(tokens):
            assert donor.slot is not None
            try:
                return self.cache.fork(donor.slot, num_shared), num_shared
            except Shortage:
                pass  # then with what is parked
        return self.cache.adopt(tokens)

    def _live_donor(self, request: Request, tokens: Sequence[int]) -> tuple[Request | None, int]:
        """The running request with the longest common prefix computed, a growth step at least."""
        donor, longest = None, 0
        for other in self.running:
            least = 1 if other is request.leader else self.cache.growth_tokens
            limit = min(len(tokens), other.num_computed)
            if limit > longest and limit >= least:
                shared = _common_prefix(tokens, other.token_ids, limit)
                if shared > longest and shared >= least:
                    donor, longest = other, shared
        return donor, longest

    # -- look-ahead --------------------------------------------------------------------------

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


def _common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Tokens that `a` and `b` have in common from the start, at most `limit`."""
    for start in range(0, limit, _COMPARED_AT_ONCE):
        stop = min(start + _COMPARED_AT_ONCE, limit)
        if a[start:stop] != b[start:stop]:
            return next(i for i in range(start, stop) if a[i] != b[i])
    return limit
