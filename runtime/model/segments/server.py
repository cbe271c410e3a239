"""A holder's end: segments that are lent to other processes, attended beside this one's steps."""

import itertools
import logging
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
import torch

from ....allocator import Slot, SlotCache
from ....allocator.transfer.channels import wire
from ....attention_backends import LayerAttention, PartialAttention, PastBatch
from ....vmem.errors import DriverError, InvalidOperation, Shortage, TransferError, VkvError
from .messages import Ask, AskedBatch, Told
from .remote import as_bytes

_log = logging.getLogger(__name__)


class Loan(NamedTuple):
    """Tokens `start … stop` of somebody's sequence, in the first rows of a pinned slot."""

    slot: Slot
    start: int
    stop: int


class SegmentServer:
    """Attends to segments in the slots of a cache for owners in other processes.

    Each connection has a thread. They attend one after the other, beside the engine's steps: what
    is lent is pinned, so that it stays where it is and as it is.

    Args:
        cache: where the slots are, in the host's memory.
        partial: of a backend of its own.
        layers: what each layer of the model asks of attention.
        dtype: of queries.
        timeout_s: how long an owner may be silent in the middle of an ask.

    Attributes:
        cache: as given.
    """

    def __init__(
        self,
        cache: SlotCache,
        partial: PartialAttention,
        layers: Sequence[LayerAttention],
        dtype: torch.dtype,
        *,
        timeout_s: float = 10.0,
    ) -> None:
        self.cache = cache
        self._partial = partial
        self._layers = tuple(layers)
        self._dtype = dtype
        self._timeout_s = timeout_s
        self._loans: dict[int, Loan] = {}
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
        if loan is not None:
            try:
                self.cache.unpin(loan.slot)
            except (Shortage, DriverError) as error:
                _log.warning("%s was not unmapped, and will be reclaimed: %s", loan.slot, error)

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
        self._connections.append((sock, thread))
        thread.start()

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
        asked: PastBatch | None = None
        loans: tuple[int, ...] = ()
        try:
            while wire.wait_for_more(sock):
                ask = wire.receive_message(sock, Ask)
                if ask.batch is not None:
                    asked, loans = self._batch_of(ask.batch), ask.batch.loans
                if asked is None:
                    raise TransferError("an ask named no batch")
                query = self._receive_query(sock, ask, asked)
                try:
                    results = self._attend(ask.layer, query, asked, loans)
                except VkvError as error:
                    wire.send_message(sock, Told(objection=str(error)))
                    continue
                wire.send_message(sock, Told())
                wire.send_bytes(sock, [as_bytes(results)], False)
        except TransferError as error:
            _log.warning("an owner of segments is not served any more: %s", error)
        finally:
            sock.close()

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
            for number, start, stop in stretches:
                loan = self._loans.get(number)
                if loan is None:
                    raise InvalidOperation(f"loan {number} was called back")
                if not loan.start == start <= stop <= loan.stop:
                    raise InvalidOperation(
                        f"tokens {start} to {stop} are not those of loan {number}, {loan.start} "
                        f"to {loan.stop}"
                    )
            self._partial.attend_past(query, keys, values, batch, self._layers[layer], results)
        return results
