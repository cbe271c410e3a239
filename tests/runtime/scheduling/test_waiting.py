"""The line of requests: its order, and what its operations cost however long it is."""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from vkv import SamplingParams
from vkv.runtime.request.request import Request
from vkv.runtime.request.sampling_state import SamplingState
from vkv.runtime.request.spec import RequestSpec
from vkv.runtime.scheduling import waiting
from vkv.runtime.scheduling.waiting import WaitingQueue

_PARAMS = SamplingParams()


def _request(name: int, index: int = 0) -> Request:
    spec = RequestSpec(request_id=str(name), prompt_token_ids=[1], params=_PARAMS)
    return Request(spec, max_tokens=1, sampling=SamplingState(_PARAMS, [1]), index=index)


class _Model:
    """The same, as slow and as plain as can be."""

    def __init__(self) -> None:
        self.line: list[Request] = []
        self.held: list[tuple[Request, Any, int]] = []  # with leader, and place among arrivals
        self.arrivals: list[Request] = []

    def first(self, count: int) -> list[Request]:
        return self.line[:count]

    def let_in(self, leader: Any) -> None:
        for request, awaited, place in list(self.held):
            if awaited == leader:
                self.held.remove((request, awaited, place))
                later = [
                    i for i, other in enumerate(self.line) if other in self.arrivals[place + 1 :]
                ]
                self.line.insert(later[0] if later else len(self.line), request)

    def remove(self, request: Request) -> None:
        if request in self.line:
            self.line.remove(request)
        self.held = [entry for entry in self.held if entry[0] is not request]


@pytest.mark.parametrize("seed", range(30))
def test_the_order_is_that_of_a_plain_list(seed: int) -> None:
    rng = random.Random(seed)
    queue, model = WaitingQueue(), _Model()
    out: list[Request] = []  # that have slots
    leaders = [_request(-n - 1) for n in range(3)]
    for name in range(300):
        action = rng.random()
        everyone = [*model.line, *(entry[0] for entry in model.held)]
        if action < 0.35:
            request = _request(name)
            queue.add(request)
            model.arrivals.append(request)
            model.line.append(request)
        elif action < 0.45:
            request, leader = _request(name), rng.choice(leaders).key
            queue.hold(request, leader)
            model.held.append((request, leader, len(model.arrivals)))
            model.arrivals.append(request)
        elif action < 0.55:
            leader = rng.choice(leaders).key
            queue.let_in(leader)
            model.let_in(leader)
            assert not queue.is_awaited(leader)
        elif action < 0.75 and model.line:
            request = model.line[0]
            queue.remove(request)
            model.remove(request)
            out.append(request)
        elif action < 0.85 and out:
            request = out.pop(rng.randrange(len(out)))
            model.arrivals.remove(request)  # it has lost that place
            model.arrivals.insert(0, request)
            model.held = [(r, leader, place + 0) for r, leader, place in model.held]
            queue.put_back(request)
            model.line.insert(0, request)
        elif everyone:
            request = rng.choice(everyone)
            queue.remove(request)
            model.remove(request)
        assert len(queue) == len(model.line) + len(model.held)
        count = rng.randrange(1, 9)
        assert queue.first(count) == model.first(count)
    assert not set(out) & set(queue)


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


# -- what it costs -------------------------------------------------------------------------------


class _Counted(dict[Request, tuple[int, int]]):
    """The places of a queue, which counts the looks at them."""

    looks = 0

    def get(self, key: Request, default: Any = None) -> Any:
        _Counted.looks += 1
        return super().get(key, default)


def _cost(queue: WaitingQueue, work: Callable[[], object], patched: pytest.MonkeyPatch) -> int:
    """Entries that `work` looks at, pushes and pops."""
    counts: Counter[str] = Counter()
    _Counted.looks = 0
    queue._places = _Counted(queue._places)

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(heapq, name)

        def call(*args: Any) -> Any:
            counts[name] += len(args[0]) if name == "heapify" else 1
            return function(*args)

        return call

    with patched.context() as context:
        for name in ("heappush", "heappop", "heapify"):
            context.setattr(waiting.heapq, name, counting(name))
        work()
    return _Counted.looks + counts.total()


def test_a_hundred_thousand_in_line_cost_each_what_a_hundred_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costs: dict[int, list[float]] = {}
    for size in (100, 10_000, 100_000):
        queue, rng = WaitingQueue(), random.Random(0)
        requests = [_request(name) for name in range(size)]

        def fill(queue: WaitingQueue = queue, requests: list[Request] = requests) -> None:
            for request in requests:
                queue.add(request)

        def step(queue: WaitingQueue = queue) -> None:
            for _ in range(20):  # eight slots, of which four come free at each step
                for request in queue.first(8)[:4]:
                    queue.remove(request)

        def abort(queue: WaitingQueue = queue, rng: random.Random = rng) -> None:
            rest = list(queue)
            for request in rng.sample(rest, len(rest) * 9 // 10):
                queue.remove(request)

        costs[size] = [
            _cost(queue, fill, monkeypatch) / size,
            _cost(queue, step, monkeypatch) / 20,
            _cost(queue, abort, monkeypatch) / size,
        ]
    for size, figures in costs.items():
        for figure, least in zip(figures, costs[100], strict=True):
            assert figure <= 2 * least + 4, (size, costs)
