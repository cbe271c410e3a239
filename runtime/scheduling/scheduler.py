"""Carries out what a policy decides: slots are given, backed, and taken away.

Every step has a token budget. A request is admitted only when the pages of its whole prompt are
reserved. When memory runs short nevertheless, because the outputs of running requests grew, a
request gives its slot up and is computed again later. Which ones go on, and who gives way, is the
policy's to say (`policies`): it sees a `Snapshot` and answers with a `Plan`. A call that the system
refuses (DriverError) keeps one request waiting, as a shortage does, and tears no step.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from ...allocator import Slot, SlotCache
from ...vmem.errors import DriverError, OutOfLoans, OutOfPages, Shortage
from ..request.request import Batch, Padding, Request, RequestState, ScheduledRequest
from ..request.spec import SequenceKey
from ..speculation import Speculation
from .accounts import Accounts
from .lending.turns import able, lend_out, who_does_without
from .lines import lines_for
from .plan import Plan, Policy
from .snapshot import Snapshot
from .tiers import Tiers, live_donor
from .views import running_view, waiting_view
from .waiting import WaitingQueue

Refusal = Shortage | DriverError
"""Why a request cannot have memory now. Nothing was changed by it."""


class Scheduler:
    """Chooses the next batch within its token and page budgets.

    Args:
        cache: where the slots are.
        policy: decides.
        max_seqs: requests that run at once.
        max_batch_tokens: tokens of one step.
        look_ahead_tokens: tokens mapped ahead of a decoding request, in the background.
        prefix_reuse: start a request from keys and values that others computed for its tokens.
        tiers: what stands behind the cache; None for nothing but the files that are opened.
        tenant_weights: of tenants whose part is another than 1.
        speculation: guesses ahead; None for nobody.
        clock: seconds, on the clock of the requests' `queued_time_s`; None for the system's.

    Attributes:
        accounts: what each tenant got.
        running: in the order of admission.
        exits: how slots are let go.
        holds_back: nobody is admitted for now.
        num_places_kept: of `max_seqs`, for requests that come from elsewhere or may come back.
        shortage: what kept the last step from giving any request a token, and whom it kept.
        lacking: who stood aside in the last step for want of somebody who takes its tokens in.
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
        tiers: Tiers | None = None,
        tenant_weights: Mapping[str, float] | None = None,
        speculation: Speculation | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.cache = cache
        self.policy = policy
        self.max_seqs = max_seqs
        self.max_batch_tokens = max_batch_tokens
        self.look_ahead_tokens = look_ahead_tokens
        self.prefix_reuse = prefix_reuse
        self.tiers = tiers or Tiers(cache)
        self.speculation = speculation
        self.exits = self.tiers.exits
        self.accounts = Accounts(tenant_weights or {})
        self.waiting = WaitingQueue(lines_for(policy.order, self.accounts))
        self.running: list[Request] = []
        self.holds_back = False
        self.num_places_kept = 0
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0
        self.shortage: tuple[Request, Refusal] | None = None
        self.lacking: tuple[Request, OutOfLoans] | None = None
        self._clock = clock or _monotonic_s
        self._requests: dict[SequenceKey, Request] = {}
        self._growth_pages = cache.num_pages(cache.growth_tokens)

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._requests)

    @property
    def requests(self) -> list[Request]:
        """All unfinished requests, in the order in which they were added."""
        return list(self._requests.values())

    def add(self, request: Request, *, comes_back: bool = False) -> None:
        """Queue a new request; one that `comes_back` had a slot elsewhere, and so goes before all
        that never had one."""
        assert request.key not in self._requests, f"{request} is here already"
        self._requests[request.key] = request
        self.accounts.came(request)
        leader = self._requests.get(request.leader) if request.leader else None
        if leader is not None and leader.num_computed < leader.num_prompt_tokens:
            self.waiting.hold(request, leader.key)
        elif comes_back:
            self.waiting.put_back(request)
        else:
            self.waiting.add(request)

    def take_out(self, request: Request) -> None:
        """Take an unfinished request out as it stands, with its slot if it has one.

        Whoever takes it out has the slot, until `put_in`. Its keys and values must not be on their
        way back from a tier, nor some of them in one.
        """
        assert request.fetch is None, request
        assert not request.is_spread, request
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self.accounts.released(request)
        self._remove(request, RequestState.AWAY)

    def put_in(self, request: Request, slot: Slot | None = None) -> None:
        """Take in a request that was here or elsewhere: with its slot it runs, without one it is
        first in line. A place among those that run must be free for it."""
        self._requests[request.key] = request
        self.accounts.came(request)
        request.slot = slot
        if slot is None:
            request.state = RequestState.WAITING
            self.waiting.add_first(request)
            return
        assert self.num_free_places > 0, "no place was kept"
        request.state = RequestState.RUNNING
        request.waited_s = time.monotonic() - request.queued_time_s
        self.running.append(request)
        self.accounts.admitted(request)

    @property
    def num_free_places(self) -> int:
        """Requests that could run beside those that do and those that are expected."""
        return self.max_seqs - self.num_places_kept - len(self.running)

    def schedule(self) -> Batch:
        """The next batch, its slots backed for every token in it.

        Empty if no request can go on: all of them wait for tokens of a step under way, or memory
        is short (`shortage`). No request is lost by that.
        """
        self.exits.retry()
        self._let_in()
        granted: dict[Request, int] = {}
        held: set[Request] = set()  # until what leaves has left
        aside: set[Request] = set()  # until others lend more
        num_before = self.num_preemptions
        short: tuple[Request, Refusal] | None = None
        self.lacking = None
        while True:
            num_given_up = self.num_preemptions - num_before + len(held)
            snapshot = self._snapshot(granted, short and short[0], held | aside, num_given_up)
            missed = self._apply(self.policy.plan(snapshot), granted)
            if missed is None:
                break
            request, refusal = missed
            if isinstance(refusal, OutOfLoans):  # no memory of this engine would help
                self.lacking = self.lacking or (request, refusal)
                short = None
                loser = who_does_without(self.running, request)
                if loser is None or loser is request:
                    aside.add(request)
                else:
                    granted.pop(loser, None)
                    self.preempt(loser)
                continue
            if self.tiers.give_way():
                continue
            wanted = self.cache.growth_tokens
            if request.slot is None:
                wanted = _tokens_to_admit(request, bool(self.running), wanted)
            if lend_out(self.cache, self.tiers, self.running, request, granted, wanted):
                continue
            if self.tiers.is_leaving:
                # What it lacks is being copied out: it stands aside for this step, and nobody gives
                # way for it once more.
                if request not in self.running:
                    break
                held.add(request)
                short = None
                continue
            if request.mending is not None:  # nobody gives way for what others have lost
                granted.pop(request, None)
                self.preempt(request)
                continue
            short = missed
        short = short or self.lacking
        is_lasting = short and not granted and not self.tiers.is_moving(self.running)
        self.shortage = short if is_lasting else None
        batch = [ScheduledRequest(request, count) for request, count in granted.items()]
        if self.speculation is not None and batch:
            batch = self.speculation.extend(batch, self.cache, self.max_batch_tokens)
        _look_ahead(self.cache, batch, self.look_ahead_tokens, self.max_batch_tokens)
        return Batch(tuple(batch), _padding(self.cache, batch))

    def finish(self, request: Request, *, keep: bool = True) -> None:
        """Let go of a finished request; its slot is parked with what was computed, with `keep`."""
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.WAITING:  # new, or preempted with its last token pending
            self.waiting.remove(request)
        else:
            self._release(request, keep=keep, comes_back=False)
        self.tiers.release(request)
        self._remove(request, RequestState.FINISHED)

    def abort(self, request: Request) -> None:
        """Drop a request at any point of its life; its pages go back at once."""
        self.finish(request, keep=False)

    def _let_in(self) -> None:
        """Let requests go on that waited for what was fetched, or for their leader's prompt."""
        self.tiers.settle()
        for request in [r for r in self.running if r.fetch is not None and r.fetch.is_done]:
            if self.tiers.arrive(request):
                self._note_admission(request)
            else:  # then it is computed
                self.running.remove(request)
                request.state = RequestState.WAITING
                self.waiting.put_back(request)
        for request in self.running:
            if request.num_computed >= request.num_prompt_tokens:
                self.waiting.let_in(request.key)

        for request in self.tiers.recall(self.running):
            self.preempt(request)

    # -- deciding ----------------------------------------------------------------------------

    def _snapshot(
        self,
        granted: dict[Request, int],
        short: Request | None,
        held: set[Request],
        num_given_up: int,
    ) -> Snapshot:
        num_free, waiting = self.num_free_places, list[Request]()
        if not (self.holds_back or any(request in self.waiting for request in held)):
            waiting = self.waiting.first(num_free, len(self.running))  # nobody passes those held
        by_tenant = self.policy.order.lines == "tenant"
        return Snapshot(
            max_batch_tokens=self.max_batch_tokens,
            max_seqs=self.max_seqs - self.num_places_kept,
            running=running_view(self.running, held),
            waiting=waiting_view(waiting, self._clock()),
            num_waiting=len(self.waiting),
            granted={request.key: count for request, count in granted.items()},
            short=short.key if short else None,
            num_preempted=num_given_up,
            pages_obtainable=self.cache.num_obtainable(),
            growth_tokens=self.cache.growth_tokens,
            growth_pages=self._growth_pages,
            tenants=self.accounts.shares([*self.running, *waiting]) if by_tenant else {},
        )

    # -- doing -------------------------------------------------------------------------------

    def _apply(self, plan: Plan, granted: dict[Request, int]) -> tuple[Request, Refusal] | None:
        """Carry out a plan, as far as memory goes; returns whom it was too short for."""
        plan, lacking = able(plan, self._requests, self.tiers.segments)
        for key in plan.preempt:
            request = self._requests[key]
            granted.pop(request, None)
            self.preempt(request)
        for share in plan.shares:
            request = self._requests[share.key]
            try:
                count = self.tiers.make_room(request, share.num_tokens)
                assert request.slot is not None, f"{request} is not running"
                num_local = request.num_computed - request.slot_start
                self.cache.grow(request.slot, num_local + count)
            except (Shortage, DriverError) as refusal:
                return request, refusal
            granted[request] = count
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
                count = self._admit(request, share)
            except (Shortage, DriverError) as refusal:
                return request, refusal
            if count:  # or it waits for what is fetched
                granted[request] = count
            budget -= count
        return lacking

    def preempt(self, request: Request, *, keep: bool = True) -> None:
        """Take a request's slot away; it will be computed again. Its tokens are kept.

        With `keep` the slot is parked, so that what is left of it by then is found again, and what
        it holds is copied to the tier behind, if there is one.
        """
        if request.mending is not None:
            self.tiers.note_redo(request)
        self._release(request, keep=keep, comes_back=True)
        request.state = RequestState.WAITING
        request.num_computed = 0
        self.waiting.put_back(request)
        self.num_preemptions += 1

    def _remove(self, request: Request, state: RequestState) -> None:
        request.state = state
        if self.lacking is not None and self.lacking[0] is request:
            self.lacking = None
        del self._requests[request.key]
        self.waiting.let_in(request.key)
        self.accounts.left(request)

    def _release(self, request: Request, *, keep: bool, comes_back: bool) -> None:
        slot, request.slot = request.slot, None
        fetch, request.fetch = request.fetch, None
        self.running.remove(request)
        if fetch is not None:
            fetch.cancel()
            return
        assert slot is not None
        self.accounts.released(request)
        if request.is_spread and self.tiers.segments is not None:
            self.tiers.segments.let_go(request, slot, keep=keep)
            return
        computed = request.token_ids[: request.num_computed] if keep else ()
        if keep:
            self.tiers.leave(request, slot, computed, comes_back=comes_back)
        self.exits.let_go(slot, computed, request.variant)

    # -- admission ---------------------------------------------------------------------------

    def _admit(self, request: Request, budget: int) -> int:
        """Open a slot and reserve the request's memory; returns the tokens to compute now.

        Raises a Shortage or DriverError, with the request still waiting.
        """
        tokens = request.reusable_tokens if self.prefix_reuse else ()
        segments = self.tiers.segments
        if segments is not None and segments.is_long(request):
            slot, count = segments.open(request, tokens, budget)
            self._start(request, slot, request.slot_start)
            self._note_admission(request)
            return count
        donor, num_shared = live_donor(self.running, request, tokens, self.cache.growth_tokens)
        num_parked = 0
        if donor is not None or self.tiers.may_have_some:  # else nothing is to be compared with it
            num_parked = self.cache.prefix_length(tokens, request.variant)
        needed = _tokens_to_admit(request, bool(self.running), self.cache.growth_tokens)
        if self.running:  # what lacks memory for sure need not disturb what is parked
            num_there = max(num_shared, self.tiers.num_in_files(request, tokens))
            own = self.cache.num_pages(needed) - self.cache.num_whole_pages(num_there)
            if own > self.cache.num_obtainable():
                raise OutOfPages(f"{own} pages are not to be had while others run")
        num_near = max(num_shared, num_parked)
        request.fetch = self.tiers.fetch(request, tokens, num_near, needed)
        if request.fetch is not None:
            self._start(request, None, request.fetch.incoming.num_held)
            return 0
        slot, num_cached = self._open_slot(request, tokens, donor, num_shared, num_parked)
        count = min(request.num_tokens - num_cached, budget)
        try:
            self.cache.reserve(slot, needed)
            self.cache.grow(slot, num_cached + count)
        except (Shortage, DriverError):
            self.exits.let_go(slot, request.token_ids[:num_cached], request.variant)
            raise
        self._start(request, slot, num_cached)
        self._note_admission(request)
        return count

    def _start(self, request: Request, slot: Slot | None, num_computed: int) -> None:
        self.waiting.remove(request)
        request.slot = slot
        request.num_computed = num_computed
        request.state = RequestState.RUNNING
        self.running.append(request)

    def _note_admission(self, request: Request) -> None:
        """Note when a request first had a slot, and what it found in it."""
        if not request.was_admitted:
            request.scheduled_time_s = self._clock()
            request.num_cached = request.num_computed
            self.prefix_hit_tokens += request.num_computed
        request.waited_s = self._clock() - request.queued_time_s
        self.accounts.admitted(request)

    def _open_slot(
        self,
        request: Request,
        tokens: Sequence[int],
        donor: Request | None,
        num_shared: int,
        num_parked: int,
    ) -> tuple[Slot, int]:
        """A slot, and how many of `tokens` it already holds: a running request's, parked ones, or
        those of a file."""
        found = self.tiers.open_slot(request, tokens, max(num_shared, num_parked))
        if found is not None:
            return found
        if donor is not None and num_shared > num_parked:
            assert donor.slot is not None
            try:
                return self.cache.fork(donor.slot, num_shared, request.spec.owner), num_shared
            except Shortage:
                pass  # then with what is parked
        return self.cache.adopt(tokens, request.variant, owner=request.spec.owner)


def _look_ahead(
    cache: SlotCache, batch: Sequence[ScheduledRequest], num_ahead: int, max_batch_tokens: int
) -> None:
    """Have the memory of the next step mapped while this one computes."""
    if not num_ahead or cache.pool.num_available <= 0:
        return  # with no page to spare, it could only fail
    for item in batch:
        request, end = item.request, item.stop
        assert request.slot is not None
        if request.is_spread:
            continue  # it has been promised all that its slot may have
        if item.samples:
            target = min(end + num_ahead, request.num_prompt_tokens + request.max_tokens)
        else:
            target = min(end + max_batch_tokens, request.num_tokens)
        cache.look_ahead(request.slot, target)


def _tokens_to_admit(request: Request, others_run: bool, growth_tokens: int) -> int:
    """All it has, and a page's worth of its output if others run: else it is soon preempted."""
    if not others_run:
        return request.num_tokens
    remaining = request.max_tokens - request.num_output_tokens
    # The last token is never computed, so it needs no room.
    return request.num_tokens + min(remaining - 1, growth_tokens)


def _monotonic_s() -> float:
    return time.monotonic()


def _padding(cache: SlotCache, batch: Sequence[ScheduledRequest]) -> Padding | None:
    """A position behind some decode's, on pages that its slot has: it maps and takes nothing.

    It is written before the request's own next token is, and read by nobody.
    """
    if any(item.num_rows > 1 or item.request.is_spread for item in batch):
        return None
    for item in batch:
        slot, behind = item.request.slot, item.start + 1
        assert slot is not None
        if behind < slot.ready_tokens:
            cache.grow(slot, behind + 1)
            return Padding(slot, behind, item.request.ids(item.start, behind)[0])
    return None
