"""How slots are let go, even where the system refuses for a moment to take their memory back."""

import logging
from collections import deque
from collections.abc import Sequence

from ..vmem.errors import DriverError, Shortage
from .slot import Slot
from .slot_cache import SlotCache

_log = logging.getLogger(__name__)


class Exits:
    """Lets slots go, and never fails: its callers are in the middle of something. For any thread.

    A slot that the cache could neither park nor close is kept aside. It is nobody's then, without
    tokens, and is tried again, as often as `retry` is called.
    """

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self._stuck: deque[Slot] = deque()

    def let_go(self, slot: Slot, tokens: Sequence[int] = (), variant: str = "") -> None:
        """Park a slot with the KV of `tokens`, or close it where there are none."""
        try:
            if tokens:
                self._cache.park(slot, tokens, variant)
            else:
                self._cache.close(slot)
        except (Shortage, DriverError) as error:
            _log.warning("%s could not be let go, and is tried again: %s", slot, error)
            self._stuck.append(slot)

    def retry(self) -> bool:
        """Close what is kept aside, as far as it goes. False if nothing could be, or is."""
        has_gone = False
        for _ in range(len(self._stuck)):
            try:
                slot = self._stuck.popleft()
            except IndexError:  # another thread has it
                break
            try:
                self._cache.close(slot)
                has_gone = True
            except (Shortage, DriverError):
                self._stuck.append(slot)
        return has_gone
