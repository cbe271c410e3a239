"""One instance on the virtual clock: the real scheduler, and steps that take what they cost."""

from collections.abc import Callable
from typing import cast

import msgspec

from ....allocator import SlotCache
from ....vmem.errors import InvalidConfig, OutOfPages
from ...request.request import Batch, Request
from ...scheduling.plan import Order
from ...scheduling.policies import POLICIES, Fair, Fcfs, Priority
from ...scheduling.scheduler import Scheduler
from ..snapshot import InstanceSnapshot, RequestSnapshot, Role
from .costs import DecodeRun, StepCost, StepWork, pairs
from .counting_cache import CountedSlot, CountingCache
from .loans import LoanConfig, Loans, NoLoans, SegmentedCache
from .pipeline import Flight, Items, Pipeline
from .requests import resumed, told
from .trace import Served

ORDERS: dict[str, type[Order]] = {order.name: order for order in (Fcfs, Priority, Fair)}


class InstanceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance is.

    Attributes:
        cost: of its steps.
        capacity_tokens, page_tokens: of its cache.
        max_seqs, max_batch_tokens, policy, scheduling_policy: as of `EngineConfig`.
        loans: how it borrows and lends; None if it does neither.
    """

    cost: StepCost
    capacity_tokens: int
    page_tokens: int = 16
    max_seqs: int = 256
    max_batch_tokens: int = 2048
    policy: str = "splitfuse"
    scheduling_policy: str = "fcfs"
    loans: LoanConfig | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES or self.scheduling_policy not in ORDERS:
            raise InvalidConfig(
                f"policy {self.policy!r} and scheduling_policy {self.scheduling_policy!r}: use one "
                f"of {', '.join(POLICIES)} and one of {', '.join(ORDERS)}"
            )
        if min(self.max_seqs, self.max_batch_tokens) < 1:
            raise InvalidConfig(
                f"max_seqs {self.max_seqs} and max_batch_tokens {self.max_batch_tokens}: use 1 or "
                "more"
            )


class Held(msgspec.Struct):
    """A request whose prompt is computed here, and that shall go on elsewhere."""

    slot: CountedSlot
    is_moving: bool = False


class SimulatedInstance:
    """An engine without a model.

    Steps of decodes alone, between which nothing can change, are not asked for one by one: nobody
    comes or ends, nobody who waits could be admitted, and there is memory for all of them. They are
    one flight, cut short where something does happen. One class with many methods, as requests,
    slots and steps under way change together.

    Args:
        clock: the time now.
        foresees: False to ask the scheduler for every step.
        slowdown: as of `Pipeline`.

    Attributes:
        role, home, is_draining: as of `InstanceSnapshot`.
        held: requests whose keys and values wait to be fetched, with the role "prefill".
        moving: running and waiting requests that are being moved.
        num_incoming: requests for which room is kept.
        served: what of each request is told.
        on_end: called with a request that has ended.
        on_held: called when a request was added to `held`.
        on_leave: called between two steps, with a request that is to leave.
        on_changed: called when a loan has changed something here.
        on_short: called when nothing can go on, unless others lend memory.
        loans: what it borrows and lends.
        num_scheduled: steps that the scheduler was asked for.
        most_used: share of the memory that was in use at most.
    """

    def __init__(
        self,
        id: int,
        config: InstanceConfig,
        role: Role,
        clock: Callable[[], float],
        *,
        foresees: bool = True,
        slowdown: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.id = id
        self.config = config
        self.role: Role = role
        self.home: Role | None = None
        self.is_draining = False
        self.cache = _cache_of(config)
        order = ORDERS[config.scheduling_policy]()
        self.scheduler = Scheduler(
            cast(SlotCache, self.cache),  # what it needs of one
            POLICIES[config.policy](order),
            max_seqs=config.max_seqs,
            max_batch_tokens=config.max_batch_tokens,
            clock=clock,
        )
        self.loans: Loans | NoLoans = NoLoans()
        if config.loans is not None:
            assert isinstance(self.cache, SegmentedCache)
            context_s = config.cost.decode[0].context_s
            self.loans = Loans(
                config.loans, self.cache, self.scheduler, context_s, clock, self.others_change
            )
        self.pipeline = Pipeline(config.cost, slowdown)
        self.held: dict[Request, Held] = {}
        self.moving: set[Request] = set()
        self.num_incoming = 0
        self.served: dict[Request, Served] = {}
        self.on_end: Callable[[Request], None] = lambda request: None
        self.on_held: Callable[[Request], None] = lambda request: None
        self.on_leave: Callable[[Request], None] = lambda request: None
        self.on_changed: Callable[[], None] = lambda: None
        self.on_short: Callable[[], None] = lambda: None
        self.num_scheduled = 0
        self.most_used = 0.0
        self._clock = clock
        self._foresees = foresees
        self._is_by_arrival = order.lines == "arrival"
        self._is_in_order = order.lines != "priority"  # in that of admission, those that run
        self._computing: dict[Request, int] = {}  # from which of its tokens on
        self._leaving: set[Request] = set()  # as soon as they have the token under way
        self._is_stuck = False  # the scheduler had nothing to give until something changes
        self._fails_s: float | None = None  # when a request fails that nobody lends memory for

    # -- requests ----------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True while a request is here, or about to be, or tokens of others'."""
        is_needed = self.num_incoming > 0 or self.loans.num_lent_here > 0
        return bool(self.held) or is_needed or self.scheduler.has_work

    def add(self, request: Request, served: Served, *, comes_back: bool = False) -> None:
        """Queue a request."""
        self.served[request] = served
        is_behind = self._is_by_arrival and not comes_back and self._is_full
        if not is_behind:  # else it changes nothing that is under way
            self.interrupt()
        self.scheduler.add(request, comes_back=comes_back)
        self._is_stuck = False

    @property
    def _is_full(self) -> bool:
        """Whether somebody who comes last by arrival must wait at least until one has ended."""
        scheduler = self.scheduler
        return len(scheduler.waiting) > 0 or len(scheduler.running) >= scheduler.max_seqs

    def take(self, request: Request) -> Served:
        """Give a request up: what it had here is gone."""
        self.interrupt()
        held = self.held.pop(request, None)
        if held is not None:
            self.cache.unpin(held.slot)
        else:
            self.scheduler.abort(request)
        return self._forget(request)

    def leave(self, request: Request) -> None:
        """Have `on_leave` called with a running request as soon as no step has it."""
        self.interrupt()
        if self.pipeline.has(request):
            self._leaving.add(request)
        else:
            self.on_leave(request)

    def others_change(self) -> None:
        """A debtor or creditor changes something here, or is about to: room, loans or credits."""
        self.interrupt()
        self._is_stuck = False
        self.on_changed()

    def _forget(self, request: Request) -> Served:
        self._leaving.discard(request)
        self._computing.pop(request, None)
        self.moving.discard(request)
        self._is_stuck = False
        return self.served.pop(request)

    def reserve(self, num_tokens: int) -> CountedSlot:
        """Room for a request that comes with its keys and values. Raises OutOfPages."""
        self.interrupt()  # it counted on memory that is gone now
        slot = self.cache.open()
        try:
            self.cache.grow(slot, num_tokens)
        except OutOfPages:
            self.cache.close(slot)
            raise
        self.num_incoming += 1
        return slot

    def release(self, slot: CountedSlot) -> None:
        """Undo a `reserve`."""
        self.cache.close(slot)
        self.num_incoming -= 1
        self._is_stuck = False

    def receive(self, request: Request, served: Served, slot: CountedSlot) -> None:
        """A request goes on here, with what `slot`, which was reserved for it, holds by now.

        As in the engine: the slot is parked, and the request finds it there when it is admitted,
        which is next.
        """
        self.interrupt()
        self.num_incoming -= 1
        self.cache.park(slot, request.token_ids[:-1])
        self.add(request, served, comes_back=True)

    def set_role(self, role: Role) -> None:
        """From now on; requests that were held go on here if that is for it."""
        self.interrupt()
        self.home = (self.home or self.role) if role == "both" else None
        self.role = role
        if role != "prefill":
            for request, held in list(self.held.items()):
                if not held.is_moving:
                    self.add(resumed(request), self.take(request), comes_back=True)

    # -- time --------------------------------------------------------------------------------

    @property
    def next_s(self) -> float:
        """When something happens here by itself."""
        next_s = self.pipeline.ends_s
        if self.scheduler.has_work and not self._is_stuck and self.pipeline.foreseen is None:
            next_s = min(next_s, max(self.pipeline.free_s, self._clock()))
        if self._is_stuck and self._fails_s is not None:
            next_s = min(next_s, self._fails_s)
        return next_s

    def turn(self) -> None:
        """Let happen what is due now: steps end, and the next one begins."""
        now_s = self._clock()
        if self._fails_s is not None and now_s >= self._fails_s:
            self._is_stuck = False  # it is asked once more
        while (flight := self.pipeline.pop_over(now_s)) is not None:
            self._is_stuck = False
            self._arrive(flight, flight.num_steps)
        may_begin = self.pipeline.foreseen is None and self.pipeline.free_s <= now_s
        is_asked = may_begin and self.scheduler.has_work and not self._is_stuck
        if is_asked and not self._go_on():
            self._ask()

    def interrupt(self) -> None:
        """Cut steps that were foreseen to the one under way: something is about to change."""
        flight = self.pipeline.foreseen
        if flight is None:
            return
        num_done = flight.num_done(self._clock())
        if num_done:
            self._arrive(flight, num_done)
            for request, _ in flight.items:
                self.cache.grow(_slot_of(request), _here(request, request.num_computed + 1))
                request.num_computed += 1
        self.pipeline.cut(num_done)

    # -- steps -------------------------------------------------------------------------------

    def _go_on(self) -> bool:
        """Begin what the scheduler could only say: a token for each, where nobody waits, all
        decode, and there is memory for it. False if it is to be asked."""
        running = self.scheduler.running
        is_forced = self._foresees and self._is_in_order and not len(self.scheduler.waiting)
        if not is_forced or not 0 < len(running) <= self.config.max_batch_tokens:
            return False
        items: Items = []
        context_tokens = num_lacking = 0
        for request in running:
            end = request.num_computed + 1
            if end != request.num_tokens:
                return False
            slot, rows = _slot_of(request), _here(request, end)
            if rows > slot.ready_tokens:
                num_lacking += self.cache.num_pages(rows) - slot.num_pages
            context_tokens += end
            items.append((request, end))
        if num_lacking > self.cache.num_obtainable() or not self.loans.have_room(items, 1):
            return False
        for request, end in items:
            self.cache.grow(_slot_of(request), _here(request, end))
            request.num_computed = end
        self._begin(items, StepWork(0, 0.0, len(items), context_tokens, self.loans.step_s(items)))
        return True

    def _ask(self) -> None:
        """Begin the step that the scheduler gives."""
        scheduler = self.scheduler
        before = len(scheduler.waiting), scheduler.num_preemptions
        batch = scheduler.schedule()
        self.num_scheduled += 1
        # Where one of those that wait was admitted, another may be in the next step.
        is_settled = before == (len(scheduler.waiting), scheduler.num_preemptions)
        if batch.items:
            self._fails_s = None
            self._launch(batch, is_settled=is_settled or not len(scheduler.waiting))
        else:
            self._meet_shortage()

    def _launch(self, batch: Batch, *, is_settled: bool) -> None:
        """Begin a step, and where nothing is about to change those that follow it as it is."""
        items: Items = []
        prompt_tokens = num_decodes = context_tokens = 0
        num_pairs = 0.0
        for item in batch.items:
            request, count = item.request, item.num_tokens
            end = request.num_computed + count
            if count == 1:
                num_decodes += 1
                context_tokens += end
            else:
                self._computing.setdefault(request, request.num_computed)
                prompt_tokens += count
                num_pairs += pairs(request.num_computed, count)
            request.num_computed = end
            items.append((request, end))
        loans_s = self.loans.step_s(items, {i.request: i.num_tokens for i in batch.items})
        work = StepWork(prompt_tokens, num_pairs, num_decodes, context_tokens, loans_s)
        self._begin(items, work, is_settled=is_settled)

    def _begin(self, items: Items, work: StepWork, *, is_settled: bool = True) -> None:
        self.most_used = max(self.most_used, self.cache.live_tokens / self.cache.capacity_tokens)
        num_steps = self._num_foreseen(items) if is_settled and not work.prompt_tokens else 1
        if num_steps > 1:
            self.pipeline.foresee(items, work, num_steps, self._clock())
        else:
            self.pipeline.begin(items, work, self._clock())

    def _num_foreseen(self, items: Items) -> int:
        """Steps, this one included, in which nothing changes but that each request grows by one.

        Who waits by arrival is admitted when somebody has ended, and not before: the first in line
        lacks a slot, or memory, of which others only take more, unless creditors take some of it
        in. By other orders it may be somebody else's turn meanwhile.
        """
        scheduler = self.scheduler
        is_alone = len(items) == len(scheduler.running) and not len(self.pipeline)
        if not (self._foresees and is_alone) or self._leaving or self.role == "prefill":
            return 1
        if self.loans.has_moved:
            return 1
        if len(scheduler.waiting) and (not self._is_by_arrival or self.loans.may_lend):
            return 1
        left = min(request.max_tokens - request.num_output_tokens for request, _ in items)
        if left > 1 and not self._has_room(items, left):
            low, high = 1, left  # there is room for `low` steps, and not for `high`
            while low + 1 < high:
                middle = (low + high) // 2
                low, high = (middle, high) if self._has_room(items, middle) else (low, middle)
            left = low
        return left

    def _has_room(self, items: Items, num_steps: int) -> bool:
        """Whether all could take so many steps, the one that is scheduled included."""
        num_lacking = 0
        for request, end in items:
            slot, rows = _slot_of(request), _here(request, end + num_steps - 1)
            if rows > slot.ready_tokens:
                num_lacking += self.cache.num_pages(rows) - slot.num_pages
        has_pages = num_lacking <= self.cache.num_obtainable()
        return has_pages and self.loans.have_room(items, num_steps)

    def _arrive(self, flight: Flight, num_steps: int) -> None:
        """Steps are over: requests have their tokens, and some end."""
        run = flight.run
        if run is None:
            self.loans.note_steps(DecodeRun(flight.ends_s - flight.starts_s, 0.0), 1)
            for request, end in flight.items:
                if request in self._computing:
                    self._computing[request] = end
                    if end >= request.num_computed:
                        del self._computing[request]
                # One that lost its slot meanwhile and came back has had this token already.
                if not request.is_finished and end == request.num_tokens:
                    self._note_token(request, flight.ends_s)
            return
        self.loans.note_steps(run, num_steps)
        first_s = flight.starts_s + run.first_s
        last_s = flight.starts_s + run.time_s(num_steps)
        gap_s = run.first_s + run.more_s * (num_steps - 1) if num_steps > 1 else 0.0
        grow, account_of = self.cache.grow, self.scheduler.accounts.of
        for request, _ in flight.items:
            request.num_computed += num_steps - 1
            grow(_slot_of(request), _here(request, request.num_computed))
            request.token_ids += [request.token_ids[-1]] * num_steps
            account_of(request).add(output_tokens=num_steps)
            self.served[request].note_tokens(num_steps, first_s, last_s, gap_s)
        self.most_used = max(self.most_used, self.cache.live_tokens / self.cache.capacity_tokens)
        if num_steps == flight.num_steps:  # else none has ended
            for request, _ in flight.items:
                if request.num_output_tokens >= request.max_tokens:
                    self._end(request)

    def _note_token(self, request: Request, at_s: float) -> None:
        request.token_ids.append(request.token_ids[-1])
        self.scheduler.accounts.generated(request)
        self.served[request].note_tokens(1, at_s, at_s, 0.0)
        if request.num_output_tokens >= request.max_tokens:
            self._end(request)
            return
        if self.role == "prefill" and request.slot is not None:
            slot = _slot_of(request)
            self.cache.pin(slot)
            self.scheduler.finish(request)
            self.held[request] = Held(slot, is_moving=request in self.moving)
            self.on_held(request)
        if request in self._leaving:
            self._leaving.discard(request)
            self.on_leave(request)

    def _end(self, request: Request, failure: str = "") -> None:
        if failure:
            self.scheduler.abort(request)
        else:
            self.scheduler.finish(request)
        self._forget(request).failure = failure
        self.on_end(request)

    def _meet_shortage(self) -> None:
        """Nothing can go on. If nothing is under way that could change it, the one that it was
        too short for fails, as in the engine; where others may lend memory, after a while."""
        self._is_stuck = True
        shortage, now_s = self.scheduler.shortage, self._clock()
        if not shortage or len(self.pipeline) or self.held or self.num_incoming:
            return
        if self.config.loans is not None and self._fails_s is None:
            self._fails_s = now_s + self.config.loans.wait_s
            self.on_short()
        if self._fails_s is None or now_s >= self._fails_s:
            self._fails_s = None
            request, refusal = shortage
            self._end(request, f"no memory: {refusal}")

    # -- what is told ------------------------------------------------------------------------

    def snapshot(self) -> InstanceSnapshot:
        """As policies see it."""
        now_s, scheduler = self._clock(), self.scheduler
        foreseen = self.pipeline.foreseen
        num_done = foreseen.num_done(now_s) if foreseen is not None else 0
        requests = self._requests(now_s, num_done)
        num_waiting = len(scheduler.waiting)
        return InstanceSnapshot(
            id=self.id,
            capacity_tokens=self.cache.capacity_tokens,
            role=self.role,
            home=self.home,
            is_draining=self.is_draining,
            used_tokens=self.cache.live_tokens + self._tokens_grown(num_done),
            parked_tokens=self.cache.parked_tokens,
            num_running=len(requests) - num_waiting,
            num_waiting=num_waiting,
            max_running=self.config.max_seqs,
            queued_tokens=sum(r.num_uncomputed for r in requests if not r.has_prompt),
            requests=tuple(requests),
            max_lent_tokens=self.loans.max_lent_tokens,
            max_local_tokens=self.loans.max_local_tokens,
        )

    def _tokens_grown(self, num_done: int) -> int:
        """What those that run take more than is noted, once so many foreseen steps are over."""
        if not num_done:
            return 0
        num_pages = 0
        for request in self.scheduler.running:
            slot, rows = _slot_of(request), _here(request, request.num_computed + num_done)
            if rows > slot.ready_tokens:
                num_pages += self.cache.num_pages(rows) - slot.num_pages
        return num_pages * self.cache.growth_tokens

    def _requests(self, now_s: float, num_done: int) -> list[RequestSnapshot]:
        """All that are here; those that run have `num_done` tokens more than is noted."""
        found = [told(r, now_s, 0, 1, False, not h.is_moving) for r, h in self.held.items()]
        moving, computing = self.moving, self._computing
        for r in self.scheduler.running:
            # A token under way is still to be computed; while steps are foreseen, each has one.
            left = 1 if num_done else max(1, r.num_tokens - computing.get(r, r.num_computed))
            found.append(told(r, now_s, num_done, left, False, r not in moving and not r.lent))
        if len(self.scheduler.waiting):
            for r in self.scheduler.waiting:
                found.append(told(r, now_s, 0, r.num_tokens, True, r not in moving))
        return found


def _slot_of(request: Request) -> CountedSlot:
    assert request.slot is not None, f"{request} is not running"
    return cast(CountedSlot, request.slot)


def _cache_of(config: InstanceConfig) -> CountingCache:
    kept = {"page_tokens": config.page_tokens, "max_parked": config.max_seqs}
    if config.loans is None:
        return CountingCache(config.capacity_tokens, **kept)
    return SegmentedCache(
        config.capacity_tokens,
        token_bytes=config.loans.token_bytes,
        max_len=max(config.capacity_tokens, config.loans.most_tokens),
        **kept,
    )


def _here(request: Request, num_tokens: int) -> int:
    """Of its first tokens, those in its slot; the others are elsewhere."""
    return num_tokens - request.slot_start
