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
        priority: the lower, the earlier.
        waited_s: from when it came to when it got its slot.
    """

    key: SequenceKey
    num_tokens: int
    num_uncomputed: int
    priority: int = 0
    waited_s: float = 0.0
    tenant: str = ""


class WaitingRequest(msgspec.Struct, frozen=True):
    """A request without a slot.

    Attributes:
        num_tokens: its tokens, of which some may be found in a slot.
        was_admitted: it had a slot before and lost it.
        priority: the lower, the earlier.
        waited_s: since it came.
    """

    key: SequenceKey
    num_tokens: int
    was_admitted: bool
    priority: int = 0
    waited_s: float = 0.0
    tenant: str = ""


class TenantShare(msgspec.Struct, frozen=True):
    """What a tenant got so far.

    Attributes:
        counter: its service over its weight, prompts under way included.
        weight: its part, compared with other tenants'.
        num_waiting: its requests in line.
    """

    counter: float
    weight: float
    num_waiting: int


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to decide on. Made anew for every plan, from counters.

    Attributes:
        running: in the order of admission.
        waiting: those of which the policy's order may choose, a few for each slot at most, and one
            at least: the first in line; by priority, also those whose own is best, where no slot
            is free; by tenant, the first of each whose counter is among the least, of as many as
            run where no slot is free. Requests that
            wait for a leader's prompt are not in line.
        num_waiting: all of them.
        granted: tokens that this step has already for running requests, in an earlier plan.
        short: the request that an earlier plan of this step found no memory for.
        num_preempted: slots given up in this step so far, or on their way out for a request that
            stands aside until then.
        pages_obtainable: pages that could be had, those of finished requests included.
        growth_tokens, growth_pages: tokens that a slot grows by at once, and pages of that.
        tenants: of the requests shown, where the order goes by tenant.
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
    growth_tokens: int = 1
    growth_pages: int = 1
    tenants: Mapping[str, TenantShare] = {}

    @property
    def budget(self) -> int:
        """Tokens that this step may still take."""
        return self.max_batch_tokens - sum(self.granted.values())

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return self.max_seqs - len(self.running)

    @property
    def is_short_of_a_running_one(self) -> bool:
        """True if it was a running request that no memory was found for."""
        return any(request.key == self.short for request in self.running)

    def num_pages(self, num_tokens: int) -> int:
        """Pages of a slot with so many tokens, about: as many as of whole growth steps."""
        return -(-num_tokens // self.growth_tokens) * self.growth_pages
