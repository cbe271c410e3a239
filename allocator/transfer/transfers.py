"""KV leaves a cache and arrives in another: reserved, copied, then committed or aborted.

    sender     send ────▶ PINNED ───── commit ──▶ COMMITTED    unpinned; its owner may close it
                             └─ abort, lease over ──▶ ABORTED  unpinned, and still its owner's

    receiver   receive ─▶ RESERVED ─── commit ──▶ COMMITTED    kept for `claim`, parked without it
                             └─ abort, lease over ──▶ ABORTED  what it had before is parked

    verb            nothing known   under way     COMMITTED     ABORTED
    send, receive   begins          the same      the same      the same (begin a new epoch)
    commit          refused         commits       nothing       refused
    abort           nothing         aborts        nothing       nothing
    claim           None            None          the slot, once   None

A transfer is named by who moves and by an epoch, a number that grows with every attempt. So each
verb may be sent twice, or answered and the answer lost, and the state is the same. An epoch that
has been overtaken cannot begin again (InvalidOperation). Whoever has the slot decides what becomes
of it: until the sender's commit it is the only owner, and from the receiver's commit on it must not
compute.
"""

import enum
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from ...vmem import Fence
from ...vmem.errors import DriverError, InvalidOperation, Shortage
from ..exits import Exits
from ..slot import Slot
from ..slot_cache import SlotCache

Spans = list[list[torch.Tensor]]
"""Bytes of some tokens: of each stream of the token format, the pieces that they lie in."""

_log = logging.getLogger(__name__)

_MOST_ENDED = 4096  # transfers whose end is remembered, for verbs that come twice


class TransferKey(NamedTuple):
    """Names one attempt to move one sequence.

    Attributes:
        name: whose tokens they are.
        epoch: which attempt; later ones are greater.
    """

    name: str
    epoch: int


class TransferState(enum.Enum):
    """Where a transfer is in its life, on one of its sides."""

    UNDER_WAY = "under way"
    COMMITTED = "committed"
    ABORTED = "aborted"


class _Side:
    """What both ends of a transfer have.

    Attributes:
        key: names it.
        num_tokens: tokens that move, from the first on.
        state: where it is.
    """

    def __init__(
        self, cache: SlotCache, key: TransferKey, slot: Slot, num_tokens: int, lease_s: float | None
    ) -> None:
        self.key = key
        self.num_tokens = num_tokens
        self.state = TransferState.UNDER_WAY
        self.lease_s = lease_s
        self._cache = cache
        self._slot = slot
        self.renew()

    def renew(self) -> None:
        """Begin the lease anew: the other side has shown that it lives."""
        self._ends_s = None if self.lease_s is None else time.monotonic() + self.lease_s

    def is_over(self, now_s: float) -> bool:
        """True if its lease has run out."""
        return self._ends_s is not None and now_s > self._ends_s

    def spans(self, start: int, stop: int) -> Spans:
        """The bytes of tokens `start … stop`; good until the transfer ends."""
        self._check_under_way()
        return self._cache.spans(self._slot, start, stop)

    def fence(self) -> Fence:
        """What must be over on the device before those bytes are read or written."""
        return self._cache.pool.driver.record_fence()

    def _check_under_way(self) -> None:
        if self.state is not TransferState.UNDER_WAY:
            raise InvalidOperation(f"transfer {self.key} is {self.state.value}; begin another")

    def _begin_commit(self) -> bool:
        """False if it is committed already. Raises InvalidOperation if it cannot be any more."""
        if self.state is TransferState.ABORTED:
            raise InvalidOperation(f"transfer {self.key} was aborted; begin another")
        return self.state is TransferState.UNDER_WAY


class Outgoing(_Side):
    """Tokens that leave: pinned, so that their bytes stay as they are until the end."""

    def extend(self, num_tokens: int) -> None:
        """Let the first `num_tokens` tokens move, in all: the slot has got more meanwhile.

        Raises InvalidOperation if the transfer has ended, or if the slot has fewer.
        """
        self._check_under_way()
        if num_tokens > self.num_tokens:
            self._cache.pin(self._slot, num_tokens)
            self._cache.unpin(self._slot)  # pins are counted, and keep the most tokens
            self.num_tokens = num_tokens

    def commit(self) -> None:
        """The receiver has them. Raises InvalidOperation if the transfer was aborted."""
        if self._begin_commit():
            self._end(TransferState.COMMITTED)

    def abort(self) -> None:
        """Nothing moved."""
        if self.state is TransferState.UNDER_WAY:
            self._end(TransferState.ABORTED)

    def _end(self, state: TransferState) -> None:
        self.state = state
        try:
            self._cache.unpin(self._slot)
        except (Shortage, DriverError) as error:  # whoever ends a move is in the middle of a step
            _log.warning("%s was not unmapped, and will be reclaimed: %s", self._slot, error)


class Incoming(_Side):
    """Tokens that arrive, in a slot whose memory is there before the first byte is.

    Attributes:
        num_held: tokens that the slot had already: only those behind them need to be copied.
    """

    def __init__(
        self,
        cache: SlotCache,
        exits: Exits,
        key: TransferKey,
        slot: Slot,
        tokens: Sequence[int],
        variant: str,
        num_held: int,
        lease_s: float | None,
    ) -> None:
        super().__init__(cache, key, slot, len(tokens), lease_s)
        self._exits = exits
        self.num_held = num_held
        self._tokens = tokens
        self._variant = variant
        self._is_claimed = False

    def make_room(self, num_tokens: int) -> None:
        """Have memory for the bytes of the first `num_tokens` tokens, in all, known or not.

        Raises a Shortage or DriverError, with nothing changed.
        """
        self._check_under_way()
        self._cache.grow(self._slot, num_tokens)

    def extend(self, tokens: Sequence[int], num_reserved: int = 0) -> None:
        """Let `tokens` arrive, in all: those that were named and further ones behind them.

        With memory for them and the promise of it for `num_reserved`. Raises a Shortage or
        DriverError, with nothing changed.
        """
        self._check_under_way()
        self._cache.reserve(self._slot, max(num_reserved, len(tokens)))
        self._cache.grow(self._slot, len(tokens))
        self._tokens = tokens
        self.num_tokens = len(tokens)

    def commit(self) -> None:
        """All bytes are there. Raises InvalidOperation if the transfer was aborted."""
        if self._begin_commit():
            self.state = TransferState.COMMITTED

    def abort(self) -> None:
        """Nothing arrived: what the slot had before is parked, the rest given back."""
        if self.state is TransferState.UNDER_WAY:
            self.state = TransferState.ABORTED
            tokens, self._tokens = self._tokens[: self.num_held], ()
            self._exits.let_go(self._slot, tokens, self._variant)

    def claim(self) -> Slot | None:
        """The slot, for the request that the tokens are of; None if it is not to be had."""
        if self.state is not TransferState.COMMITTED or self._is_claimed:
            return None
        self._is_claimed = True
        self._tokens = ()
        return self._slot

    def park(self) -> None:
        """Leave what was committed to whoever asks for such tokens first."""
        tokens = self._tokens
        if (slot := self.claim()) is not None:
            self._exits.let_go(slot, tokens, self._variant)


AnySide = TypeVar("AnySide", Outgoing, Incoming)


class Transfers:
    """The transfers that a cache is an end of, by key. For one thread at a time.

    Args:
        cache: whose slots they are.
        exits: how slots are let go; None for an own one.
    """

    def __init__(self, cache: SlotCache, exits: Exits | None = None) -> None:
        self.cache = cache
        self.exits = exits or Exits(cache)
        self._outgoing: OrderedDict[str, Outgoing] = OrderedDict()
        self._incoming: OrderedDict[str, Incoming] = OrderedDict()

    def send(
        self, key: TransferKey, slot: Slot, num_tokens: int, *, lease_s: float | None = None
    ) -> Outgoing:
        """Pin the first `num_tokens` tokens of a live or parked slot, to be copied elsewhere.

        `lease_s` is how long the other side may be silent; None for one in this process, which
        cannot die alone. Raises InvalidOperation if the epoch was overtaken.
        """

        def begin() -> Outgoing:
            self.cache.pin(slot, num_tokens)
            return Outgoing(self.cache, key, slot, num_tokens, lease_s)

        return self._begin(self._outgoing, key, begin)

    def receive(
        self,
        key: TransferKey,
        tokens: Sequence[int],
        variant: str = "",
        *,
        num_reserved: int = 0,
        recycle: bool = True,
        lease_s: float | None = None,
    ) -> Incoming:
        """A slot for `tokens` to arrive in, with memory for all of them, and the promise of it for
        `num_reserved`; it may have some of them already.

        Raises a Shortage or DriverError, with nothing changed, or InvalidOperation if the epoch
        was overtaken. `recycle` is as of `SlotCache.adopt`.
        """

        def begin() -> Incoming:
            slot, num_held = self.cache.adopt(tokens, variant, recycle=recycle)
            incoming = Incoming(
                self.cache, self.exits, key, slot, tokens, variant, num_held, lease_s
            )
            try:
                self.cache.reserve(slot, max(num_reserved, len(tokens)))
                self.cache.grow(slot, len(tokens))
            except (Shortage, DriverError):
                incoming.abort()
                raise
            return incoming

        return self._begin(self._incoming, key, begin)

    def expire(self) -> int:
        """Abort what is under way beyond its lease, park what nobody claimed; returns how many."""
        now_s, num_ended = time.monotonic(), 0
        for side in (*self._outgoing.values(), *self._incoming.values()):
            if side.is_over(now_s):
                if side.state is TransferState.UNDER_WAY:
                    side.abort()
                    num_ended += 1
                elif isinstance(side, Incoming):
                    side.park()
        return num_ended

    def abort_all(self) -> None:
        """Abort all that is under way, and park what was not claimed."""
        for side in (*self._outgoing.values(), *self._incoming.values()):
            side.abort()
            if isinstance(side, Incoming):
                side.park()

    @property
    def num_under_way(self) -> int:
        """Transfers that have not ended."""
        sides = (*self._outgoing.values(), *self._incoming.values())
        return sum(side.state is TransferState.UNDER_WAY for side in sides)

    def _begin(
        self, known: OrderedDict[str, AnySide], key: TransferKey, begin: Callable[[], AnySide]
    ) -> AnySide:
        before = known.get(key.name)
        if before is not None:
            if before.key.epoch == key.epoch:
                return before
            if before.key.epoch > key.epoch:
                raise InvalidOperation(f"transfer {key} was overtaken by {before.key}")
            if before.state is TransferState.UNDER_WAY:
                raise InvalidOperation(f"transfer {before.key} is under way; end it before {key}")
        side = begin()
        known[key.name] = side
        known.move_to_end(key.name)
        self._forget(known)
        return side

    @staticmethod
    def _forget(known: OrderedDict[str, AnySide]) -> None:
        """Drop the oldest that have ended; those under way are few, and stay."""
        if len(known) > _MOST_ENDED:
            for name, side in list(known.items())[: _MOST_ENDED // 2]:
                if side.state is not TransferState.UNDER_WAY:
                    del known[name]
