"""A holder's end: segments that are lent to other processes, attended beside this one's steps."""

import itertools
import logging
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import torch

from ....allocator import Exits, Slot, SlotCache
from ....allocator.transfer.channels import wire
from ....attention_backends import LayerAttention, PartialAttention, PastBatch
from ....vmem.errors import (
    DriverError,
    InvalidOperation,
    OutOfPages,
    Shortage,
    TransferError,
    VkvError,
)
from .messages import Ask, AskedBatch, Fetch, Offer, Said, Told
from .remote import as_bytes

_log = logging.getLogger(__name__)


class Loan(NamedTuple):
    """Tokens `start … stop` of somebody's sequence, in the first rows of a pinned slot."""

    slot: Slot
    start: int
    stop: int


class _CalledBack(InvalidOperation):
    """Loans that are asked for are not there any more."""

    def __init__(self, loans: tuple[int, ...]) -> None:
        super().__init__(f"loans {loans} were called back")
        self.loans = loans


@dataclass
class _Owner:
    """What is known of one connection: the batch that is asked about, and what it lent here."""

    batch: PastBatch | None = None
    loans: tuple[int, ...] = ()
    taken: list[int] = field(default_factory=list)


class SegmentServer:
    """Takes segments into the slots of a cache for owners in other processes, and attends to them.

    Each connection has a thread; what it lent here goes with it. They attend one after the other,
    beside the engine's steps: what is lent is pinned, so that it stays where it is and as it is.
    As a `Lender` of the engine it gives way where memory is short.

    Args:
        cache: where the slots are, in the host's memory.
        partial: of a backend of its own.
        layers: what each layer of the model asks of attention.
        dtype: of queries.
        limit_tokens: the most that are lent; None for as many as there is room for.
        spare_tokens: room that stays for this engine's own requests when something is taken in.
        pause_s: for how long nothing is taken in after a loan was called back, so that nobody moves
            tokens to and fro.
        notice_s: how long owners have to take away what is called back, all loans together that
            are called for one shortage; 0 to have the memory at once.
        timeout_s: how long an owner may be silent in the middle of an ask.
        exits: how slots are let go; None for an own one.

    Attributes:
        cache: as given.
        num_called_back: loans that left or were ended for want of memory, so far.
        slowest_call_back_s: that giving the memory of one of them back took.
    """

    def __init__(
        self,
        cache: SlotCache,
        partial: PartialAttention,
        layers: Sequence[LayerAttention],
        dtype: torch.dtype,
        *,
        limit_tokens: int | None = None,
        spare_tokens: int = 0,
        pause_s: float = 5.0,
        notice_s: float = 0.0,
        timeout_s: float = 10.0,
        exits: Exits | None = None,
    ) -> None:
        self.cache = cache
        self.num_called_back = 0
        self._called_at_s = 0.0
        self.slowest_call_back_s = 0.0
        self._exits = exits or Exits(cache)
        self._limit_tokens = limit_tokens
        self._spare_tokens = spare_tokens
        self._pause_s = pause_s
        self._notice_s = notice_s
        self._takes_from_s = 0.0
        self._called: int | None = None  # the loan that its owner has to take away
        self._notice_until_s = 0.0
        self._partial = partial
        self._layers = tuple(layers)
        self._dtype = dtype
        self._timeout_s = timeout_s
        self._loans: dict[int, Loan] = {}
        self._read: set[int] = set()  # that are on their way to their owners
        self._numbers = itertools.count(1)
        self._attending = threading.Lock()  # held while loans are read
        self._connections: list[tuple[socket.socket, threading.Thread]] = []

    # -- loans -------------------------------------------------------------------------------

    def lend(self, slot: Slot, start: int, num_tokens: int) -> int:
        """Attend to the first `num_tokens` rows of a slot, which are tokens `start …` of somebody's
        sequence, for whoever names the number that is returned.

        They are pinned: the slot is the caller's to park or close at once.
        """
        self.cache.pin(slot, num_tokens)
        number = next(self._numbers)
        with self._attending:
            self._loans[number] = Loan(slot, start, start + num_tokens)
        return number

    def call_back(self, number: int) -> None:
        """End a loan: once nobody attends to it. Without effect on one that has ended."""
        with self._attending:
            loan = self._loans.pop(number, None)
            now_s = time.monotonic()
            if loan is not None and number == self._called and now_s <= self._notice_until_s:
                self._note_called_back(now_s)
            is_read = number in self._read  # then who reads it ends it
        if loan is not None and not is_read:
            self._unpin(loan)

    def give_way(self) -> bool:
        """Memory is short here: call the newest loan back. False if there is none, or if its owner
        has time to take it away still (`is_leaving`)."""
        if self._exits.retry():
            return True
        loans, now_s, called = self.loans, time.monotonic(), self._called
        if called is not None and called not in loans:
            self._called = None
            return True  # it has just left
        if not loans:
            return False
        if now_s >= self._takes_from_s:  # else it is the same shortage
            self._called_at_s, self._notice_until_s = now_s, now_s + self._notice_s
        self._takes_from_s = now_s + self._pause_s
        called = self._called = max(loans) if called is None else called
        if now_s < self._notice_until_s:
            return False
        self.call_back(called)
        self._note_called_back(time.monotonic())
        self._called = None
        return True

    def _note_called_back(self, now_s: float) -> None:
        self.num_called_back += 1
        self.slowest_call_back_s = max(self.slowest_call_back_s, now_s - self._called_at_s)

    @property
    def is_leaving(self) -> bool:
        """True while an owner has time to take away what was called back."""
        return time.monotonic() < self._notice_until_s and self._called in self.loans

    def forget(self) -> None:
        """The model changed: what is lent is of no use to anybody."""
        for number in self.loans:
            self.call_back(number)

    @property
    def loans(self) -> dict[int, Loan]:
        """What is lent now, by number."""
        with self._attending:
            return dict(self._loans)

    # -- connections -------------------------------------------------------------------------

    def serve(self, sock: socket.socket) -> None:
        """Answer an owner over a connected stream, on a thread of its own, until it closes."""
        wire.prepare(sock, self._timeout_s)
        thread = threading.Thread(
            target=self._answer_all, args=(sock,), name="vkv-segments", daemon=True
        )
        self._connections = [pair for pair in self._connections if pair[1].is_alive()]
        thread.start()
        self._connections.append((sock, thread))

    def close(self) -> None:
        """End all connections and loans."""
        for sock, thread in self._connections:
            with suppress(OSError):  # the owner may have gone first
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()
        self._connections.clear()
        for number in self.loans:
            self.call_back(number)

    def _answer_all(self, sock: socket.socket) -> None:
        owner = _Owner()
        try:
            while wire.wait_for_more(sock):
                request = wire.receive_message(sock, Said).what
                if isinstance(request, Ask):
                    self._answer(sock, request, owner)
                elif isinstance(request, Offer):
                    self._take_in(sock, request, owner)
                elif isinstance(request, Fetch):
                    self._give(sock, request, owner)
                elif request.loan in owner.taken:
                    owner.taken.remove(request.loan)
                    self.call_back(request.loan)
        except TransferError as error:
            _log.warning("an owner of segments is not served any more: %s", error)
        finally:
            sock.close()
            for number in owner.taken:  # nobody asks for them any more
                self.call_back(number)

    def _answer(self, sock: socket.socket, ask: Ask, owner: "_Owner") -> None:
        if ask.batch is not None:
            owner.batch, owner.loans = self._batch_of(ask.batch), ask.batch.loans
        if owner.batch is None:
            raise TransferError("an ask named no batch")
        query = self._receive_query(sock, ask, owner.batch)
        try:
            results = self._attend(ask.layer, query, owner.batch, owner.loans)
        except _CalledBack as error:
            wire.send_message(sock, Told(objection=str(error), called_back=error.loans))
        except VkvError as error:
            wire.send_message(sock, Told(objection=str(error)))
        else:
            called = self._called
            wanted = () if called is None or called not in owner.taken else (called,)
            wire.send_message(sock, Told(wanted=wanted))
            wire.send_bytes(sock, [as_bytes(results)], False)

    def _take_in(self, sock: socket.socket, offer: Offer, owner: "_Owner") -> None:
        """Memory first, then bytes, then the loan: whatever fails, nothing is left."""
        slot = None
        try:
            slot = self._make_room(offer)
            wire.send_message(sock, Told())
            spans = self.cache.spans(slot, 0, offer.num_tokens)
            wire.receive_bytes(sock, [piece for stream in spans for piece in stream], True)
            number = self.lend(slot, offer.start, offer.num_tokens)
            owner.taken.append(number)
            self._exits.let_go(slot)  # the loan keeps what it needs
            slot = None
            wire.send_message(sock, Told(loan=number))
        except (Shortage, DriverError, InvalidOperation) as error:
            if slot is not None:
                raise TransferError(f"tokens were not taken in: {error}") from error
            wire.send_message(sock, Told(objection=str(error)))
        finally:
            if slot is not None:
                self._exits.let_go(slot)

    def _give(self, sock: socket.socket, asked: Fetch, owner: "_Owner") -> None:
        """Send what is lent here to its owner. Others are attended to meanwhile."""
        with self._attending:
            loan = self._loans.get(asked.loan) if asked.loan in owner.taken else None
            if loan is not None:
                self._read.add(asked.loan)
        if loan is None:
            why = f"loan {asked.loan} was called back"
            wire.send_message(sock, Told(objection=why, called_back=(asked.loan,)))
            return
        try:
            stop = asked.start + asked.num_tokens
            if not 0 <= asked.start < stop <= loan.stop - loan.start:
                raise TransferError(f"{asked} is of a loan of {loan.stop - loan.start} tokens")
            wire.send_message(sock, Told())
            spans = self.cache.spans(loan.slot, asked.start, stop)
            wire.send_bytes(sock, [piece for stream in spans for piece in stream], True)
        finally:
            with self._attending:
                self._read.remove(asked.loan)
                has_ended = asked.loan not in self._loans
            if has_ended:
                self._unpin(loan)

    def _unpin(self, loan: Loan) -> None:
        try:
            self.cache.unpin(loan.slot)
        except (Shortage, DriverError) as error:
            _log.warning("%s was not unmapped, and will be reclaimed: %s", loan.slot, error)

    def _make_room(self, offer: Offer) -> Slot:
        """A slot with memory for what is offered. Raises a Shortage, DriverError or, for what never
        fits, InvalidOperation."""
        widths = self.cache.geometry.token_format.widths
        if offer.num_tokens < 1 or offer.start < 0 or offer.widths != widths:
            raise InvalidOperation(
                f"{offer} is not of tokens as they are here, of {widths} bytes; engines lend to "
                "each other that have one layers_per_range and split_kv"
            )
        lent = sum(loan.stop - loan.start for loan in self.loans.values())
        if self._limit_tokens is not None and lent + offer.num_tokens > self._limit_tokens:
            raise OutOfPages(f"{lent} tokens are lent, of {self._limit_tokens}")
        if offer.num_tokens > self.cache.max_len:
            raise InvalidOperation(f"{offer} is longer than a slot, {self.cache.max_len} tokens")
        if time.monotonic() < self._takes_from_s:
            raise OutOfPages("a loan was called back just now")
        self._exits.retry()
        wanted = self.cache.num_pages(offer.num_tokens) + self.cache.num_pages(self._spare_tokens)
        if wanted > self.cache.num_obtainable():
            raise OutOfPages(f"{wanted} pages are not to be had, those to spare included")
        slot = self.cache.open(object())  # only the borrower knows whose tokens they are
        try:
            self.cache.grow(slot, offer.num_tokens)
        except (Shortage, DriverError):
            self._exits.let_go(slot)
            raise
        return slot

    def _batch_of(self, asked: AskedBatch) -> PastBatch:
        """The batch over this cache's slots; loans are looked at when they are attended."""
        counts = {len(numbers) for numbers in msgspec.structs.astuple(asked)}
        if len(counts) != 1 or min(asked.query_lens, default=0) < 1:
            raise TransferError(f"an ask had a batch that is none: {asked}")
        known = self.loans
        slots = tuple(known[n].slot.index if n in known else 0 for n in asked.loans)
        return PastBatch(
            query_lens=asked.query_lens,
            positions=asked.positions,
            key_starts=asked.key_starts,
            key_stops=asked.key_stops,
            slots=slots,
        )

    def _receive_query(self, sock: socket.socket, ask: Ask, batch: PastBatch) -> torch.Tensor:
        if not 0 <= ask.layer < len(self._layers):
            raise TransferError(f"layer {ask.layer} was asked for, of {len(self._layers)}")
        keys, _ = self.cache.layer(ask.layer)
        shape = (batch.num_tokens, ask.num_heads, keys.shape[3])
        query = torch.empty(shape, dtype=self._dtype)
        wire.receive_bytes(sock, [as_bytes(query)], False)
        return query

    def _attend(
        self, layer: int, query: torch.Tensor, batch: PastBatch, loans: Sequence[int]
    ) -> torch.Tensor:
        keys, values = self.cache.layer(layer)
        num_rows = self._partial.num_past_rows(batch)
        results = self._partial.empty(query, num_rows, values.shape[3])
        with self._attending:
            stretches = zip(loans, batch.key_starts, batch.key_stops, strict=True)
            if gone := tuple(number for number in loans if number not in self._loans):
                raise _CalledBack(gone)
            for number, start, stop in stretches:
                loan = self._loans[number]
                if not loan.start == start <= stop <= loan.stop:
                    raise InvalidOperation(
                        f"tokens {start} to {stop} are not those of loan {number}, {loan.start} "
                        f"to {loan.stop}"
                    )
            self._partial.attend_past(query, keys, values, batch, self._layers[layer], results)
        return results
