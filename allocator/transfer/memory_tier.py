"""A second cache, in host memory, that tokens are copied to and come back from.

It is a cache like the first, so prefixes are found, shared and given up there in the same way, and
a copy is one call a range. What it has of a sequence stays valid, since tokens only get more: the
next time only those behind them are copied.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ...vmem.errors import DriverError, InvalidOperation, Shortage
from ..exits import Exits
from ..page_pool import Owner
from ..slot import Slot
from ..slot_cache import SlotCache
from .copier import Copier, CopyJob
from .transfers import Incoming, Outgoing, TransferKey, Transfers

_MOST_ENDED = 64  # transfers of a process's own, of which nobody says anything twice


@dataclass(kw_only=True)
class MoveStats:
    """What was moved one way, so far.

    Attributes:
        num_moves: sequences of which tokens were copied; those that needed none are not counted.
        num_copies: calls that copied.
        num_bytes, num_tokens: that were copied.
        time_s: that the copying itself took.
        num_failed: moves that came to nothing: no memory, or an error.
    """

    num_moves: int = 0
    num_copies: int = 0
    num_bytes: int = 0
    num_tokens: int = 0
    time_s: float = 0.0
    num_failed: int = 0

    def count(self, job: CopyJob, num_tokens: int) -> None:
        """Add a copy that has ended well."""
        self.num_moves += 1
        self.num_copies += job.num_copies
        self.num_bytes += job.num_bytes
        self.num_tokens += num_tokens
        self.time_s += job.time_s


class Move:
    """Tokens on their way between two caches: a transfer's two sides, and the copy.

    Attributes:
        num_tokens: tokens that the receiver has in the end, from the first on.
        num_copied: those that are copied for it.
    """

    def __init__(self, outgoing: Outgoing, incoming: Incoming, job: CopyJob | None) -> None:
        self.outgoing = outgoing
        self.incoming = incoming
        self.job = job
        self.num_tokens = incoming.num_tokens
        self.num_copied = incoming.num_tokens - incoming.num_held

    @property
    def is_done(self) -> bool:
        """True once the copy has succeeded or failed."""
        return self.job is None or self.job.is_done

    @property
    def error(self) -> Exception | None:
        """Why it failed, if it did."""
        return None if self.job is None else self.job.error

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until it is done."""
        if self.job is not None:
            self.job.wait(timeout_s)

    def cancel(self) -> None:
        """Undo it: what the receiver had before stays with it."""
        if self.job is not None:
            self.job.cancel()
        self.incoming.abort()
        self.outgoing.abort()


class Store(Move):
    """Tokens on their way to the tier."""


class Fetch(Move):
    """Tokens on their way back."""


class MemoryTier:
    """Keeps what leaves `near` in `far`. For one thread at a time, beside the copier's.

    Args:
        near: the cache that requests compute in.
        far: the other, of the same token format.
        copier: does the copies.

    Attributes:
        stored, fetched: what was moved.
    """

    def __init__(self, near: SlotCache, far: SlotCache, copier: Copier) -> None:
        ours, theirs = near.geometry.token_format, far.geometry.token_format
        if ours.widths != theirs.widths or ours.dtype != theirs.dtype:
            raise InvalidOperation(f"tokens of {ours} cannot be kept as {theirs}")
        self.near = near
        self.far = far
        self.stored = MoveStats()
        self.fetched = MoveStats()
        self._copier = copier
        self._exits = Exits(near), Exits(far)
        # By direction, there and back: an end of its own for each, since names begin anew in each.
        self._outgoing = tuple(Transfers(end, most_ended=_MOST_ENDED) for end in (near, far))
        self._incoming = (
            Transfers(far, self._exits[1], most_ended=_MOST_ENDED),
            Transfers(near, self._exits[0], most_ended=_MOST_ENDED),
        )
        self._numbers = itertools.count()
        self._stores: list[tuple[str, Store, Sequence[int], str, bool]] = []
        self._kept: dict[str, Slot] = {}  # in `far`, pinned until its owner is back

    # -- there -------------------------------------------------------------------------------

    def store(
        self, name: str, slot: Slot, tokens: Sequence[int], variant: str = "", *, keep: bool
    ) -> Store | None:
        """Begin to copy what the tier lacks of `tokens`, which the near `slot` holds.

        The slot is pinned until then; its owner may let it go at once. With `keep` the tier holds
        them until `release(name)`, whatever else it needs memory for. None if it has no room.
        """
        num_tokens = len(tokens)
        key = TransferKey(f"{name} leaves {next(self._numbers)}", 0)
        try:
            incoming = self._incoming[0].receive(
                key, tokens, variant, owner=slot.owner, recycle=False
            )
        except (Shortage, DriverError):
            self.stored.num_failed += 1
            return None
        outgoing = self._outgoing[0].send(key, slot, num_tokens)
        store = Store(outgoing, incoming, self._copy(outgoing, incoming, (self.near, self.far)))
        self._stores.append((name, store, tokens, variant, keep))
        return store

    def has_room_to_copy(self, num_tokens: int) -> bool:
        """True if the copy of so many tokens would not wait behind too many others."""
        return self._copier.has_room(num_tokens * self.near.geometry.token_format.token_bytes)

    # -- and back ----------------------------------------------------------------------------

    def longest_prefix(self, tokens: Sequence[int], variant: str = "") -> int:
        """How many of `tokens`, from the first on, `fetch` would find."""
        return self.far.prefix_length(tokens, variant)

    def fetch(
        self,
        name: str,
        tokens: Sequence[int],
        variant: str = "",
        *,
        owner: Owner | None = None,
        num_reserved: int = 0,
    ) -> Fetch | None:
        """Begin to copy the longest prefix of `tokens` that the tier has into a near slot.

        The slot has memory for all that is copied, and a promise of it for `num_reserved` tokens.
        What is parked in the near cache already is not copied. None if the tier has nothing.
        `owner` is as of `SlotCache.adopt`.
        Raises a Shortage or DriverError, with nothing changed, if the near cache has no memory.
        """
        match = self.far.find(tokens, variant)
        if match is None:
            return None
        key = TransferKey(f"{name} comes back {next(self._numbers)}", 0)
        outgoing = self._outgoing[1].send(key, match.slot, match.num_tokens)
        try:
            incoming = self._incoming[1].receive(
                key,
                tokens[: match.num_tokens],
                variant,
                owner=owner,
                num_reserved=num_reserved,
            )
        except (Shortage, DriverError):
            outgoing.abort()
            raise
        return Fetch(outgoing, incoming, self._copy(outgoing, incoming, (self.near, self.far)))

    def arrive(self, fetch: Fetch) -> Slot | None:
        """The slot of a fetch that is done; None, with all undone, if it failed."""
        assert fetch.is_done
        if fetch.error is not None:
            self.fetched.num_failed += 1
            fetch.cancel()
            return None
        if fetch.job is not None:
            self.fetched.count(fetch.job, fetch.num_copied)
        fetch.incoming.commit()
        fetch.outgoing.commit()
        return fetch.incoming.claim()

    # -- both --------------------------------------------------------------------------------

    def settle(self) -> None:
        """End the stores that are done."""
        for exits in self._exits:
            exits.retry()
        done = [entry for entry in self._stores if entry[1].is_done]
        if done:
            ended = {entry[1] for entry in done}  # and not those that end meanwhile
            self._stores = [entry for entry in self._stores if entry[1] not in ended]
        for name, store, tokens, variant, keep in done:
            if store.error is not None:
                self.stored.num_failed += 1
                store.cancel()
                continue
            if store.job is not None:
                self.stored.count(store.job, store.num_copied)
            store.incoming.commit()
            store.outgoing.commit()
            slot = store.incoming.claim()
            assert slot is not None
            if keep:
                self._let_go(name)
                self.far.pin(slot, len(tokens))
                self._kept[name] = slot
            self._exits[1].let_go(slot, tokens, variant)

    @property
    def is_storing(self) -> bool:
        """True while near slots are pinned until they are copied."""
        return bool(self._stores)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the oldest store is done, and settle it."""
        if self._stores:
            self._stores[0][1].wait(timeout_s)
        self.settle()

    def release(self, name: str) -> None:
        """What `store(name, keep=True)` holds may go when the tier needs memory."""
        self._let_go(name)
        self._stores = [(*e[:4], e[4] and e[0] != name) for e in self._stores]

    def give_way(self) -> bool:
        """Memory is short here: what is held for anybody may go. False if nothing was held."""
        names = list(self._kept)
        for name in names:
            self._let_go(name)
        return bool(names)

    def _let_go(self, name: str) -> None:
        """Unpin what is there for `name`, but not what is on its way."""
        slot = self._kept.pop(name, None)
        if slot is not None:
            self.far.unpin(slot)

    def drop(self, tokens: Sequence[int], variant: str = "") -> None:
        """Give up the copy of `tokens`, unless it is kept for somebody."""
        match = self.far.find(tokens, variant)
        if match is not None and match.num_tokens == len(tokens):
            try:
                slot, _ = self.far.adopt(tokens, variant, recycle=False)
            except (Shortage, DriverError):  # then it stays until the tier needs its memory
                return
            self._exits[1].let_go(slot)

    def trim(self) -> int:
        """Give back what nobody waits for; returns the bytes."""
        while self._stores:
            self.wait()
        return self.far.trim()

    def forget(self) -> int:
        """Drop all that the tier has; returns the bytes that went back to the system."""
        for entry in self._stores:
            entry[1].cancel()
        self._stores.clear()
        for name in list(self._kept):
            self.release(name)
        return self.far.trim()

    def close(self) -> None:
        """End what is under way and give all back. Fetches must have been ended before."""
        self._copier.stop()
        self.forget()
        self.far.shutdown()

    def _copy(
        self, outgoing: Outgoing, incoming: Incoming, owners: tuple[object, ...]
    ) -> CopyJob | None:
        start, stop = incoming.num_held, incoming.num_tokens
        if start == stop:
            return None
        try:
            fence = self.near.pool.driver.record_fence()
            spans = outgoing.spans(start, stop), incoming.spans(start, stop)
            return self._copier.submit(CopyJob(*spans, after=fence, owners=owners))
        except BaseException:
            incoming.abort()
            outgoing.abort()
            raise
