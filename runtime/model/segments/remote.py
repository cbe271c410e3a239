"""The owner's end of a connection to a holder in another process."""

import socket
import time
import weakref
from collections import deque
from statistics import median

import torch

from ....allocator.transfer import Spans
from ....allocator.transfer.channels import wire
from ....attention_backends import LayerAttention, PastBatch
from ....vmem.errors import TransferError
from .holders import Answer
from .messages import Ask, AskedBatch, Fetch, GiveBack, Offer, Said, Told

_REMEMBERED = 128  # answers, whose times tell how fast a holder is
_ENOUGH = 16  # of them, for a median


class HolderLost(TransferError):
    """A holder does not answer any more, or has not got a segment: what lay there is gone.

    Attributes:
        holder: the name of who it is.
        loans: those that are lost; None for all, and the holder with them.
    """

    def __init__(self, holder: str, why: str, loans: tuple[int, ...] | None = None) -> None:
        super().__init__(f"the segments at {holder!r} are lost: {why}")
        self.holder = holder
        self.loans = loans


class RemoteHolder:
    """Has a `SegmentServer` of the same model take tokens in, and asks it, over a stream socket.

    One call after the other: an answer is waited for before the next ask. A holder that is silent
    for `timeout_s`, that closes or says what nobody says here is lost, at once and for good.

    Args:
        name: of whom it is.
        sock: connected, a stream; of the Unix family or TCP. It is this object's from now on.
        timeout_s: how long the other side may be silent.

    Attributes:
        num_steps: in which it was asked, so far.
        sent_bytes, received_bytes: of queries and of results, so far.
        waited_s: for answers that were not there when they were wanted, so far.
        wanted: loans whose memory the other side needs soon, as it said last.
    """

    def __init__(self, name: str, sock: socket.socket, *, timeout_s: float = 10.0) -> None:
        wire.prepare(sock, timeout_s)
        self.name = name
        self.num_steps = self.sent_bytes = self.received_bytes = 0
        self.waited_s = 0.0
        self.wanted: tuple[int, ...] = ()
        self._waits_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._sock = sock
        self._is_open = True
        self._told: weakref.ref[PastBatch] | None = None  # the batch that the other side knows

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        batch: PastBatch,
        wanted: LayerAttention,
        results: torch.Tensor,
    ) -> Answer:
        """As `SegmentHolder.attend`; the model there is this one, and knows what a layer wants."""
        is_known = self._told is not None and self._told() is batch
        ask = Ask(
            layer=layer,
            num_heads=query.shape[1],
            batch=None if is_known else AskedBatch.of(batch),
        )
        if not self._is_open:
            raise HolderLost(self.name, "the connection was closed before")
        try:
            wire.send_message(self._sock, Said(ask))
            wire.send_bytes(self._sock, [as_bytes(query.contiguous())], False)
        except TransferError as error:
            raise self._lost(error) from error
        self._told = weakref.ref(batch)
        self.num_steps += not is_known
        self.sent_bytes += query.nbytes
        return _Coming(self, results)

    def receive(self, results: torch.Tensor) -> None:
        """Have the answer to the ask that was sent last. Raises HolderLost."""
        start_s = time.perf_counter()
        self._receive([as_bytes(results)], is_checked=False)
        self.received_bytes += results.nbytes
        wait_s = time.perf_counter() - start_s
        self.waited_s += wait_s
        self._waits_s.append(wait_s)

    def _receive(self, pieces: list[torch.Tensor], *, is_checked: bool) -> None:
        """What was asked for. Raises HolderLost."""
        try:
            told = wire.receive_message(self._sock, Told)
            self.wanted = told.wanted
            if told.called_back:
                raise HolderLost(self.name, told.objection, told.called_back)
            if told.objection:
                raise TransferError(told.objection)
            wire.receive_bytes(self._sock, pieces, is_checked)
        except HolderLost:
            raise  # of some loans: both sides are in step
        except TransferError as error:
            raise self._lost(error) from error

    @property
    def answer_s(self) -> float | None:
        """For how long an answer is waited for in a layer, by the median of the last ones; None
        where there were too few."""
        return median(self._waits_s) if len(self._waits_s) >= _ENOUGH else None

    def take(self, spans: Spans, start: int, num_tokens: int) -> int | None:
        """Copy tokens there (`Creditor.take`): memory first, then bytes, then the loan.

        Raises HolderLost.
        """
        widths = tuple(sum(map(len, of_stream)) // num_tokens for of_stream in spans)
        pieces = [piece for of_stream in spans for piece in of_stream]
        if not self._is_open:
            raise HolderLost(self.name, "the connection was closed before")
        try:
            offer = Offer(start=start, num_tokens=num_tokens, widths=widths)
            wire.send_message(self._sock, Said(offer))
            if wire.receive_message(self._sock, Told).objection:
                return None
            wire.send_bytes(self._sock, pieces, True)
            return wire.receive_message(self._sock, Told).loan
        except TransferError as error:
            raise self._lost(error) from error

    def fetch(self, spans: Spans, loan: int, start: int, num_tokens: int) -> None:
        """Have tokens of a loan in `spans`, from its row `start` on (`Creditor.fetch`).

        Raises HolderLost.
        """
        pieces = [piece for of_stream in spans for piece in of_stream]
        if not self._is_open:
            raise HolderLost(self.name, "the connection was closed before")
        try:
            asked = Fetch(loan=loan, start=start, num_tokens=num_tokens)
            wire.send_message(self._sock, Said(asked))
        except TransferError as error:
            raise self._lost(error) from error
        self._receive(pieces, is_checked=True)

    def give_back(self, loan: int) -> None:
        """A loan is not needed any more. Whoever is not there any more has ended it already."""
        if self._is_open:
            try:
                wire.send_message(self._sock, Said(GiveBack(loan=loan)))
            except TransferError:
                self.close()

    def close(self) -> None:
        """End the connection. Closing twice is harmless."""
        self._is_open = False
        self._sock.close()

    def _lost(self, error: TransferError) -> HolderLost:
        self.close()
        return HolderLost(self.name, str(error))


class _Coming:
    def __init__(self, holder: RemoteHolder, results: torch.Tensor) -> None:
        self._holder = holder
        self._results = results

    def wait(self) -> None:
        """Have them. Raises HolderLost."""
        self._holder.receive(self._results)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor in the host's memory."""
    return tensor.flatten().view(torch.uint8)
