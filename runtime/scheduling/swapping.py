"""When keys and values leave for another tier of memory, and when they come back from there.

What a request has computed is copied when its slot is let go, preempted or finished; only what the
tier does not have yet. When a request is admitted of whose tokens the tier has more than the cache,
they are copied back if that is faster than computing them, by what both were measured to take.

Source: FastSwitch, arXiv:2411.18424; what it does block group by block group is one copy a range.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...allocator import Slot
from ...allocator.transfer import Fetch, MemoryTier
from ..request.request import Request

_LEAST_SAMPLE_TOKENS = 32  # of a step whose time says how fast prompts are computed
_MEMORY = 0.9  # share of the past in the next value of a rate


class Rate:
    """Amounts per second, recent ones counting most.

    Attributes:
        per_s: 0 before the first sample.
    """

    def __init__(self) -> None:
        self._amount = self._time_s = 0.0

    @property
    def per_s(self) -> float:
        return self._amount / self._time_s if self._time_s else 0.0

    def add(self, amount: float, time_s: float) -> None:
        """`amount` took `time_s`."""
        self._amount = _MEMORY * self._amount + amount
        self._time_s = _MEMORY * self._time_s + time_s


class StateKeeper(Protocol):
    """What else a model remembers of the tokens in a slot, besides keys and values."""

    def save_state(self, slot_index: int) -> Any:
        """A copy of it in host memory; None if the model keeps nothing else."""
        ...

    def load_state(self, slot_index: int, state: Any) -> None:
        """Put a copy into a slot's place."""
        ...


@dataclass(frozen=True)
class _Kept:
    """What a preempted request left beside its keys and values.

    Attributes:
        num_tokens: tokens that the state is of.
    """

    num_tokens: int
    state: Any


@dataclass
class Swapping:
    """Moves requests' keys and values between an engine's cache and a tier behind it.

    Attributes:
        tier: the other memory.
        states: saves what a hybrid remembers; without it, tokens are enough.
        keeps_state: a prefix is of use only with the state of exactly its tokens.
        asynchronous: copy beside the steps; else the engine waits for every copy.
        always: fetch whatever the tier has, without asking what computing it would take.
        keeps_finished: copy what finished requests leave, too.
        reuses: what was fetched stays in the tier, so that only what follows is copied next time.
        stall_s: that the engine waited for copies, so far.
        num_preempted, num_computed_instead: preempted requests that were copied, and fetches that
            would have taken longer than computing, so far.
    """

    tier: MemoryTier
    states: StateKeeper
    keeps_state: bool = False
    asynchronous: bool = True
    always: bool = False
    keeps_finished: bool = True
    reuses: bool = True
    stall_s: float = 0.0
    num_preempted: int = 0
    num_computed_instead: int = 0
    computing: Rate = field(default_factory=Rate)
    _states: dict[str, _Kept] = field(default_factory=dict)

    # -- there -------------------------------------------------------------------------------

    def leave(self, request: Request, slot: Slot, *, comes_back: bool) -> None:
        """Copy what `slot` has of a request that is about to let it go."""
        tokens = request.token_ids[: request.num_computed]
        if not tokens or not (comes_back or self._copies_finished(len(tokens))):
            return
        if not self.is_worthwhile(len(tokens)):
            return
        name = name_of(request)
        store = self.tier.store(name, slot, tokens, request.variant, keep=comes_back)
        if store is None:
            return
        self.num_preempted += comes_back
        if comes_back and self.keeps_state:
            self._states[name] = _Kept(len(tokens), self.states.save_state(slot.index))
        if not self.asynchronous:
            self.wait()

    def _copies_finished(self, num_tokens: int) -> bool:
        """Finished requests' copies may be left out, so they wait for no others."""
        return (
            self.keeps_finished and not self.keeps_state and self.tier.has_room_to_copy(num_tokens)
        )

    @property
    def is_leaving(self) -> bool:
        """True while memory of the cache is pinned until it has been copied."""
        return self.tier.is_storing

    # -- and back ----------------------------------------------------------------------------

    def fetch(
        self, request: Request, tokens: Sequence[int], num_near: int, num_reserved: int
    ) -> Fetch | None:
        """Begin to bring back what the tier has of `tokens` beyond the `num_near` that are here.

        None if it has no more, or if computing it is faster. Raises a Shortage or DriverError.
        """
        kept = self._states.get(name_of(request))
        if self.keeps_state:
            if kept is None:
                return None
            tokens = request.token_ids[: kept.num_tokens]
            while self.is_leaving:
                self.wait()
        num_far = self.tier.longest_prefix(tokens, request.variant)
        if self.keeps_state and num_far < len(tokens):
            return None
        more = num_far - num_near
        if more < self.tier.near.growth_tokens and not self.keeps_state:
            return None
        if not self.is_worthwhile(more):
            self.num_computed_instead += 1
            return None
        fetch = self.tier.fetch(
            name_of(request),
            tokens,
            request.variant,
            owner=request.spec.owner,
            num_reserved=num_reserved,
        )
        if fetch is not None and not self.asynchronous:
            self._wait_for(fetch)
        return fetch

    def arrive(self, request: Request, fetch: Fetch) -> Slot | None:
        """The slot with what was fetched; None, with all undone, if the copy failed."""
        slot = self.tier.arrive(fetch)
        if not self.reuses:
            self.tier.release(name_of(request))
            self.tier.drop(request.token_ids[: fetch.num_tokens], request.variant)
        kept = self._states.pop(name_of(request), None)
        if slot is not None and kept is not None:
            self.states.load_state(slot.index, kept.state)
        self.release(request)
        return slot

    def release(self, request: Request) -> None:
        """The request will not come back for what it left."""
        self._states.pop(name_of(request), None)
        self.tier.release(name_of(request))

    # -- both --------------------------------------------------------------------------------

    def is_worthwhile(self, num_tokens: int) -> bool:
        """True if copying `num_tokens` tokens takes less time than computing them.

        By measured rates; what was never measured is tried.
        """
        copying = self.tier.fetched if self.tier.fetched.time_s else self.tier.stored
        if self.always or self.keeps_state or not copying.time_s or not self.computing.per_s:
            return True
        token_bytes = self.tier.near.geometry.token_format.token_bytes
        copy_s = num_tokens * token_bytes * copying.time_s / copying.num_bytes
        return copy_s < num_tokens / self.computing.per_s

    def note_step(self, num_tokens: int, time_s: float) -> None:
        """Learn from a step how fast tokens are computed."""
        if num_tokens >= _LEAST_SAMPLE_TOKENS:
            self.computing.add(num_tokens, time_s)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until memory that is leaving has left."""
        start_s = time.perf_counter()
        self.tier.wait(timeout_s)
        self.stall_s += time.perf_counter() - start_s

    def _wait_for(self, fetch: Fetch) -> None:
        start_s = time.perf_counter()
        fetch.wait()
        self.stall_s += time.perf_counter() - start_s

    def trim(self) -> int:
        """Give back what no request waits for; returns the bytes."""
        return self.tier.trim()

    def close(self) -> None:
        """Give the tier back. No request may be left."""
        self._states.clear()
        self.tier.close()

    def forget(self) -> int:
        """Drop all that the tier has: the model changed. Returns the bytes that went back."""
        self._states.clear()
        return self.tier.forget()


def name_of(request: Request) -> str:
    """Names a request's sequence to the tier."""
    return f"{request.key[0]}/{request.key[1]}"
