"""Engines of several processes lend each other memory for requests that are longer than a pool.

Whoever lends listens; each borrower has a connection of its own, over which tokens go there once,
and queries and results in every step (`model/segments`).
"""

import logging
import threading
from pathlib import Path

import msgspec

from ....vmem.errors import InvalidOperation
from ...engine.loop import EngineLoop
from ...engine.memory.segments import add_creditor
from ...link.addresses import Address, Listener, Place, close_listeners, listen_at
from ...model.segments import RemoteHolder, SegmentServer

_PURPOSE = "segments"
_CALL_S = 10.0  # for a lender that is ready to take a connection

_log = logging.getLogger(__name__)


class Lending:
    """What an engine lends to those that call, and whom it borrows from.

    Args:
        loop: of the engine, between whose steps `borrow` and `close` are called.
        server: lends its memory; a guest of its tiers already.
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
        self._lenders: list[RemoteHolder] = []
        self._listeners, self.address = listen_at(path, place, _PURPOSE)
        for listener in self._listeners:
            threading.Thread(
                target=self._accept, args=(listener,), name="vkv-lending", daemon=True
            ).start()

    def borrow(self, name: str, address: str, num_tokens: str) -> int:
        """Have this engine's requests outgrow the pool into another's, about so many tokens of it.

        `address` is as of `Address.told`. Returns the most tokens that a request may have now.
        Raises InvalidOperation if the other cannot be reached.
        """
        there = msgspec.json.decode(address, type=Address)
        try:
            connection = self._place.call(there, _PURPOSE, _CALL_S)
        except OSError as error:
            raise InvalidOperation(f"{name} at {there} lends nothing: {error}") from error
        lender = RemoteHolder(name, connection, timeout_s=self._timeout_s)
        self._lenders.append(lender)
        add_creditor(self._loop.engine, lender, int(num_tokens))
        return self._loop.engine.admission.longest

    def close(self) -> None:
        """Lend and borrow nothing more. No request may be under way. Closing twice is harmless."""
        listeners, self._listeners = self._listeners, []
        close_listeners(listeners)
        if listeners and self.address.path:
            Path(self.address.path).unlink(missing_ok=True)
        self._server.close()
        lenders, self._lenders = self._lenders, []
        for lender in lenders:
            lender.close()

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            self._server.serve(connection)
