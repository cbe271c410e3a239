"""Steps under way: in one stage after the other, or several foreseen at once."""

from collections import deque
from collections.abc import Callable

from ...request.request import Request
from .costs import DecodeRun, StepCost, StepWork

NEVER = float("inf")
Items = list[tuple[Request, int]]
"""Requests of a step, and how many tokens of each are computed when it is over."""


class Flight:
    """A step under way, or several of the same decodes, one after the other.

    Attributes:
        num_steps: how many steps it is.
        run: what they take, if several.
        loans_s: as of `StepWork`, of each of several.
    """

    __slots__ = ("ends_s", "items", "loans_s", "num_steps", "run", "starts_s")

    def __init__(
        self,
        items: Items,
        starts_s: float,
        ends_s: float,
        num_steps: int = 1,
        run: DecodeRun | None = None,
        loans_s: float = 0.0,
    ) -> None:
        self.items = items
        self.starts_s = starts_s
        self.ends_s = ends_s
        self.num_steps = num_steps
        self.run = run
        self.loans_s = loans_s

    def num_done(self, now_s: float) -> int:
        """Steps that are over, the last one never included."""
        if self.run is None:
            return 0
        return self.run.num_done(now_s - self.starts_s, self.num_steps - 1)


class Pipeline:
    """The stages of an instance, each of which takes steps in their order.

    Args:
        slowdown: how many times as long a step takes that begins now; not of foreseen ones.

    Attributes:
        num_steps: begun so far, those foreseen included.
        busy_s: that the first stage computes, or did, until the last step begun is over there.
    """

    def __init__(self, cost: StepCost, slowdown: Callable[[], float] = lambda: 1.0) -> None:
        self.cost = cost
        self._slowdown = slowdown
        self.num_steps = 0
        self.busy_s = 0.0
        self._flights: deque[Flight] = deque()
        self._ends_s = [0.0] * cost.stages

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def free_s(self) -> float:
        """From when on the first stage can take a step."""
        return self._ends_s[0]

    @property
    def ends_s(self) -> float:
        """When the next flight is over."""
        return self._flights[0].ends_s if self._flights else NEVER

    @property
    def foreseen(self) -> Flight | None:
        """The flight of several steps, which is alone."""
        return self._flights[0] if self._flights and self._flights[0].run is not None else None

    def has(self, request: Request) -> bool:
        """Whether a request is in a step under way."""
        return any(other is request for flight in self._flights for other, _ in flight.items)

    def pop_over(self, now_s: float) -> Flight | None:
        """The next flight, if it is over."""
        return self._flights.popleft() if self.ends_s <= now_s else None

    def begin(self, items: Items, work: StepWork, now_s: float) -> None:
        """A step."""
        ends, (first_s, other_s) = self._ends_s, self.cost.stage_times(work)
        slowdown = self._slowdown()
        first_s, other_s = first_s * slowdown, other_s * slowdown
        ends[0] = max(ends[0], now_s) + first_s
        for stage in range(1, len(ends)):
            ends[stage] = max(ends[stage - 1], ends[stage]) + other_s
        self._flights.append(Flight(items, now_s, ends[-1]))
        self.num_steps += 1
        self.busy_s += first_s

    def foresee(self, items: Items, work: StepWork, num_steps: int, now_s: float) -> None:
        """Steps of the same decodes, of which `work` is the first, with nothing else under way."""
        assert not self._flights
        run = self.cost.decode_run(work)
        ends_s = now_s + run.time_s(num_steps)
        self._ends_s = [ends_s] * len(self._ends_s)
        self._flights.append(Flight(items, now_s, ends_s, num_steps, run, work.loans_s))
        self.num_steps += num_steps
        self.busy_s += ends_s - now_s

    def cut(self, num_done: int) -> None:
        """Of what was foreseen, leave the step that follows the first `num_done`."""
        flight = self._flights[0]
        assert flight.run is not None
        starts_s = flight.starts_s + flight.run.time_s(num_done)
        ends_s = flight.starts_s + flight.run.time_s(num_done + 1)
        items = [(request, request.num_computed) for request, _ in flight.items]
        self._flights[0] = Flight(items, starts_s, ends_s)
        context = sum(end for _, end in items)
        work = StepWork(num_decodes=len(items), context_tokens=context, loans_s=flight.loans_s)
        first_s, other_s = self.cost.stage_times(work)
        self._ends_s = [starts_s + first_s + other_s * n for n in range(len(self._ends_s))]
        self._ends_s[-1] = ends_s  # the same, but for rounding
        self.num_steps -= flight.num_steps - num_done - 1
        self.busy_s -= flight.ends_s - ends_s
