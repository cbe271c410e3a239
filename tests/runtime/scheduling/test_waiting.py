"""Requests in line: their order, and what operations cost however many there are."""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from vkv import SamplingParams
from vkv.runtime.request.request import Request
from vkv.runtime.request.sampling_state import SamplingState
from vkv.runtime.request.spec import RequestSpec, SequenceKey
from vkv.runtime.scheduling import lines
from vkv.runtime.scheduling.accounts import Accounts
from vkv.runtime.scheduling.lines import lines_for
from vkv.runtime.scheduling.plan import Order
from vkv.runtime.scheduling.policies import Fair, Fcfs, Priority
from vkv.runtime.scheduling.waiting import WaitingQueue

_PARAMS = SamplingParams()
_ORDERS: tuple[Order, ...] = (Fcfs(), Priority(), Priority(None), Fair())


def _request(name: int, *, priority: int = 0, tenant: str = "", came_s: float = 0.0) -> Request:
    spec = RequestSpec(
        request_id=str(name),
        prompt_token_ids=[1],
        params=_PARAMS,
        priority=priority,
        tenant=tenant,
    )
    request = Request(spec, max_tokens=1, sampling=SamplingState(_PARAMS, [1]))
    request.queued_time_s = came_s
    return request


class _Rig:
    """A queue beside a model of it that is as slow and as plain as can be."""

    def __init__(self, order: Order, rng: random.Random, num_tenants: int) -> None:
        self.order = order
        self.tenants = [str(number) for number in range(num_tenants)]
        self.rng = rng
        self.accounts = Accounts({"1": 2.0})
        self.queue = WaitingQueue(lines_for(order, self.accounts))
        self.now_s = 0.0
        self.arrivals: list[Request] = []  # with those that came back first
        self.line: set[Request] = set()
        self.held: dict[Request, SequenceKey] = {}
        self.out: list[Request] = []  # that have slots
        self.names = iter(range(10**6))
        self.entered: dict[str, int] = {}  # when each tenant came into the line
        self.last: str | None = None  # whose line ended last

    def new(self) -> Request:
        self.now_s += self.rng.random() * 60
        request = _request(
            next(self.names),
            priority=self.rng.randrange(-2, 3),
            tenant=self.rng.choice(self.tenants),
            came_s=self.now_s,
        )
        self.accounts.came(request)
        self.check_lift(request)
        self.arrivals.append(request)
        return request

    def check_lift(self, request: Request) -> None:
        """Expect what the paper says of a tenant that comes to the line."""
        waiting = self.line | self.held.keys()
        counter = self.counter(request.tenant)
        self.expected = counter
        if all(other.tenant != request.tenant for other in waiting):
            if self.line:
                self.expected = max(counter, min(self.counter(r.tenant) for r in self.line))
            elif self.last is not None:
                self.expected = max(counter, self.counter(self.last))

    def counter(self, tenant: str) -> float:
        return next(a.counter for a in self.accounts.stats() if a.tenant == tenant)

    def line_up(self, request: Request) -> None:
        if all(other.tenant != request.tenant for other in self.line):
            self.entered[request.tenant] = len(self.entered) + next(self.names)
        self.line.add(request)

    def leave(self, request: Request) -> None:
        self.queue.remove(request)
        self.held.pop(request, None)
        if request in self.line:
            self.line.remove(request)
            if all(other.tenant != request.tenant for other in self.line):
                self.last = request.tenant

    def shown(self, num_free: int, num_running: int) -> list[Request]:
        """Whom the queue is to show."""
        line = [request for request in self.arrivals if request in self.line]
        num_free, has_free = max(1, num_free), num_free > 0
        if self.order.lines == "arrival":
            return line[:num_free]
        if self.order.lines == "priority":
            came = {request: request.queued_time_s for request in line}
            ranked = sorted(
                line, key=lambda r: (self.order.rank(r.priority, self.now_s - came[r]), came[r])
            )
            found = ranked[:num_free]
            if not has_free:
                own = sorted(line, key=lambda r: (r.priority, came[r]))[:num_running]
                found += [request for request in own if request not in found]
            return found
        tenants = sorted(
            {request.tenant for request in line},
            key=lambda tenant: (self.counter(tenant), self.entered[tenant]),
        )
        found = []
        if not has_free:
            firsts = (next(r for r in line if r.tenant == tenant) for tenant in tenants)
            return list(firsts)[: max(1, num_running)]
        for rank, tenant in enumerate(tenants[:num_free], start=1):
            own = [request for request in line if request.tenant == tenant]
            found += own[: max(1, num_free // rank)]
        return found


def _serve(rig: _Rig, rng: random.Random) -> None:
    """What moves counters: a running request gets tokens, or gives some back."""
    if not rig.out:
        return
    request = rng.choice(rig.out)
    account = rig.accounts.of(request)
    if rng.random() < 0.7:
        account.add(output_tokens=rng.randrange(5), prompt_tokens=rng.randrange(9))
    else:
        before = account.counter
        account.add(prompt_tokens=-rng.randrange(1, 9))
        assert account.counter < before
        rig.accounts.on_lowered(account)


@pytest.mark.parametrize("order", _ORDERS, ids=lambda order: f"{order.name}, {vars(order)}")
@pytest.mark.parametrize("seed", range(25))
def test_the_order_is_that_of_a_plain_list(
    monkeypatch: pytest.MonkeyPatch, seed: int, order: Order
) -> None:
    monkeypatch.setattr(lines, "_MOST_GONE", (0, 64)[seed % 2])  # soon swept out, or later
    rng = random.Random(seed)
    rig = _Rig(order, rng, (3, 30)[seed // 2 % 2])
    queue = rig.queue
    leaders = [_request(-n - 1) for n in range(3)]
    for _ in range(300):
        action = rng.random()
        everyone = sorted(rig.line | rig.held.keys(), key=rig.arrivals.index)
        if action < 0.30:
            request = rig.new()
            queue.add(request)
            rig.line_up(request)
            if order.lines == "tenant":
                assert rig.counter(request.tenant) == rig.expected
        elif action < 0.40:
            request, leader = rig.new(), rng.choice(leaders).key
            queue.hold(request, leader)
            rig.held[request] = leader
        elif action < 0.50:
            leader = rng.choice(leaders).key
            queue.let_in(leader)
            for request in [r for r in rig.arrivals if rig.held.get(r) == leader]:
                del rig.held[request]
                rig.line_up(request)
            assert not queue.is_awaited(leader)
        elif action < 0.68 and rig.line:
            request = rng.choice(queue.first(rng.randrange(1, 5)))
            rig.leave(request)
            rig.out.append(request)
        elif action < 0.78 and rig.out:
            request = rig.out.pop(rng.randrange(len(rig.out)))
            rig.arrivals.remove(request)  # it has lost that place
            rig.arrivals.insert(0, request)
            queue.put_back(request)
            rig.line_up(request)
        elif action < 0.86:
            _serve(rig, rng)
        elif action < 0.93 and (everyone or rig.out):
            queue.set_priority(rng.choice(everyone or rig.out), rng.randrange(-2, 3))
        elif everyone:
            rig.leave(rng.choice(everyone))
        assert len(queue) == len(rig.line) + len(rig.held)
        num_free = rng.randrange(-1, 9)
        assert queue.first(num_free, 3) == rig.shown(num_free, 3)
    assert not set(rig.out) & set(queue)
    for account in map(rig.accounts.of, rig.line if order.lines == "tenant" else ()):
        in_line = [r for r in rig.line if r.tenant == account.tenant]
        waiting = [r for r in (*rig.line, *rig.held) if r.tenant == account.tenant]
        assert (account.num_in_line, account.num_waiting) == (len(in_line), len(waiting))


def test_leaving_twice_is_an_error_and_held_ones_may_leave() -> None:
    queue, leader, held = WaitingQueue(), _request(0), _request(1)
    queue.hold(held, leader.key)
    assert queue.is_awaited(leader.key)
    assert held in queue
    assert queue.first(5) == []
    queue.remove(held)
    queue.let_in(leader.key)
    assert queue.first(5) == []
    with pytest.raises(KeyError):
        queue.remove(held)


def test_nobody_is_shown_twice_after_many_tenants_have_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines, "_MOST_GONE", 0)
    accounts = Accounts({})
    queue = WaitingQueue(lines_for(Fair(), accounts))
    requests = [_request(number, tenant=str(number)) for number in range(8)]
    for number, request in enumerate(requests):
        accounts.came(request)
        accounts.of(request).counter = float(number)
        queue.add(request)
    for request in requests[2:]:
        queue.remove(request)
    accounts.of(requests[1]).add(output_tokens=1)
    assert queue.first(5) == requests[:2]
    assert queue.first(5) == requests[:2]


def test_one_that_was_held_stands_where_its_new_priority_puts_it() -> None:
    queue = WaitingQueue(lines_for(Priority(), Accounts({})))
    leader, held, other = _request(0), _request(1, priority=3), _request(2, priority=1)
    queue.hold(held, leader.key)
    queue.add(other)
    queue.set_priority(held, 0)
    assert queue.first(5) == [other]
    queue.let_in(leader.key)
    assert queue.first(5) == [held, other]


# -- what it costs -------------------------------------------------------------------------------


class _Counted(dict[Request, Any]):
    """The places of a line, which counts the looks at them."""

    looks = 0

    def get(self, key: Request, default: Any = None) -> Any:
        _Counted.looks += 1
        return super().get(key, default)


def _cost(work: Callable[[], object], patched: pytest.MonkeyPatch) -> int:
    """Entries that `work` looks at, pushes and pops."""
    counts: Counter[str] = Counter()
    _Counted.looks = 0

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(heapq, name)

        def call(*args: Any) -> Any:
            counts[name] += len(args[0]) if name == "heapify" else 1
            return function(*args)

        return call

    plain = lines.Line.__init__

    def counted(line: lines.Line) -> None:
        plain(line)
        line._places = _Counted()

    with patched.context() as context:
        context.setattr(lines.Line, "__init__", counted)
        for name in ("heappush", "heappop", "heapify"):
            context.setattr(lines.heapq, name, counting(name))
        work()
    return _Counted.looks + counts.total()


@pytest.fixture(scope="module")
def many() -> list[Request]:
    """A hundred thousand requests."""
    return [_request(name, came_s=name) for name in range(100_000)]


@pytest.mark.parametrize(
    ("order", "num_kinds"),
    [(Fcfs(), 1), (Priority(), 10**6), (Fair(), 3), (Fair(), 10**6)],
    ids=["fcfs", "as many priorities", "three tenants", "as many tenants"],
)
def test_a_hundred_thousand_in_line_cost_each_what_a_hundred_do(
    monkeypatch: pytest.MonkeyPatch, many: list[Request], order: Order, num_kinds: int
) -> None:
    costs: dict[int, list[float]] = {}
    for size in (100, 10_000, 100_000):
        rng = random.Random(0)
        accounts = Accounts({})
        requests = many[:size]
        for request in requests:
            request.priority = rng.randrange(num_kinds)
            request.tenant = str(request.priority)
            accounts.came(request)
        queues: list[WaitingQueue] = []

        def fill(
            order: Order = order,
            accounts: Accounts = accounts,
            requests: list[Request] = requests,
            queues: list[WaitingQueue] = queues,
        ) -> None:
            queues.append(WaitingQueue(lines_for(order, accounts)))
            for request in requests:
                queues[0].add(request)

        def step(queues: list[WaitingQueue] = queues, accounts: Accounts = accounts) -> None:
            for _ in range(20):  # eight slots, of which four come free at each step
                for request in queues[0].first(8)[:4]:
                    queues[0].remove(request)
                    accounts.of(request).add(prompt_tokens=10)

        def abort(queues: list[WaitingQueue] = queues, rng: random.Random = rng) -> None:
            rest = list(queues[0])
            for request in rng.sample(rest, len(rest) * 9 // 10):
                queues[0].remove(request)

        costs[size] = [
            _cost(fill, monkeypatch) / size,
            _cost(step, monkeypatch) / 20,
            _cost(abort, monkeypatch) / size,
        ]
    for size, figures in costs.items():
        for figure, least in zip(figures, costs[100], strict=True):
            assert figure <= 2 * least + 4, (size, costs)
