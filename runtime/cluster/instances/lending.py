"""Engines of several processes lend each other memory.

Whoever lends listens; each borrower has a connection of its own, over which tokens go there once,
and queries and results in every step (`model/segments`).
"""

import logging
import threading
from dataclasses import replace
from pathlib import Path

import msgspec

from ....vmem.errors import InvalidOperation
from ...engine.loop import EngineLoop
from ...engine.memory.lending import CreditLine, LendingOrder, LendingReport, report_of
from ...engine.memory.segments import connect_creditor, disconnect_creditor
from ...link.addresses import Address, Place, close_listeners, listen_at, serve_callers
from ...model.segments import RemoteHolder, SegmentServer

_PURPOSE = "segments"
_CALL_S = 2.0  # for a lender that is ready to take a connection; steps wait for it

_log = logging.getLogger(__name__)


class Lending:
    """What an engine lends to those that call, and whom it borrows from.

    Args:
        loop: of the engine, between whose steps all is called.
        server: lends its memory; gives way to its requests already.
        path: of the Unix socket that this process listens on; with a TCP port beside it if the
            place is one that other nodes call.
        timeout_s: how long a lender may be silent in the middle of a step.

    Raises OSError or InvalidOperation if it cannot listen.
    """

    def __init__(
        self,
        loop: EngineLoop,
        server: SegmentServer,
        path: str,
        place: Place,
        *,
        timeout_s: float = 10.0,
    ) -> None:
        self._loop = loop
        self._server = server
        self._place = place
        self._timeout_s = timeout_s
        self._lenders: dict[str, RemoteHolder] = {}
        self._order = LendingOrder(longest=0)
        most = loop.engine.cache.max_len - 1
        self._own = replace(loop.engine.admission, was_longer=most)  # what is let in without others
        self._listeners, self.address = listen_at(path, place, _PURPOSE)
        for listener in self._listeners:
            threading.Thread(
                target=serve_callers, args=(listener, server.serve), name="vkv-lending", daemon=True
            ).start()

    def obey(self, order: str) -> None:
        """Borrow as a `LendingOrder` says, in JSON, and no more; what is beyond that goes.

        A lender that cannot be reached is told of by `report`. Raises InvalidOperation if no
        request can have tokens elsewhere here.
        """
        told = msgspec.json.decode(order, type=LendingOrder)
        engine = self._loop.engine
        segments = engine.scheduler.tiers.segments
        if segments is None:
            raise InvalidOperation("no request of this engine can have tokens elsewhere")
        # One that was lost is not called again, though it may take calls, before an order without
        # it shows that whoever gives orders knows.
        lost, self._order = self._lost(), told
        for line in told.lines:
            is_known = line.creditor in segments.loans.creditors
            if line.num_tokens and not is_known and line.creditor not in lost:
                self._connect(line)
        named = {line.creditor for line in told.lines}
        for name in self._lenders.keys() - named:
            if not segments.loans.num_lent(name):
                disconnect_creditor(engine, name)
                self._lenders.pop(name).close()
        longest, own = min(told.longest, engine.cache.max_len - 1), self._own
        if longest > own.longest:
            engine.admission = replace(own, longest=longest, why_not_longer=None)
        else:
            engine.admission = own
        segments.loans.place(
            {line.creditor: line.num_tokens for line in told.lines},
            {line.creditor for line in told.lines if line.is_called},
            has_lenders=longest > own.longest,
            has_to_give_up=told.gives_up,
        )

    def report(self) -> LendingReport | None:
        """What this engine has with others now."""
        return report_of(self._loop.engine, self._lost())

    def _lost(self) -> tuple[str, ...]:
        """Those that this engine may have tokens at, and did not reach, or lost."""
        segments = self._loop.engine.scheduler.tiers.segments
        known = () if segments is None else segments.loans.creditors
        lines = (line for line in self._order.lines if line.num_tokens)
        return tuple(line.creditor for line in lines if line.creditor not in known)

    def close(self) -> None:
        """Lend and borrow nothing more. No request may be under way. Closing twice is harmless."""
        listeners, self._listeners = self._listeners, []
        close_listeners(listeners)
        if listeners and self.address.path:
            Path(self.address.path).unlink(missing_ok=True)
        self._server.close()
        lenders, self._lenders = self._lenders, {}
        for lender in lenders.values():
            lender.close()

    def _connect(self, line: CreditLine) -> None:
        there = msgspec.json.decode(line.address, type=Address)
        before = self._lenders.get(line.creditor)
        if before is not None:  # it was lost; known until nobody asks for what it had
            before.close()
        try:
            connection = self._place.call(there, _PURPOSE, _CALL_S)
        except OSError as error:
            _log.warning("%s at %s lends nothing: %s", line.creditor, there, error)
            return
        lender = RemoteHolder(line.creditor, connection, timeout_s=self._timeout_s)
        self._lenders[line.creditor] = lender
        connect_creditor(self._loop.engine, lender)
