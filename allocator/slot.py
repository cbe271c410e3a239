"""The handle of one request's virtual stretch."""

import enum

from ..vmem import Fence, Page
from .page_pool import Reservation


class SlotState(enum.Enum):
    """Where a slot is in its life."""

    OPEN = "open"  # a live request's
    PARKED = "parked"  # nobody's, still mapped, tagged with its tokens
    CLOSED = "closed"  # unmapped; the handle is spent


class Slot:
    """A request's virtual range: which row of the cache, and what backs it.

    Read it freely; only the cache that gave it changes it.

    Attributes:
        index: the slot's row in the cache's tensors.
        num_tokens: tokens that may be written and read: the last `grow` or `truncate`.
        promised_tokens: tokens that pages are mapped or reserved for.
        pages: of each range, the pages mapped from its start on.
    """

    __slots__ = ("fence", "index", "num_tokens", "pages", "promised_tokens", "reservation", "state")

    def __init__(self, index: int, num_ranges: int) -> None:
        self.index = index
        self.num_tokens = 0
        self.promised_tokens = 0
        self.pages: list[list[Page]] = [[] for _ in range(num_ranges)]
        self.reservation = Reservation()
        self.state = SlotState.OPEN
        self.fence: Fence | None = None  # the last work that may touch a parked slot

    @property
    def num_pages(self) -> int:
        """Pages mapped over all ranges."""
        return sum(len(pages) for pages in self.pages)

    def __repr__(self) -> str:
        return (
            f"Slot({self.index}, {self.state.value}, {self.num_tokens} tokens, "
            f"{self.num_pages} pages)"
        )
