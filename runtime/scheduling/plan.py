"""What a policy decides, and what a policy is."""

from collections.abc import Sequence
from typing import Literal, Protocol, Self

import msgspec

from ..request.spec import SequenceKey
from .snapshot import RunningRequest, Snapshot, WaitingRequest

LinesKind = Literal["arrival", "priority", "tenant"]
"""How those that wait are lined up: in one line, by priority, or in a line for each tenant."""


class Share(msgspec.Struct, frozen=True):
    """Tokens of a running request that shall go through the model in this step."""

    key: SequenceKey
    num_tokens: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A step, beside what earlier plans of it granted. Carried out in the order of the fields.

    Attributes:
        preempt: running requests that give their slots up, and are computed again later.
        shares: running requests that go on.
        admit: waiting requests that get slots, in this order, until `admit_tokens` are spent.
        admit_tokens: of all admitted ones together; each takes what it does not find computed.
        whole_prompts: an admitted request takes all its tokens in this step or waits. The first
            of a step may exceed the budget by that.
    """

    preempt: tuple[SequenceKey, ...] = ()
    shares: tuple[Share, ...] = ()
    admit: tuple[SequenceKey, ...] = ()
    admit_tokens: int = 0
    whole_prompts: bool = False

    def of_first(self, count: int) -> Self:
        """The same with so many newcomers. If they take others' places, those come in their
        order."""
        preempt = self.preempt[:count] if self.admit else self.preempt
        return msgspec.structs.replace(
            self,
            preempt=preempt,
            admit=self.admit[:count],
            admit_tokens=self.admit_tokens if count else 0,
        )


class Order(Protocol):
    """Decides who comes first and who gives way, from a snapshot alone. A part of a `Policy`.

    It keeps nothing between two questions.

    Attributes:
        name: as of `EngineConfig.scheduling_policy`.
        lines: how the scheduler is to line up those that wait, so that `Snapshot.waiting` shows
            those that this order may choose.
    """

    name: str
    lines: LinesKind

    def rank(self, priority: int, waited_s: float) -> float:
        """Where a waiting request of that age stands in line; the least comes first.

        Two requests must not change places as both grow older. For lines by priority.
        """
        ...

    def newcomers(self, snapshot: Snapshot, count: int) -> Sequence[WaitingRequest]:
        """Whom to give free slots to, `count` at most, in this order."""
        ...

    def ranked(self, running: Sequence[RunningRequest]) -> Sequence[RunningRequest]:
        """The order in which running requests get their tokens."""
        ...

    def goes_before(
        self, snapshot: Snapshot, newcomer: WaitingRequest, request: RunningRequest
    ) -> bool:
        """Whether a newcomer gets its tokens before the prompt of a running request does."""
        ...

    def loser(self, snapshot: Snapshot) -> RunningRequest:
        """Who gives its slot up where memory is too short for all that run, two at least."""
        ...

    def claims(self, snapshot: Snapshot) -> Sequence[tuple[WaitingRequest, RunningRequest]]:
        """Waiting requests that take a running one's place, and whose, in this order.

        Asked where no slot is free, or where no memory was found for a waiting request. Empty
        where nobody has a right to another's place.
        """
        ...


class Policy(Protocol):
    """Decides what a step computes, from a snapshot alone.

    It keeps no reference to anything of the engine, so that the same object can drive a simulator.

    Attributes:
        order: who comes first and who gives way. The policy itself says how they share a step.
    """

    name: str
    order: Order

    def __init__(self, order: Order | None = None) -> None: ...

    def plan(self, snapshot: Snapshot) -> Plan:
        """What the step shall do next.

        It is asked again in the same step whenever memory was found too short for a request, with
        that request as `short` and what was granted until then. It must then give up a slot, ask
        for less, or return an empty plan.
        """
        ...
