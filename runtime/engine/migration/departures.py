"""Sequences that leave an engine: exposed while they run, taken out, then released or brought back.

    begin ─▶ EXPOSED ── depart ──▶ AWAY ── release ──▶ ENDED   another engine has it
                │                    └──── go_on ────▶ ENDED   it goes on here
                └─ go_on, or by itself ──────────────▶ ENDED   it goes on here, or is finished

    verb       nothing known   EXPOSED    AWAY       ENDED      a later epoch is known
    begin      begins          the same   the same   refused    refused
    depart     refused         departs    the same   refused    refused
    go_on      noted           ends       ends       nothing    refused
    release    refused         refused    ends       nothing    refused

So each verb may come twice, late, or be answered and the answer lost. `begin` of a later epoch ends
an exposure that nobody drives any more; what is away can only be released or brought back.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ....allocator import Slot
from ....allocator.transfer import Outgoing, Transfers
from ....vmem.errors import InvalidOperation, SequenceGone
from ...request.continuation import Continuation
from ...request.request import Request, RequestState
from ...request.spec import SequenceKey
from ..engine import Engine
from ..memory.memory_map import MovingSlots
from ..messages import Abort, Finish, SetPriority
from .moves import Move, Moves


class DepartureState(enum.Enum):
    """Where a departure is in its life."""

    EXPOSED = "exposed"  # the sequence goes on here, and what it has computed can be read
    AWAY = "away"  # it goes on nowhere until it is released or brought back
    ENDED = "ended"


class Reading(Protocol):
    """Somebody who reads what is exposed."""

    def cancel(self) -> None:
        """Stop, and return once nothing is read any more."""
        ...


class Departure(Move):
    """One attempt of one sequence to leave.

    Attributes:
        state: where it is.
        request, slot: whose it is; None once that is the request's own affair, or nobody's.
        outgoing: its computed tokens, pinned; None where it has none, or has lost them.
        continuation: what goes on elsewhere; None unless it is away.
        model_state: what a hybrid remembers beside keys and values, of exactly the tokens of
            `outgoing`; None unless it is away, and of other models.
        reading: who reads `outgoing`; stopped before that ends.
        why: it ended.
        is_here: with `ENDED`: the sequence goes on in this engine.
    """

    def __init__(
        self,
        key: SequenceKey,
        epoch: int,
        request: Request | None = None,
        lease_s: float | None = None,
    ) -> None:
        super().__init__(key, epoch, lease_s)
        self.state = DepartureState.ENDED if request is None else DepartureState.EXPOSED
        self.request = request
        self.slot: Slot | None = None if request is None else request.slot
        self.outgoing: Outgoing | None = None
        self.continuation: Continuation | None = None
        self.model_state: Any = None
        self.reading: Reading | None = None
        self.why = ""
        self.is_here = False

    @property
    def num_ready(self) -> int:
        """Tokens that could move now: those whose keys and values are computed."""
        if self.state is DepartureState.EXPOSED and self.slot is not None:
            assert self.request is not None
            return self.request.num_computed
        return 0 if self.outgoing is None else self.outgoing.num_tokens

    @property
    def why_over(self) -> str | None:
        """Why an exposure has no reason to go on; None if it has."""
        request = self.request
        if self.state is not DepartureState.EXPOSED or request is None:
            return None
        if request.is_finished:
            return "it has finished"
        if request.slot is not self.slot or request.fetch is not None:
            return "it got a slot" if self.slot is None else "it gave its slot up to others"
        if request.is_spread:
            return "it outgrew the pool"
        return None

    def leave(self) -> bool:
        """Stop who reads, then unpin. Pages that were lent are left to the target, which may go on
        with them though nobody has said so here yet; True if they were: none is left then."""
        reading, self.reading = self.reading, None
        if reading is not None:
            reading.cancel()
        was_lent = self.outgoing is not None and self.outgoing.is_lent
        self.stop_reading(has_moved=was_lent)
        return was_lent

    def stop_reading(self, *, has_moved: bool = False) -> None:
        """Stop who reads, then unpin."""
        reading, self.reading = self.reading, None
        outgoing, self.outgoing = self.outgoing, None
        if reading is not None:
            reading.cancel()
        if outgoing is not None and has_moved:
            outgoing.commit()
        elif outgoing is not None:
            outgoing.abort()


class Departures:
    """The sequences that leave an engine. For the engine's driver alone, between steps.

    A departure ends by itself when its request finishes, is aborted, or loses its slot; when the
    model changes; and when its lease runs out before it is away. From then on only who had it
    depart can say who owns it, so it waits: its keys and values may go, its tokens stay.

    Args:
        engine: that they leave.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._transfers = Transfers(engine.cache, engine.scheduler.exits)
        self._keepers = [self._transfers]  # where a waiting request's keys and values may be
        swapping = self._scheduler.tiers.swapping
        if swapping is not None:
            self._keepers.append(Transfers(swapping.tier.far))
        self._moves: Moves[Departure] = Moves()
        self._scheduler.tiers.guests.append(self)

    @property
    def num_under_way(self) -> int:
        """Departures that have not ended."""
        return len(self._moves)

    def slots(self) -> MovingSlots:
        """Those of sequences that have stopped, by index."""
        return {
            departure.outgoing.slot_index: ("leaving", departure.key)
            for departure in self._moves
            if departure.state is DepartureState.AWAY and departure.outgoing is not None
        }

    # -- the verbs ---------------------------------------------------------------------------

    def begin(self, key: SequenceKey, epoch: int, *, lease_s: float | None = None) -> Departure:
        """Expose what a sequence has computed, while it goes on.

        Of one that waits, that is what is parked of it, or in the tier of memory, if it spares a
        page of computing.

        `lease_s` is how long who asks may be silent; None for one that cannot die alone. Raises
        SequenceGone if there is no such sequence, InvalidOperation if it cannot leave now, or if
        the epoch was overtaken or has ended.
        """
        before = self._moves.get(key)
        if before is not None:
            before.renew()
            if before.epoch == epoch and before.state is not DepartureState.ENDED:
                return before
            if before.epoch == epoch:
                raise InvalidOperation(
                    f"epoch {epoch} of {key} has ended: {before.why}; begin a later one"
                )
            if before.epoch > epoch:
                raise InvalidOperation(f"{key} had epoch {before.epoch}; begin a later one")
            if before.state is DepartureState.AWAY:
                raise InvalidOperation(f"{key} is away since epoch {before.epoch}; end that first")
            self._end(before, "a later epoch has begun", is_here=True)
        request = self._engine.find(key)
        if request is None:
            raise SequenceGone(f"output {key[1]} of request {key[0]!r} is not unfinished here")
        if request.fetch is not None:
            raise InvalidOperation(
                f"the keys and values of {request} are on their way back from memory; ask again"
            )
        if request.is_spread:
            raise InvalidOperation(
                f"{request} is longer than the pool, and not all of it is here; let it end here"
            )
        departure = Departure(key, epoch, request, lease_s)
        self._expose(departure, request)
        self._moves.note(departure, is_under_way=True)
        return departure

    def check(self, key: SequenceKey, epoch: int) -> Departure:
        """The departure, if it has not ended. Raises as `depart`."""
        departure = self._moves.get(key)
        if departure is None or departure.epoch != epoch:
            raise InvalidOperation(f"epoch {epoch} of {key} is not known here; begin it")
        self._end_if_over(departure)
        if departure.state is DepartureState.ENDED:
            kind = InvalidOperation if departure.is_here else SequenceGone
            raise kind(f"epoch {epoch} of {key} has ended: {departure.why}; begin a later one")
        return departure

    def extend(self, key: SequenceKey, epoch: int) -> Departure:
        """Expose what was computed since then, too. Raises as `depart`."""
        departure = self.check(key, epoch)
        departure.renew()
        if departure.state is DepartureState.EXPOSED and departure.outgoing is not None:
            departure.outgoing.extend(departure.num_ready)
        return departure

    def depart(self, key: SequenceKey, epoch: int) -> Departure:
        """Take a sequence out of its engine: it has a continuation from now on, and runs no more.

        Raises SequenceGone if it has finished, InvalidOperation if the departure has ended
        otherwise or was never begun.
        """
        departure = self.check(key, epoch)
        departure.renew()
        if departure.state is DepartureState.AWAY:
            return departure
        self._engine.catch_up()
        self.check(key, epoch)  # that step may have ended it
        request = departure.request
        assert request is not None
        assert not request.num_pending, request
        if request.slot is not None:
            assert departure.outgoing is not None
            departure.outgoing.extend(request.num_computed)
            departure.model_state = self._engine.runner.save_state(request.slot.index)
        self._engine.take_out(request)
        self._scheduler.num_places_kept += request.slot is not None
        departure.state = DepartureState.AWAY
        departure.continuation = Continuation.of(request, epoch=epoch)
        return departure

    def go_on(
        self,
        key: SequenceKey,
        epoch: int,
        *,
        owner_epoch: int | None = None,
        output_token_ids: Sequence[int] = (),
    ) -> bool:
        """Let a sequence go on here, with its slot and without computing anything again.

        `owner_epoch` is what its outputs say from now on; None for what they said. Of
        `output_token_ids` those that it lacks were generated elsewhere meanwhile. Returns whether
        it is here: False if it has finished or was released. A departure that was never begun
        cannot begin any more. Raises InvalidOperation if the epoch was overtaken.
        """
        departure = self._moves.get(key)
        if departure is None or departure.epoch < epoch:
            if departure is not None and departure.state is DepartureState.AWAY:
                raise InvalidOperation(f"{key} is away since epoch {departure.epoch}")
            if departure is not None:
                self._end(departure, "a later epoch has ended", is_here=True)
            departure = Departure(key, epoch)
            departure.why, departure.is_here = "it was ended before it began", True
            self._moves.note(departure, is_under_way=False)
        elif departure.epoch > epoch:
            raise InvalidOperation(f"epoch {epoch} of {key} was overtaken by {departure.epoch}")
        request, is_away = departure.request, departure.state is DepartureState.AWAY
        self._end(departure, "it goes on here", is_here=True)
        if is_away and request is not None:
            self._put_back(departure, request, owner_epoch, output_token_ids)
        return departure.is_here and self._engine.find(key) is not None

    def release(self, key: SequenceKey, epoch: int, *, keep: bool = True) -> None:
        """Another engine has the sequence: its slot is parked, with `keep`, or given back.

        Raises InvalidOperation if it is not away, or the epoch was overtaken.
        """
        departure = self._moves.get(key)
        if departure is None or departure.epoch != epoch:
            raise InvalidOperation(f"epoch {epoch} of {key} is not known here")
        if departure.state is DepartureState.EXPOSED:
            raise InvalidOperation(f"{key} goes on here; have it depart before it is released")
        if departure.state is DepartureState.AWAY:
            outgoing = departure.outgoing
            keep = keep and not (outgoing is not None and outgoing.is_lent)  # else nothing is left
            departure.stop_reading(has_moved=True)
            self._drop(departure, "it goes on elsewhere", keep=keep)

    # -- what ends them ------------------------------------------------------------------------

    def settle(self) -> None:
        """End those whose request has finished or lost its slot, and those whose lease is over."""
        for departure in self._moves:
            if self._end_if_over(departure) or not departure.is_late:
                continue
            if departure.state is DepartureState.EXPOSED:
                self._end(departure, "who asked for it is silent", is_here=True)
            else:
                self._give_up_slot(departure)

    def tell(self, message: Finish | Abort | SetPriority) -> None:
        """What is told to the engine, for what is away: dropped with a word, without one, or given
        another priority for when it comes back."""
        for departure in self._moves:
            request = departure.request
            if departure.state is not DepartureState.AWAY or request is None:
                continue
            if departure.key[0] != message.request_id:
                continue
            if isinstance(message, SetPriority):
                request.priority = message.priority
            elif isinstance(message, Abort):
                self._engine.tell_abort(request)
                self._drop(departure, "it was aborted", keep=False)
            elif departure.key[1] == message.index:
                self._drop(departure, "it has finished", keep=True)

    def give_way(self) -> bool:
        """Memory is short: end what reads slots that no live request has, or has any more."""
        gave_way = False
        for departure in self._moves:
            if self._end_if_over(departure):
                gave_way = True
            elif departure.slot is None and departure.outgoing is not None:
                departure.leave()
                gave_way = True
        return gave_way

    def forget(self) -> None:
        """The model changed: what was exposed is of no use, neither here nor elsewhere."""
        for departure in self._moves:
            if departure.state is DepartureState.EXPOSED:
                self._end(departure, "the model changed", is_here=True)
            else:
                self._give_up_slot(departure, keep=False)

    def close(self) -> None:
        """Drop all that is away, and say so."""
        for departure in self._moves:
            self.tell(Abort(departure.key[0]))
            self._end(departure, "the engine was closed", is_here=False)

    # -- parts -------------------------------------------------------------------------------

    def _expose(self, departure: Departure, request: Request) -> None:
        """Pin what there is of a request's keys and values."""
        key = departure.transfer_key
        if request.slot is not None:
            departure.outgoing = self._transfers.send(key, request.slot, request.num_computed)
        elif self._scheduler.prefix_reuse:  # else keys and values alone are not enough
            found = _longest_kept(self._keepers, request, self._engine.cache.growth_tokens)
            if found is not None:
                transfers, slot, num_tokens = found
                departure.outgoing = transfers.send(key, slot, num_tokens)

    def _put_back(
        self,
        departure: Departure,
        request: Request,
        owner_epoch: int | None,
        output_token_ids: Sequence[int],
    ) -> None:
        request.extend_output(output_token_ids[request.num_output_tokens :])
        if owner_epoch is not None:
            request.epoch = owner_epoch
        slot = departure.slot
        self._scheduler.num_places_kept -= slot is not None
        departure.slot = departure.request = None
        self._engine.put_in(request, slot, request.num_computed if slot is not None else 0)

    def _end_if_over(self, departure: Departure) -> bool:
        """End an exposure that has no reason to go on; False if it has, or is none."""
        why = departure.why_over
        if why is None:
            return False
        assert departure.request is not None
        self._end(departure, why, is_here=not departure.request.is_finished)
        return True

    def _end(self, departure: Departure, why: str, *, is_here: bool) -> None:
        """Without effect on what has ended."""
        if departure.state is DepartureState.ENDED:
            return
        departure.stop_reading()
        if departure.state is DepartureState.EXPOSED:
            departure.slot = departure.request = None
        departure.state = DepartureState.ENDED
        departure.why, departure.is_here = why, is_here
        departure.continuation = departure.model_state = None
        self._moves.ended(departure)

    def _drop(self, departure: Departure, why: str, *, keep: bool) -> None:
        """End one that is away, and forget its request."""
        self._give_up_slot(departure, keep=keep)
        self._end(departure, why, is_here=False)
        request, departure.request = departure.request, None
        assert request is not None
        self._scheduler.tiers.release(request)
        request.state = RequestState.FINISHED

    def _give_up_slot(self, departure: Departure, *, keep: bool = True) -> None:
        """Let the slot of one that is away go; what is kept is found by its tokens."""
        keep = not departure.leave() and keep
        request, slot, departure.slot = departure.request, departure.slot, None
        if slot is None:
            return
        assert request is not None
        request.slot = None
        self._scheduler.num_places_kept -= 1
        computed = request.token_ids[: request.num_computed] if keep else ()
        self._scheduler.exits.let_go(slot, computed, request.variant)


def _longest_kept(
    keepers: Iterable[Transfers], request: Request, least: int
) -> tuple[Transfers, Slot, int] | None:
    """Where most of a waiting request's tokens are kept, if `least` are, and how many."""
    best: tuple[Transfers, Slot, int] | None = None
    for transfers in keepers:
        match = transfers.cache.find(request.reusable_tokens, request.variant)
        if match is not None and match.num_tokens >= least:
            best, least = (transfers, match.slot, match.num_tokens), match.num_tokens + 1
    return best
