"""The whole cluster on a virtual clock: a front end, instances, and a policy of each kind."""

import gc
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from ....vmem.errors import InvalidConfig
from ...request.request import Request
from ...request.spec import SequenceKey
from ..policies import ClusterPolicy, drained_first
from ..policies.ledger import Ledger
from ..snapshot import ClusterSnapshot, InstanceSnapshot, Link, Newcomer, Role
from .bank import Bank
from .costs import TransferCost
from .instance import InstanceConfig, SimulatedInstance
from .moves import Moving
from .pipeline import NEVER
from .requests import new_request
from .trace import Report, Served, TraceRequest

_MOST_IDLE_ROUNDS = 1000
_FIRST_PREFIX = 1 << 40  # tokens that stand for shared prefixes, beyond those of requests


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """An instance to begin with."""

    config: InstanceConfig
    role: Role = "both"


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated.

    Attributes:
        members: at the beginning; one that is added later is like the first.
        transfer: from one instance to another; `links` has those that differ, by (source, target).
        report_s: how old what the front end knows of an instance may be. What it gave an instance
            itself, it knows; so it does of requests that ended or moved.
        react_s: between two rounds of moves, at least.
        round_s: between two rounds of moves where nothing asks for one.
        startup_s: until an instance that is added takes requests.
        clients: that wait for their answers and ask again: from so many on, a request comes when
            another has ended, whatever the trace says; None for the times of the trace.
        slowdown: of instances that share processors: how many times as long a step takes that
            begins while one computes, itself, while two do, and so on; the last one is for more.
            Nothing is foreseen then.
        foresees: as of `SimulatedInstance`.
    """

    members: tuple[Member, ...]
    transfer: TransferCost = TransferCost()
    links: dict[tuple[int, int], TransferCost] = {}
    report_s: float = 0.0
    react_s: float = 0.0
    round_s: float = 0.5
    startup_s: float = 30.0
    clients: int | None = None
    slowdown: tuple[float, ...] = ()
    foresees: bool = True

    def __post_init__(self) -> None:
        if not self.members:
            raise InvalidConfig("a cluster has no members; give one at least")
        if self.slowdown and min(self.slowdown) <= 0:
            raise InvalidConfig(f"slowdown is {self.slowdown}; a step takes some time")
        if self.clients is not None and self.clients < 1:
            raise InvalidConfig(f"clients is {self.clients}; use one at least, or None")
        if min(self.report_s, self.react_s, self.startup_s) < 0 or self.round_s <= 0:
            raise InvalidConfig(
                f"report_s {self.report_s}, react_s {self.react_s}, startup_s {self.startup_s} and "
                f"round_s {self.round_s}: times are not negative, and rounds some time apart"
            )


def simulate(
    config: ClusterConfig,
    policy: ClusterPolicy,
    trace: Sequence[TraceRequest],
    ledger: Ledger | None = None,
) -> Report:
    """Run a trace, whose requests come in order of arrival, to its end.

    With a `ledger`, instances lend each other memory whose `InstanceConfig` says how.

    Raises InvalidConfig for a trace that is empty or out of order.
    """
    if not trace or any(a.arrival_s > b.arrival_s for a, b in itertools.pairwise(trace)):
        raise InvalidConfig(f"a trace of {len(trace)} requests must have one, and be in order")
    with _uncollected():
        return _Simulation(config, policy, trace, ledger).run()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's cyclic collector, which would look at all requests again and again: a third
    of the time of a large run, for a few hundred cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Simulation:
    """One run. One class with many methods, for all that happens meets in one queue of events."""

    def __init__(
        self,
        config: ClusterConfig,
        policy: ClusterPolicy,
        trace: Sequence[TraceRequest],
        ledger: Ledger | None,
    ) -> None:
        self._config = config
        self._policy = policy
        self._trace = trace
        self._now_s = 0.0
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._served = [Served(request=request, arrived_s=request.arrival_s) for request in trace]
        prefixes = dict.fromkeys(request.prefix for request in trace if request.prefix)
        self._prefixes = {p: _FIRST_PREFIX + n for n, p in enumerate(prefixes)}
        self._num_left = len(trace)
        self._held_back: deque[int] = deque()
        self._num_come = self._num_held_back = self._num_dispatched = 0
        self._places: dict[SequenceKey, tuple[Request, SimulatedInstance]] = {}
        self._instances: dict[int, SimulatedInstance] = {}
        self._wakes: dict[int, float] = {}  # when each instance is to be turned
        self._seen: dict[int, InstanceSnapshot] = {}  # what the front end knows
        self._stale: set[int] = set()
        self._reported_s = -NEVER
        self._round_s: float | None = None  # of the next one
        self._rounded_s = -NEVER
        self._num_idle_rounds = 0  # that nothing else was to come in
        self._has_held = False
        self._scaled_s: float | None = None
        self._switched_s: float | None = None
        self._num_starting = 0
        self._born_s: dict[int, float] = {}
        self._gone: dict[int, SimulatedInstance] = {}
        self._instance_s = 0.0
        self._most = 0
        self._links = {
            pair: Link(cost.latency_s, cost.bytes_per_s) for pair, cost in config.links.items()
        }
        self._bank = Bank(ledger) if ledger is not None else None
        self._moving = Moving(
            self._clock, self._later, self._transfer, self._moved, self._has_changed
        )
        for member in config.members:
            self._born_s[self._add_instance(member).id] = 0.0

    # -- events ------------------------------------------------------------------------------

    def run(self) -> Report:
        """All of it."""
        self._come()
        if self._bank is not None:
            self._bank.settle(self._snapshot())
        self._ask_round(self._config.round_s)
        while self._num_left:
            if not self._events:
                self._give_up()
                break
            self._now_s, _, happen = heapq.heappop(self._events)
            happen()
        return self._report()

    def _clock(self) -> float:
        return self._now_s

    def _later(self, at_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), happen))

    def _come(self) -> None:
        """Have the next request of the trace come when it does, and the next one after it."""
        number = self._num_come
        clients = self._config.clients
        if number == len(self._trace) or (clients is not None and number >= clients):
            return
        self._num_come += 1

        def come() -> None:
            self._come()
            self._arrive(number)

        self._later(self._trace[number].arrival_s, come)

    def _arrive(self, number: int) -> None:
        """A request is here."""
        self._served[number].arrived_s = self._now_s
        if self._held_back or not self._dispatch(number):
            self._held_back.append(number)
            self._num_held_back += 1

    def _wake(self, instance: SimulatedInstance) -> None:
        """See that an instance is turned when it is due."""
        next_s = instance.next_s
        if next_s == self._wakes.get(instance.id) or next_s == NEVER:
            return
        self._wakes[instance.id] = next_s

        def turn() -> None:
            if self._wakes.get(instance.id) == next_s:
                del self._wakes[instance.id]
                instance.turn()
                self._wake(instance)

        self._later(next_s, turn)

    # -- the front end -----------------------------------------------------------------------

    def _dispatch(self, number: int) -> bool:
        """Give a request to an instance; False if none takes it now."""
        trace = self._trace[number]
        request = new_request(number, trace, self._served[number].arrived_s, self._prefixes)
        newcomer = Newcomer(
            key=request.key,
            num_tokens=trace.prompt_tokens,
            priority=trace.priority,
            tenant=trace.tenant,
            prefixes=self._prefixes_of(request, trace),
        )
        target_id = self._policy.dispatch(self._snapshot(), newcomer)
        if target_id is None:
            return False
        target = self._instances[target_id]
        self._num_dispatched += 1
        longest = target.cache.capacity_tokens
        if self._bank is not None:
            longest = self._bank.longest(target)
        if trace.prompt_tokens + trace.output_tokens - 1 > longest:
            self._served[number].failure = "it could never fit into the memory of an instance"
            self._one_less()
            return True
        self._seen[target_id] = self._seen[target_id].with_newcomer(newcomer)
        self._places[request.key] = request, target
        target.add(request, self._served[number])
        self._wake(target)
        return True

    def _prefixes_of(self, request: Request, trace: TraceRequest) -> dict[int, int]:
        if not trace.prefix:
            return {}
        found = {i.id: i.cache.prefix_length(request.token_ids) for i in self._instances.values()}
        return {id: length for id, length in found.items() if length}

    def _snapshot(self) -> ClusterSnapshot:
        """What the front end knows, as fresh as it is."""
        is_time = self._now_s - self._reported_s >= self._config.report_s
        ids: Iterable[int] = self._stale
        if is_time:
            self._reported_s = self._now_s
            ids = [
                id
                for id, instance in self._instances.items()
                if instance.has_work or id in self._stale
            ]
        for id in ids:
            if id in self._instances:
                self._seen[id] = self._instances[id].snapshot()
        self._stale = set()
        return ClusterSnapshot(
            time_s=self._now_s,
            instances=tuple(self._seen.values()),
            links=self._links,
            token_bytes=self._config.transfer.token_bytes,
            num_dispatched=self._num_dispatched,
            scaled_s=self._scaled_s,
            switched_s=self._switched_s,
            loans=() if self._bank is None else self._bank.loans(),
        )

    # -- rounds ------------------------------------------------------------------------------

    def _ask_round(self, at_s: float) -> None:
        """See that there is a round at that time, or before."""
        if self._round_s is not None and self._round_s <= at_s:
            return
        self._round_s = at_s

        def happen() -> None:
            if self._round_s == at_s:
                self._round_s = None
                self._round()

        self._later(at_s, happen)

    def _round(self) -> None:
        """Moves, roles, the number of instances, and those that were held back."""
        self._rounded_s = self._now_s
        snapshot = self._snapshot()
        for move in self._policy.migrations(snapshot):
            self._begin(move.key, move.source, move.target)
        for id, role in self._policy.roles(snapshot).items():
            self._instances[id].set_role(role)
            self._switched_s = self._now_s
            self._has_changed(self._instances[id])
        self._scale(snapshot)
        if self._bank is not None:
            self._bank.settle(self._snapshot())
        while self._held_back and self._dispatch(self._held_back[0]):
            self._held_back.popleft()
        self._has_held = any(instance.held for instance in self._instances.values())
        self._num_idle_rounds = 0 if self._events else self._num_idle_rounds + 1
        if self._num_left and self._num_idle_rounds < _MOST_IDLE_ROUNDS:
            self._ask_round(self._now_s + self._config.round_s)

    def _begin(self, key: SequenceKey, source_id: int, target_id: int) -> None:
        place = self._places.get(key)
        source, target = self._instances.get(source_id), self._instances.get(target_id)
        if place is None or source is None or target is None or place[1] is not source:
            return  # it has ended or moved since the instance reported
        request = place[0]
        if request not in source.served or request in self._moving.under_way:
            return  # it is on its way
        self._moving.begin(request, source, target)
        for instance in (source, target):
            self._stale.add(instance.id)
            self._wake(instance)

    def _transfer(self, source_id: int, target_id: int) -> TransferCost:
        return self._config.links.get((source_id, target_id), self._config.transfer)

    # -- what instances tell -----------------------------------------------------------------

    def _ended(self, request: Request, instance: SimulatedInstance) -> None:
        self._moving.ended(request)
        del self._places[request.key]
        self._one_less()
        self._stale.add(instance.id)
        if self._held_back or self._has_held:
            self._ask_soon()

    def _one_less(self) -> None:
        """A request has ended; a client that waited for it asks again."""
        self._num_left -= 1
        if self._config.clients is not None and self._num_come < len(self._trace):
            number = self._num_come
            self._num_come += 1
            self._later(self._now_s, lambda: self._arrive(number))

    def _computed(self, instance: SimulatedInstance) -> None:
        self._has_held = True
        self._stale.add(instance.id)
        self._ask_soon()

    def _moved(self, request: Request, target: SimulatedInstance) -> None:
        self._places[request.key] = request, target
        self._has_changed(target)

    def _has_changed(self, instance: SimulatedInstance) -> None:
        self._stale.add(instance.id)
        self._wake(instance)
        if self._held_back:
            self._ask_soon()

    def _ask_soon(self) -> None:
        self._ask_round(max(self._now_s, self._rounded_s + self._config.react_s))

    def _slowdown(self) -> float:
        """Of a step that begins now."""
        factors = self._config.slowdown
        if not factors:
            return 1.0
        num_others = sum(len(instance.pipeline) > 0 for instance in self._instances.values())
        return factors[min(num_others, len(factors) - 1)]

    # -- instances ---------------------------------------------------------------------------

    def _add_instance(self, member: Member) -> SimulatedInstance:
        id = len(self._instances) + len(self._gone)
        instance = SimulatedInstance(
            id,
            member.config,
            member.role,
            self._clock,
            foresees=self._config.foresees and not self._config.slowdown,
            slowdown=self._slowdown,
        )
        instance.on_end = lambda request: self._ended(request, instance)
        instance.on_held = lambda request: self._computed(instance)
        instance.on_leave = self._moving.left
        instance.on_changed = lambda: self._has_changed(instance)
        instance.on_short = self._ask_soon
        if self._bank is not None:
            self._bank.join(instance)
        self._instances[id] = instance
        self._seen[id] = instance.snapshot()
        self._most = max(self._most, len(self._instances))
        return instance

    def _scale(self, snapshot: ClusterSnapshot) -> None:
        """Add instances or let some drain, and end those that have."""
        for instance in [i for i in self._instances.values() if i.is_draining]:
            if not instance.has_work:
                self._end_instance(instance)
        num_working = len(snapshot.working)
        wanted = self._policy.scale(snapshot)
        num_more = wanted - num_working - self._num_starting
        if wanted == num_working or (num_more <= 0 < wanted - num_working):
            return
        self._scaled_s = self._now_s
        for _ in range(num_more):
            born_s = self._now_s
            self._num_starting += 1
            self._most = max(self._most, len(self._instances) + self._num_starting)
            self._later(
                self._now_s + self._config.startup_s, lambda born_s=born_s: self._start(born_s)
            )
        for id in drained_first(snapshot, num_working - wanted):
            self._instances[id].is_draining = True
            self._stale.add(id)
            self._ask_soon()

    def _start(self, born_s: float) -> None:
        """An instance is ready that was asked for at `born_s`."""
        self._num_starting -= 1
        self._born_s[self._add_instance(self._config.members[0]).id] = born_s
        self._scaled_s = self._now_s
        if self._held_back:
            self._ask_soon()

    def _end_instance(self, instance: SimulatedInstance) -> None:
        if self._bank is not None:
            self._bank.leave(instance)
        del self._instances[instance.id], self._seen[instance.id]
        self._stale.discard(instance.id)
        self._gone[instance.id] = instance
        self._instance_s += self._now_s - self._born_s[instance.id]

    # -- the end -----------------------------------------------------------------------------

    def _give_up(self) -> None:
        """Nothing will happen any more: those that are left never get their tokens."""
        for served, request in zip(self._served, self._trace, strict=True):
            if not served.failure and served.num_tokens < request.output_tokens:
                served.failure = "no instance took it"

    def _report(self) -> Report:
        every = {**self._gone, **self._instances}
        for id in self._instances:
            self._instance_s += self._now_s - self._born_s[id]
        duration_s = max((one.last_s for one in self._served), default=0.0)
        life_s = max(duration_s, 1e-9)
        return Report(
            served=self._served,
            duration_s=duration_s,
            num_steps=sum(i.pipeline.num_steps for i in every.values()),
            num_scheduled=sum(i.num_scheduled for i in every.values()),
            num_preemptions=sum(i.scheduler.num_preemptions for i in every.values()),
            num_moves=self._moving.num_moves,
            num_refused=self._moving.num_refused,
            bytes_moved=self._moving.num_bytes,
            num_held_back=self._num_held_back,
            instance_s=self._instance_s,
            most_instances=self._most,
            busy={id: i.pipeline.busy_s / life_s for id, i in sorted(every.items())},
            most_used={id: i.most_used for id, i in sorted(every.items())},
            **({} if self._bank is None else self._bank.counts()),
        )
