"""KV leaves a cache and arrives in another: reserved, copied, then committed or aborted.

    sender     send ────▶ PINNED ───── commit ──▶ COMMITTED    unpinned; its owner may close it
                             └──────── abort ───▶ ABORTED      unpinned, and still its owner's

    receiver   receive ─▶ RESERVED ─── commit ──▶ COMMITTED    kept for `claim`, or parked
                             └──────── abort ───▶ ABORTED      what it had before is parked

    verb            nothing known   under way     COMMITTED     ABORTED
    send, receive   begins          the same      the same      the same (begin a new epoch)
    extend          refused         more tokens   refused       refused
    lend, borrow    refused         pages         refused       refused
    commit          refused         commits       nothing       refused
    abort           nothing         aborts        nothing       nothing
    claim           None            None          the slot, once   None

Bytes are copied (`spans`), in as many stages as the tokens grow in (`extend`), or pages change
hands (`lend`, `borrow`): then a commit leaves the sender's slot empty, and without a commit both
are as before. Of pages on loan the sender's `abort` must be sure that the receiver did not commit.

A transfer is named by who moves and by an epoch, a number that grows with every attempt. So each
verb may be sent twice, or answered and the answer lost, and the state is the same. An epoch that
has been overtaken cannot begin again (InvalidOperation). Whoever has the slot decides what becomes
of it: until the sender's commit it is the only owner, and from the receiver's commit on it must not
compute. For how long a silent other side is waited for is theirs to say, too: once pages are lent,
a transfer that ended by itself would take back what the other may have.
"""

import enum
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from ...vmem import Fence
from ...vmem.errors import DriverError, InvalidOperation, Shortage
from ..exits import Exits
from ..movable_slots import Lent
from ..page_pool import Owner
from ..parcel import Parcel
from ..slot import Slot
from ..slot_cache import SlotCache

Spans = list[list[torch.Tensor]]
"""Bytes of some tokens: of each stream of the token format, the pieces that they lie in."""

_log = logging.getLogger(__name__)


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

    def __init__(self, cache: SlotCache, key: TransferKey, slot: Slot, num_tokens: int) -> None:
        self.key = key
        self.num_tokens = num_tokens
        self.state = TransferState.UNDER_WAY
        self._cache = cache
        self._held: Slot | None = slot  # until it has ended, for an end is remembered for long

    @property
    def _slot(self) -> Slot:
        assert self._held is not None, f"transfer {self.key} has ended"
        return self._held

    @property
    def slot_index(self) -> int:
        """Which slot of the cache it is, as long as the transfer is under way."""
        return self._slot.index

    def spans(self, start: int, stop: int) -> Spans:
        """The bytes of tokens `start … stop`; good until the transfer ends."""
        self._check_under_way()
        return self._cache.spans(self._slot, start, stop)

    def record_fence(self) -> Fence:
        """Mark the work launched so far, which the bytes may be read or written after."""
        return self._cache.pool.driver.record_fence()

    @property
    def cache(self) -> SlotCache:
        """The cache whose tokens they are."""
        return self._cache

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

    _is_lent = False

    def extend(self, num_tokens: int) -> None:
        """Pin the first `num_tokens` tokens (a total), if that are more than now.

        Raises InvalidOperation, with nothing changed, if the slot does not hold them.
        """
        self._check_under_way()
        if num_tokens > self.num_tokens:
            if self._is_lent:
                raise InvalidOperation(f"the pages of transfer {self.key} are lent already")
            self._cache.pin(self._slot, num_tokens)
            self._cache.unpin(self._slot)  # not the last pin, which stays as far as this one went
            self.num_tokens = num_tokens

    @property
    def is_lent(self) -> bool:
        """True while the receiver may have the pages themselves: a commit empties the slot."""
        return self._is_lent

    def lend(self) -> Lent:
        """Let the receiver have the pages themselves (`Loans.lend`); what was lent before is not.

        Nobody else may have pinned the slot. The descriptors are the caller's to close.
        """
        self._check_under_way()
        if self._is_lent:
            self._cache.loans.take_back(self._slot)
            self._is_lent = False
        lent = self._cache.loans.lend(self._slot, self.num_tokens)
        self._is_lent = True
        return lent

    def commit(self) -> None:
        """The receiver has them. Raises InvalidOperation if the transfer was aborted.

        Pages that were lent are gone: the slot is empty, and a live one its owner's to close.
        """
        if self._begin_commit():
            self._end(TransferState.COMMITTED)

    def abort(self) -> None:
        """Nothing moved."""
        if self.state is TransferState.UNDER_WAY:
            self._end(TransferState.ABORTED)

    def _end(self, state: TransferState) -> None:
        self.state = state
        try:
            if self._is_lent and state is TransferState.COMMITTED:
                self._cache.loans.leave(self._slot)
                return
            if self._is_lent:
                self._cache.loans.take_back(self._slot)
            self._cache.unpin(self._slot)
        except (Shortage, DriverError) as error:  # whoever ends a move is in the middle of a step
            _log.warning("%s was not unmapped, and will be reclaimed: %s", self._slot, error)
        finally:
            self._held = None


class Incoming(_Side):
    """Tokens that arrive, in a slot whose memory is there before the first byte is.

    Attributes:
        num_held: tokens that the slot had already: only those behind them need to be copied.
        by_pages: whether pages are to come, for which memory is reserved and none is mapped.
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
        by_pages: bool,
    ) -> None:
        super().__init__(cache, key, slot, len(tokens))
        self._exits = exits
        self.num_held = num_held
        self.by_pages = by_pages
        self._tokens = tokens
        self._variant = variant
        self._is_claimed = False
        self._num_borrowed: int | None = None  # tokens whose pages have come

    def extend(self, tokens: Sequence[int], *, num_reserved: int = 0) -> None:
        """Have memory for `tokens`, of which those known so far are the first, and the promise of
        it for `num_reserved`. Fewer than there are change nothing.

        Raises a Shortage or DriverError with no token more than before (what was promised
        meanwhile stays promised), InvalidOperation if the tokens are others.
        """
        self._check_under_way()
        common = min(len(tokens), self.num_tokens)
        if list(tokens[:common]) != list(self._tokens[:common]):
            raise InvalidOperation(f"transfer {self.key} is of other tokens; begin another")
        if len(tokens) <= self.num_tokens and not num_reserved:
            return
        if self._num_borrowed is not None:
            if len(tokens) > self._num_borrowed or num_reserved:
                raise InvalidOperation(f"the pages of transfer {self.key} have come already")
            self._tokens, self.num_tokens = tokens, len(tokens)
            return
        self._cache.reserve(self._slot, max(num_reserved, len(tokens)))
        if len(tokens) > self.num_tokens:
            if not self.by_pages:
                self._cache.grow(self._slot, len(tokens))
            self._tokens, self.num_tokens = tokens, len(tokens)

    def borrow(self, parcel: Parcel, descriptors: Sequence[int]) -> list[torch.Tensor]:
        """Map the pages that came (`Loans.borrow`); returns the bytes to be filled beside them.

        They may be of more tokens than are known yet, which `extend` then names.
        """
        self._check_under_way()
        has_come = self._num_borrowed is not None
        if not self.by_pages or has_come or parcel.num_tokens < self.num_tokens:
            raise InvalidOperation(
                f"pages of {parcel.num_tokens} tokens are not what transfer {self.key} waits for"
            )
        copied = self._cache.loans.borrow(self._slot, parcel, descriptors)
        self._num_borrowed = parcel.num_tokens
        return copied

    def make_room(self, num_tokens: int) -> None:
        """Have memory for the bytes of the first `num_tokens` tokens, in all, known or not; where
        pages are to come the promise of it.

        Raises a Shortage or DriverError, with nothing changed.
        """
        self._check_under_way()
        if self.by_pages:
            self._cache.reserve(self._slot, num_tokens)
        else:
            self._cache.grow(self._slot, num_tokens)

    def commit(self) -> None:
        """All bytes are there. Raises InvalidOperation if the transfer was aborted."""
        if self._begin_commit():
            if self._num_borrowed is not None:
                if self._num_borrowed != self.num_tokens:
                    raise InvalidOperation(
                        f"pages of {self._num_borrowed} tokens came for transfer {self.key}, of "
                        f"which {self.num_tokens} are known; name them all"
                    )
                self._cache.loans.keep(self._slot)
            elif self.by_pages:
                raise InvalidOperation(f"the pages of transfer {self.key} have not come")
            self.state = TransferState.COMMITTED

    def abort(self) -> None:
        """Nothing arrived: what the slot had before is parked, the rest given back."""
        if self.state is TransferState.UNDER_WAY:
            self.state = TransferState.ABORTED
            tokens, self._tokens = self._tokens[: self.num_held], ()
            slot, self._held = self._slot, None
            self._exits.let_go(slot, tokens, self._variant)

    def claim(self) -> Slot | None:
        """The slot, for the request that the tokens are of; None if it is not to be had."""
        if self.state is not TransferState.COMMITTED or self._is_claimed:
            return None
        self._is_claimed = True
        self._tokens = ()
        slot, self._held = self._slot, None
        return slot

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
        most_ended: transfers whose end is remembered, for verbs that come twice.
    """

    def __init__(
        self, cache: SlotCache, exits: Exits | None = None, *, most_ended: int = 4096
    ) -> None:
        self.cache = cache
        self._most_ended = most_ended
        self.exits = exits or Exits(cache)
        self._outgoing: OrderedDict[str, Outgoing] = OrderedDict()
        self._incoming: OrderedDict[str, Incoming] = OrderedDict()

    def send(self, key: TransferKey, slot: Slot, num_tokens: int) -> Outgoing:
        """Pin the first `num_tokens` tokens of a live or parked slot, to be copied elsewhere.

        Raises InvalidOperation if the epoch was overtaken.
        """

        def begin() -> Outgoing:
            self.cache.pin(slot, num_tokens)
            return Outgoing(self.cache, key, slot, num_tokens)

        return self._begin(self._outgoing, key, begin)

    def receive(
        self,
        key: TransferKey,
        tokens: Sequence[int],
        variant: str = "",
        *,
        owner: Owner | None = None,
        num_reserved: int = 0,
        recycle: bool = True,
        by_pages: bool = False,
    ) -> Incoming:
        """A slot for `tokens` to arrive in, with memory for all of them, and the promise of it for
        `num_reserved`; it may have some of them already. With `by_pages` it has none of them, and
        memory is promised only: it comes with the pages.

        Raises a Shortage or DriverError, with nothing changed, or InvalidOperation if the epoch
        was overtaken. `owner` and `recycle` are as of `SlotCache.adopt`.
        """

        def begin() -> Incoming:
            if by_pages:
                slot, num_held = self.cache.open(variant if owner is None else owner), 0
            else:
                slot, num_held = self.cache.adopt(tokens, variant, owner=owner, recycle=recycle)
            incoming = Incoming(
                self.cache, self.exits, key, slot, tokens, variant, num_held, by_pages
            )
            try:
                self.cache.reserve(slot, max(num_reserved, len(tokens)))
                if not by_pages:
                    self.cache.grow(slot, len(tokens))
            except (Shortage, DriverError):
                incoming.abort()
                raise
            return incoming

        return self._begin(self._incoming, key, begin)

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

    def _forget(self, known: OrderedDict[str, AnySide]) -> None:
        """Drop the oldest that have ended; those under way are few, and stay."""
        if len(known) > self._most_ended:
            for name, side in list(known.items())[: len(known) - self._most_ended // 2]:
                if side.state is not TransferState.UNDER_WAY:
                    del known[name]
