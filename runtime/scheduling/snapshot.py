"""The state of an engine as a policy sees it: plain numbers, no tensors, no slots."""

from collections.abc import Mapping

import msgspec

from ..request.spec import SequenceKey


class RunningRequest(msgspec.Struct, frozen=True):
    """A request with a slot.

    Attributes:
        num_tokens: its tokens, prompt and output.
        num_uncomputed: those still to go through the model; 1 while it decodes, 0 if its
            last is under way.
    """

    key: SequenceKey
    num_tokens: int
    num_uncomputed: int


class WaitingRequest(msgspec.Struct, frozen=True):
    """A request without a slot.

    Attributes:
        num_tokens: its tokens, of which some may be found in a slot.
        was_admitted: it had a slot before and lost it.
    """

    key: SequenceKey
    num_tokens: int
    was_admitted: bool


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to decide on. Made anew for every plan, from counters.

    Attributes:
        running: in the order of admission.
        waiting: the first in line, as many as there are slots for, and one at least. Requests
            that wait for a leader's prompt are not in line.
        num_waiting: all of them.
        granted: tokens that this step has already for running requests, in an earlier plan.
        short: the request that an earlier plan of this step found no memory for.
        num_preempted: slots given up in this step so far, or on their way out for a request that
            stands aside until then.
        pages_obtainable: pages that could be had, those of finished requests included.
    """

    max_batch_tokens: int
    max_seqs: int
    running: tuple[RunningRequest, ...]
    waiting: tuple[WaitingRequest, ...]
    num_waiting: int
    granted: Mapping[SequenceKey, int]
    short: SequenceKey | None
    num_preempted: int
    pages_obtainable: int

    @property
    def budget(self) -> int:
        """Tokens that this step may still take."""
        return self.max_batch_tokens - sum(self.granted.values())

    @property
    def is_short_of_a_running_one(self) -> bool:
        """True if it was a running request that no memory was found for."""
        return any(request.key == self.short for request in self.running)
