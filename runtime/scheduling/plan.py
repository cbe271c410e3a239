"""What a policy decides, and what a policy is."""

from typing import Protocol

import msgspec

from ..request.spec import SequenceKey
from .snapshot import Snapshot


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


class Policy(Protocol):
    """Decides what a step computes, from a snapshot alone.

    It keeps no reference to anything of the engine, so that the same object can drive a simulator.
    """

    name: str

    def plan(self, snapshot: Snapshot) -> Plan:
        """What the step shall do next.

        It is asked again in the same step whenever memory was found too short for a request, with
        that request as `short` and what was granted until then. It must then give up a slot, ask
        for less, or return an empty plan.
        """
        ...
