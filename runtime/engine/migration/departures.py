"""Sequences that leave an engine: exposed while they run, taken out, then released or brought back.

    begin ─▶ EXPOSED ── depart ──▶ AWAY ── release ──▶ ENDED   another engine has it
                │                    └──── go_on ────▶ ENDED   it goes on here
                └─ go_on, or by itself ──────────────▶ ENDED   it goes on here, or is finished

    verb       nothing known   EXPOSED    AWAY       ENDED           a later epoch is known
    begin      begins          the same   the same   refused         refused
    depart     refused         departs    the same   refused         refused
    go_on      noted           ends       ends       nothing         refused
    release    refused         refused    ends       nothing         refused

So each verb may come twice, late, or be answered and the answer lost. `begin` of a later epoch ends
an exposure that nobody drives any more; what is away can only be released or brought back.
"""

import enum
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

from ....allocator import Slot, SlotCache
from ....allocator.transfer import Outgoing, TransferKey, Transfers
from ....vmem.errors import InvalidOperation, SequenceGone
from ...request.continuation import Continuation
from ...request.request import Request, RequestState
from ...request.spec import SequenceKey
from ..engine import Engine

_log = logging.getLogger(__name__)

_MOST_ENDED = 4096  # departures whose end is remembered, for verbs that come late


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


class Departure:
    """One attempt of one sequence to leave.

    Attributes:
        key, epoch: name it.
        state: where it is.
        request, slot: whose it is; None once that is the request's own affair, or nobody's.
        outgoing: its computed tokens, pinned; None where it has none, or not yet.
        continuation: what goes on elsewhere; None before it is away.
        model_state: what a hybrid remembers beside keys and values, of exactly the tokens of
            `outgoing`; None before it is away, and of other models.
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
        self.key = key
        self.epoch = epoch
        self.state = DepartureState.ENDED if request is None else DepartureState.EXPOSED
        self.request = request
        self.slot: Slot | None = None if request is None else request.slot
        self.outgoing: Outgoing | None = None
        self.continuation: Continuation | None = None
        self.model_state: Any = None
        self.reading: Reading | None = None
        self.why = ""
        self.is_here = False
        self._lease_s = lease_s
        self.renew()

    @property
    def num_ready(self) -> int:
        """Tokens that could move now: those whose keys and values are computed."""
        if self.state is DepartureState.EXPOSED and self.slot is not None:
            assert self.request is not None
            return self.request.num_computed
        return 0 if self.outgoing is None else self.outgoing.num_tokens

    def renew(self) -> None:
        """Begin the lease anew: who asked for it has shown that it lives."""
        self._ends_s = None if self._lease_s is None else time.monotonic() + self._lease_s

    @property
    def is_over(self) -> bool:
        """True if its lease has run out."""
        return self._ends_s is not None and time.monotonic() > self._ends_s


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
        self._transfers = Transfers(engine.cache)
        self._from_tier: Transfers | None = None
        swapping = self._scheduler.tiers.swapping
        if swapping is not None:
            self._from_tier = Transfers(swapping.tier.far)
        self._known: OrderedDict[SequenceKey, Departure] = OrderedDict()
        self._unfinished: dict[SequenceKey, Departure] = {}
        self._scheduler.tiers.guests.append(self)

    @property
    def num_under_way(self) -> int:
        """Departures that have not ended."""
        return len(self._unfinished)

    @property
    def num_away(self) -> int:
        """Sequences that are neither here nor known to be elsewhere."""
        return sum(d.state is DepartureState.AWAY for d in self._unfinished.values())

    # -- the verbs ---------------------------------------------------------------------------

    def begin(self, key: SequenceKey, epoch: int, *, lease_s: float | None = None) -> Departure:
        """Expose what a sequence has computed, while it goes on.

        Of one that waits, that is what is parked of it, or in the tier of memory, if it spares a
        page of computing.

        `lease_s` is how long who asks may be silent; None for one that cannot die alone. Raises
        SequenceGone if there is no such sequence, InvalidOperation if it cannot leave now, or if
        the epoch was overtaken or has ended.
        """
        before = self._known.get(key)
        if before is not None:
            before.renew()
            if before.epoch == epoch and before.state is not DepartureState.ENDED:
                return before
            if before.epoch >= epoch:
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
        departure = Departure(key, epoch, request, lease_s)
        self._expose(departure, request)
        self._note(departure)
        self._unfinished[key] = departure
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
        self._engine.take_out(request)
        self._scheduler.num_places_kept += request.slot is not None
        departure.state = DepartureState.AWAY
        departure.continuation = Continuation.of(request, epoch=epoch)
        if request.slot is not None:
            departure.model_state = self._engine.runner.save_state(request.slot.index)
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
        departure = self._known.get(key)
        if departure is None or departure.epoch < epoch:
            if departure is not None and departure.state is DepartureState.AWAY:
                raise InvalidOperation(f"{key} is away since epoch {departure.epoch}")
            self._bar(key, epoch)
            return self._engine.find(key) is not None
        if departure.epoch > epoch:
            raise InvalidOperation(f"epoch {epoch} of {key} was overtaken by {departure.epoch}")
        request, was_away = departure.request, departure.state is DepartureState.AWAY
        if departure.state is not DepartureState.ENDED:
            self._end(departure, "it goes on here", is_here=True)
        if was_away and request is not None:
            self._put_back(departure, request, owner_epoch, output_token_ids)
        return departure.is_here and self._engine.find(key) is not None

    def release(self, key: SequenceKey, epoch: int, *, keep: bool = True) -> None:
        """Another engine has the sequence: its slot is parked, with `keep`, or given back.

        Raises InvalidOperation if it is not away, or the epoch was overtaken.
        """
        departure = self._known.get(key)
        if departure is None or departure.epoch != epoch:
            raise InvalidOperation(f"epoch {epoch} of {key} is not known here")
        if departure.state is DepartureState.EXPOSED:
            raise InvalidOperation(f"{key} goes on here; have it depart before it is released")
        if departure.state is DepartureState.AWAY:
            self._end(departure, "it goes on elsewhere", is_here=False, has_moved=True)
            self._drop(departure, keep=keep)

    # -- what ends them ------------------------------------------------------------------------

    def settle(self) -> None:
        """End those whose request has finished or lost its slot, and those whose lease is over."""
        for departure in list(self._unfinished.values()):
            if self._ended_by_itself(departure):
                continue
            if departure.is_over:
                if departure.state is DepartureState.EXPOSED:
                    self._end(departure, "who asked for it is silent", is_here=True)
                else:
                    self._give_up_slot(departure)

    def abort_request(self, request_id: str) -> None:
        """Drop what is away of a request; that is told as its end."""
        for departure in list(self._unfinished.values()):
            if departure.key[0] == request_id and departure.state is DepartureState.AWAY:
                assert departure.request is not None
                self._engine.tell_abort(departure.request)
                self._end(departure, "it was aborted", is_here=False)
                self._drop(departure, keep=False)

    def finish(self, key: SequenceKey) -> None:
        """A sequence that is away has all the text it needs."""
        departure = self._unfinished.get(key)
        if departure is not None and departure.state is DepartureState.AWAY:
            self._end(departure, "it has finished", is_here=False)
            self._drop(departure, keep=True)

    def set_priority(self, request_id: str, priority: int) -> None:
        """What is away of a request has another priority, if it comes back."""
        for departure in self._unfinished.values():
            if departure.key[0] == request_id and departure.state is DepartureState.AWAY:
                assert departure.request is not None
                departure.request.priority = priority

    def give_way(self) -> bool:
        """Memory is short: end what reads slots that no live request has, or has any more."""
        gave_way = False
        for departure in list(self._unfinished.values()):
            if self._ended_by_itself(departure):
                gave_way = True
            elif departure.slot is None and departure.outgoing is not None:
                self._stop_reading(departure)
                gave_way = True
        return gave_way

    def forget(self) -> None:
        """The model changed: what was exposed is of no use, neither here nor elsewhere."""
        for departure in list(self._unfinished.values()):
            if departure.state is DepartureState.EXPOSED:
                self._end(departure, "the model changed", is_here=True)
            else:
                self._give_up_slot(departure, keep=False)

    def close(self) -> None:
        """Drop all that is away."""
        for departure in list(self._unfinished.values()):
            is_away = departure.state is DepartureState.AWAY
            if is_away:
                assert departure.request is not None
                self._engine.tell_abort(departure.request)
            self._end(departure, "the engine was closed", is_here=False)
            if is_away:
                self._drop(departure, keep=False)

    # -- parts -------------------------------------------------------------------------------

    def check(self, key: SequenceKey, epoch: int) -> Departure:
        """The departure, if it has not ended. Raises as `depart`."""
        departure = self._known.get(key)
        if departure is None or departure.epoch != epoch:
            raise InvalidOperation(f"epoch {epoch} of {key} is not known here; begin it")
        self._ended_by_itself(departure)
        if departure.state is DepartureState.ENDED:
            kind = InvalidOperation if departure.is_here else SequenceGone
            raise kind(f"epoch {epoch} of {key} has ended: {departure.why}; begin a later one")
        return departure

    def _ended_by_itself(self, departure: Departure) -> bool:
        """End a departure whose request has finished or lost its slot; False if it has not."""
        request = departure.request
        if departure.state is not DepartureState.EXPOSED or request is None:
            return False
        if request.is_finished:
            self._end(departure, "it has finished", is_here=False)
        elif request.slot is not departure.slot or request.fetch is not None:
            why = "it got a slot" if departure.slot is None else "it gave its slot up to others"
            self._end(departure, why, is_here=True)
        else:
            return False
        return True

    def _expose(self, departure: Departure, request: Request) -> None:
        """Pin what there is of a request's keys and values."""
        if request.slot is not None:
            departure.outgoing = self._transfers.send(
                _transfer_key(departure), request.slot, request.num_computed
            )
        elif self._scheduler.prefix_reuse:  # else keys and values alone are not enough
            found = self._find_kept(request)
            if found is not None:
                transfers, slot, num_tokens = found
                departure.outgoing = transfers.send(_transfer_key(departure), slot, num_tokens)

    def _find_kept(self, request: Request) -> tuple[Transfers, Slot, int] | None:
        """Where most of a waiting request's tokens are: parked, or in the tier of memory."""
        best: tuple[Transfers, Slot, int] | None = None
        least = self._engine.cache.growth_tokens
        for transfers in (self._transfers, self._from_tier):
            if transfers is None:
                continue
            cache: SlotCache = transfers.cache
            match = cache.find(request.reusable_tokens, request.variant)
            if match is not None and match.num_tokens >= least:
                best, least = (transfers, match.slot, match.num_tokens), match.num_tokens + 1
        return best

    def _put_back(
        self,
        departure: Departure,
        request: Request,
        owner_epoch: int | None,
        output_token_ids: Sequence[int],
    ) -> None:
        for token_id in output_token_ids[request.num_output_tokens :]:
            request.token_ids.append(token_id)
            request.sampling.advance(token_id)
        if owner_epoch is not None:
            request.epoch = owner_epoch
        slot = departure.slot
        self._scheduler.num_places_kept -= slot is not None
        departure.slot = departure.request = None
        self._engine.put_in(request, slot, request.num_computed if slot is not None else 0)

    def _end(
        self, departure: Departure, why: str, *, is_here: bool, has_moved: bool = False
    ) -> None:
        self._stop_reading(departure, has_moved=has_moved)
        if departure.state is DepartureState.EXPOSED:
            departure.slot = departure.request = None  # which are the request's own affair
        departure.state = DepartureState.ENDED
        departure.why, departure.is_here = why, is_here
        departure.continuation = departure.model_state = None
        self._unfinished.pop(departure.key, None)

    def _stop_reading(self, departure: Departure, *, has_moved: bool = False) -> None:
        """Stop who reads, then unpin."""
        reading, departure.reading = departure.reading, None
        outgoing, departure.outgoing = departure.outgoing, None
        if reading is not None:
            reading.cancel()
        if outgoing is not None and has_moved:
            outgoing.commit()
        elif outgoing is not None:
            outgoing.abort()

    def _give_up_slot(self, departure: Departure, *, keep: bool = True) -> None:
        """Let the slot of one that is away go; what is left of it is found by its tokens."""
        self._stop_reading(departure)
        assert departure.request is not None
        self._let_go(departure, departure.request, keep=keep)

    def _drop(self, departure: Departure, *, keep: bool) -> None:
        """Forget the request of one that was away."""
        request, departure.request = departure.request, None
        assert request is not None
        self._let_go(departure, request, keep=keep)
        self._scheduler.tiers.release(request)
        request.state = RequestState.FINISHED

    def _let_go(self, departure: Departure, request: Request, *, keep: bool) -> None:
        slot, departure.slot = departure.slot, None
        request.slot = None
        if slot is None:
            return
        self._scheduler.num_places_kept -= 1
        computed = request.token_ids[: request.num_computed] if keep else ()
        self._scheduler.exits.let_go(slot, computed, request.variant)

    def _bar(self, key: SequenceKey, epoch: int) -> None:
        """Remember that an epoch has ended before it began."""
        before = self._known.get(key)
        if before is not None and before.state is DepartureState.EXPOSED:
            self._end(before, "a later epoch has ended", is_here=True)
        barred = Departure(key, epoch)
        barred.why, barred.is_here = "it was ended before it began", True
        self._note(barred)

    def _note(self, departure: Departure) -> None:
        self._known[departure.key] = departure
        self._known.move_to_end(departure.key)
        if len(self._known) > _MOST_ENDED:
            for key, known in list(self._known.items())[: _MOST_ENDED // 2]:
                if known.state is DepartureState.ENDED:
                    del self._known[key]


def _transfer_key(departure: Departure) -> TransferKey:
    return TransferKey(f"{departure.key[0]}/{departure.key[1]}", departure.epoch)
