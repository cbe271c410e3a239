"""Sequences that come to an engine: memory and a place first, then bytes, then the request.

    begin ─▶ EXPECTED ── commit ──▶ HERE     it goes on at once, with what was carried
                │
                └─ abort, lease over, model changed ──▶ GONE   memory and place are given back

    verb      nothing known      EXPECTED    HERE        GONE                a later epoch is known
    begin     begins             the same    refused     refused             refused
    extend    refused            extends     refused     refused             refused
    commit    queues, to be      goes on     nothing     queues, unless it   refused
              computed                                   was `abort`
    abort     noted              ends        drops it    nothing             nothing

A commit says who owns the sequence, so it is refused only where the engine cannot have it at all,
or where `abort` came before: what was carried may be lost, the sequence is not.
"""

import enum
import logging
from collections.abc import Callable
from typing import Any, Protocol

from ....allocator.transfer import Incoming, Transfers
from ....vmem.errors import DriverError, InvalidOperation, OutOfSlots, Shortage
from ...request.continuation import Continuation
from ...request.request import Request
from ...request.spec import SequenceKey
from ..engine import Engine
from ..memory.memory_map import MovingSlots
from .moves import Move, Moves

_log = logging.getLogger(__name__)


class ArrivalState(enum.Enum):
    """Where an arrival is in its life."""

    EXPECTED = "expected"
    HERE = "here"
    GONE = "gone"


class Writing(Protocol):
    """Somebody who writes into memory that was made ready."""

    def cancel(self) -> None:
        """Stop, and return once nothing is written any more."""
        ...


class Arrival(Move):
    """One attempt of one sequence to come.

    Attributes:
        state: where it is.
        incoming: its slot, with memory; None where nothing is to be carried.
        num_room: tokens that memory is there for.
        request: as far as the sequence had come when it was announced, so that at the commit only
            what came since is gone through.
        writing: who writes to `incoming`; stopped before that ends.
        is_barred: with `GONE`: it must not come any more.
    """

    def __init__(
        self,
        key: SequenceKey,
        epoch: int,
        lease_s: float | None = None,
        state: ArrivalState = ArrivalState.EXPECTED,
    ) -> None:
        super().__init__(key, epoch, lease_s)
        self.state = state
        self.incoming: Incoming | None = None
        self.num_room = 0
        self.request: Request | None = None
        self.writing: Writing | None = None
        self.is_barred = False

    @property
    def num_held(self) -> int:
        """Tokens that need not be carried: they were here."""
        return 0 if self.incoming is None else self.incoming.num_held


class Arrivals:
    """The sequences that come to an engine. For the engine's driver alone, between steps.

    Args:
        engine: that they come to.
        check_awake: raises InvalidOperation while the engine has no memory.
    """

    def __init__(self, engine: Engine, check_awake: Callable[[], None]) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._check_awake = check_awake
        self._transfers = Transfers(engine.cache, engine.scheduler.exits)
        self._moves: Moves[Arrival] = Moves()
        self._scheduler.tiers.guests.append(self)

    @property
    def num_under_way(self) -> int:
        """Sequences that are expected."""
        return len(self._moves)

    def slots(self) -> MovingSlots:
        """Those that sequences come to, by index."""
        return {
            arrival.incoming.slot_index: ("arriving", arrival.key)
            for arrival in self._moves
            if arrival.incoming is not None
        }

    # -- the verbs ---------------------------------------------------------------------------

    def begin(
        self,
        continuation: Continuation,
        num_tokens: int,
        *,
        num_room: int = 0,
        lease_s: float | None = None,
        by_pages: bool = False,
    ) -> Arrival:
        """Keep a place and memory for a sequence, of which `num_tokens` tokens are computed so far.

        `continuation` is how far it has come by now. There is memory for `num_room` tokens, and the
        promise of it for all that it has and a page more; with `by_pages` the promise alone, since
        it comes with its pages. `lease_s` is as of `Departures.begin`.

        Raises a Shortage or DriverError, with nothing changed; a UsageError if it could never run
        here; InvalidOperation if it is here already, while the engine is asleep, or if the epoch
        was overtaken or has ended.
        """
        key, epoch = continuation.key, continuation.epoch
        before = self._moves.get(key)
        if before is not None:
            before.renew()
            if before.epoch == epoch and before.state is ArrivalState.EXPECTED:
                return before
            if before.epoch >= epoch:
                raise InvalidOperation(f"{key} had epoch {before.epoch}; begin a later one")
            self._end(before)
        self._check_awake()
        arrival = Arrival(key, epoch, lease_s)
        arrival.request = self._engine.restore(continuation)
        if num_tokens:
            room = max(num_room, num_tokens)
            self._make_ready(arrival, continuation, num_tokens, room, by_pages)
        self._moves.note(arrival, is_under_way=True)
        return arrival

    def extend(self, key: SequenceKey, epoch: int, num_room: int) -> Arrival:
        """Have memory for `num_room` tokens in all.

        Raises a Shortage or DriverError, with nothing changed; InvalidOperation if it is not
        expected.
        """
        arrival = self._moves.get(key)
        if arrival is None or arrival.epoch != epoch or arrival.state is not ArrivalState.EXPECTED:
            raise InvalidOperation(f"epoch {epoch} of {key} is not expected here; begin it")
        arrival.renew()
        if arrival.incoming is None:
            raise InvalidOperation(f"no tokens of {key} were to be carried; begin a later epoch")
        if num_room > arrival.num_room:
            arrival.incoming.make_room(num_room)
            arrival.num_room = num_room
        return arrival

    def commit(
        self, continuation: Continuation, num_tokens: int, model_state: Any = None
    ) -> Request | None:
        """The sequence is this engine's now, and goes on; None if it is already.

        `num_tokens` of its tokens were carried, and `model_state` with them for a hybrid. What was
        lost since, or was never expected, is computed again. Raises a UsageError or
        InvalidOperation if this engine cannot have it, and never will under this epoch.
        """
        key, epoch = continuation.key, continuation.epoch
        arrival = self._moves.get(key)
        if arrival is None or arrival.epoch < epoch:
            arrival = self._replace(arrival, key, epoch)
        elif arrival.epoch > epoch or arrival.is_barred:
            raise InvalidOperation(f"epoch {epoch} of {key} has ended here")
        elif arrival.state is ArrivalState.HERE:
            return None
        try:
            self._check_awake()
            request = self._engine.restore(continuation, arrival.request)
        except Exception:
            self._end(arrival)
            arrival.is_barred = True
            raise
        self._take_in(arrival, request, num_tokens, model_state)
        return request

    def abort(self, key: SequenceKey, epoch: int) -> None:
        """Nothing of this epoch may be here, nor come: what was carried is given back, and a
        sequence that goes on already is dropped, without a word."""
        arrival = self._moves.get(key)
        if arrival is None or arrival.epoch < epoch:
            arrival = self._replace(arrival, key, epoch)
        elif arrival.epoch > epoch:
            return
        if arrival.state is ArrivalState.HERE:
            request = self._engine.find(key)
            if request is not None and request.epoch == epoch:
                self._engine.finish(*key)
            arrival.state = ArrivalState.GONE
        self._end(arrival)
        arrival.is_barred = True

    # -- what ends them ------------------------------------------------------------------------

    def settle(self) -> None:
        """Give back what is expected and whose lease is over."""
        for arrival in self._moves:
            if arrival.is_late:
                _log.warning("%s did not arrive in time; its memory is given back", arrival.key)
                self._end(arrival)

    def give_way(self) -> bool:
        """Nothing here can be had without breaking a promise."""
        return False

    def forget(self) -> None:
        """The model changed: what was carried is of no use."""
        for arrival in self._moves:
            self._end(arrival)

    def close(self) -> None:
        """Give back all that is expected."""
        self.forget()

    # -- parts -------------------------------------------------------------------------------

    def _make_ready(
        self,
        arrival: Arrival,
        continuation: Continuation,
        num_tokens: int,
        num_room: int,
        by_pages: bool,
    ) -> None:
        """A place among those that run, and memory."""
        scheduler, cache = self._scheduler, self._engine.cache
        if scheduler.num_free_places <= 0:
            raise OutOfSlots(f"all {scheduler.max_seqs} places are taken or kept; ask again")
        tokens = continuation.token_ids
        wanted = min(len(tokens) + cache.growth_tokens, cache.max_len)
        incoming = self._transfers.receive(
            arrival.transfer_key,
            tokens[:num_tokens],
            continuation.spec.kv_variant,
            owner=continuation.spec.owner,
            num_reserved=max(wanted, num_room),
            by_pages=by_pages,
        )
        try:
            incoming.make_room(num_room)
        except (Shortage, DriverError):
            incoming.abort()
            raise
        arrival.incoming, arrival.num_room = incoming, num_room
        scheduler.num_places_kept += 1

    def _take_in(
        self, arrival: Arrival, request: Request, num_tokens: int, model_state: Any
    ) -> None:
        incoming, arrival.incoming = arrival.incoming, None
        arrival.request = None
        self._moves.ended(arrival)
        arrival.state = ArrivalState.HERE
        if arrival.writing is not None:
            arrival.writing.cancel()
            arrival.writing = None
        if incoming is None:
            self._engine.put_in(request)
            return
        self._scheduler.num_places_kept -= 1
        if not num_tokens:  # it lost its slot before it left
            incoming.abort()
            self._engine.put_in(request)
            return
        try:
            incoming.extend(request.token_ids[:num_tokens])
            incoming.commit()
        except (Shortage, DriverError, InvalidOperation) as error:
            _log.warning("%s is computed again, since its tokens did not come: %s", request, error)
            incoming.abort()
            self._engine.put_in(request)
            return
        slot = incoming.claim()
        assert slot is not None
        if model_state is not None:
            self._engine.runner.load_state(slot.index, model_state)
        self._engine.put_in(request, slot, num_tokens)

    def _end(self, arrival: Arrival) -> None:
        """Stop who writes, then give memory and place back; without effect on what has ended."""
        if arrival.state is not ArrivalState.EXPECTED:
            return
        arrival.state = ArrivalState.GONE
        arrival.request = None
        self._moves.ended(arrival)
        if arrival.writing is not None:
            arrival.writing.cancel()
            arrival.writing = None
        incoming, arrival.incoming = arrival.incoming, None
        if incoming is not None:
            self._scheduler.num_places_kept -= 1
            incoming.abort()

    def _replace(self, before: Arrival | None, key: SequenceKey, epoch: int) -> Arrival:
        """An arrival of a later epoch, of which nothing is here."""
        if before is not None:
            self._end(before)
        arrival = Arrival(key, epoch, state=ArrivalState.GONE)
        self._moves.note(arrival, is_under_way=False)
        return arrival
