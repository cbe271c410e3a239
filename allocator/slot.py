"""The handle of one request's virtual stretch."""

import enum
import sys
from bisect import bisect_left
from typing import NamedTuple

from ..vmem import Fence, Page, Segment, is_of_file
from .page_pool import Owner, Reservation

ENDLESS = sys.maxsize
Borders = tuple[int, int, int, int]
"""Of one range: where its pages end that are needed, promised, ahead and idle, in pages."""


class SlotState(enum.Enum):
    """Where a slot is in its life."""

    OPEN = "open"  # a live request's
    PARKED = "parked"  # nobody's, still mapped, tagged with its tokens
    CLOSED = "closed"  # the handle is spent


class Loan(NamedTuple):
    """Pages that two processes have: this one and the one that they move to, or come from.

    Attributes:
        pages: those of the slot that are lent or borrowed.
        segment: where whoever has them in the end puts the next ones.
    """

    pages: list[Page]
    segment: Segment | None


class Slot:
    """A request's virtual range: which row of the cache, and what backs it.

    Read it freely; only the cache that gave it changes it.

    Attributes:
        index: the slot's row in the cache's tensors.
        num_tokens: tokens that may be written and read: the last `grow` or `truncate`.
        promised_tokens: tokens that pages are mapped or reserved for.
        ahead_tokens: tokens that memory was asked for ahead of time.
        ready_tokens: tokens that it may grow to with what is mapped already.
        pages: of each range, the pages mapped from its start on.
        borders: of each range, what its pages are counted for; the ledger's.
        settled_tokens: tokens that it may grow to without moving a border; the ledger's.
        num_pins: transfers that read it, so that its first `pinned_tokens` tokens stay.
        segment: where its next pages come to lie, if slots have segments. All pages there are this
            slot's alone: once others share one, what follows lies in another.
        loan: those of its pages that are changing hands.
        owner: whose bytes it holds, and who alone may see what they leave behind.
    """

    __slots__ = (
        "ahead_tokens",
        "borders",
        "fence",
        "index",
        "loan",
        "num_pins",
        "num_tokens",
        "owner",
        "pages",
        "pinned_tokens",
        "promised_tokens",
        "ready_tokens",
        "reservation",
        "segment",
        "settled_tokens",
        "state",
    )

    def __init__(self, index: int, num_ranges: int, owner: Owner = "") -> None:
        self.index = index
        self.owner = owner
        self.num_tokens = 0
        self.promised_tokens = 0
        self.ahead_tokens = 0
        self.ready_tokens = 0
        self.pages: list[list[Page]] = [[] for _ in range(num_ranges)]
        self.borders: list[Borders] = [(0, 0, 0, ENDLESS)] * num_ranges
        self.settled_tokens = 0
        self.num_pins = self.pinned_tokens = 0
        self.reservation = Reservation()
        self.state = SlotState.OPEN
        self.fence: Fence | None = None  # the last work that may touch a parked slot
        self.segment: Segment | None = None
        self.loan: Loan | None = None

    def hand_over(self, owner: Owner) -> "Slot":
        """A new handle for the same rows, open; this one is spent.

        Whoever parked the slot keeps the old handle, and must not reach the new owner's rows.
        """
        heir = Slot(self.index, 0, owner)
        heir.pages, self.pages = self.pages, [[] for _ in self.pages]
        heir.borders = self.borders
        heir.segment, self.segment = self.segment, None
        heir.ready_tokens, self.ready_tokens = self.ready_tokens, 0
        heir.num_tokens = heir.promised_tokens = self.num_tokens
        self.num_tokens = self.promised_tokens = 0
        self.state = SlotState.CLOSED
        return heir

    @property
    def num_pages(self) -> int:
        """Pages mapped over all ranges."""
        return sum(len(pages) for pages in self.pages)

    @property
    def file_pages(self) -> list[int]:
        """Of each range, how many pages are a file's; they come first."""
        return [bisect_left(pages, True, key=_is_memory) for pages in self.pages]

    @property
    def has_memory(self) -> bool:
        """Whether any of its pages is the pool's."""
        return any(pages and _is_memory(pages[-1]) for pages in self.pages)

    def __repr__(self) -> str:
        return (
            f"Slot({self.index}, {self.state.value}, {self.num_tokens} tokens, "
            f"{self.num_pages} pages)"
        )


def _is_memory(page: Page) -> bool:
    return not is_of_file(page)
