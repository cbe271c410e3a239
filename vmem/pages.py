"""What pages are called: a number says what a page is a part of.

0 …                    memory of the driver's own, in the order in which it came
FIRST_SEGMENT_PAGE …   segments, `SEGMENT_PAGES` numbers each
FIRST_FILE_PAGE …      stretches of files
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, NewType

from .errors import InvalidOperation

Page = NewType("Page", int)
"""A physical page: an opaque number, unique among the live pages of one driver."""

Segment = NewType("Segment", int)
"""Pages that leave a process together and with no others: the number of its first place."""

SEGMENT_PAGES = 1 << 30  # places of a segment, of which few have a page
FIRST_SEGMENT_PAGE = Page(1 << 48)  # above any number that a driver counts or is given
FIRST_FILE_PAGE = Page(1 << 62)


class PageRun(NamedTuple):
    """Adjacent pages behind a descriptor.

    Attributes:
        descriptor: which of those that were handed over.
        place: of the first page, in pages from the beginning.
        num_pages: how many.
    """

    descriptor: int
    place: int
    num_pages: int


def is_of_file(page: Page) -> bool:
    """Whether a page is a stretch of a file (`attach_file`): nobody's memory, and not to be written
    to."""
    return page >= FIRST_FILE_PAGE


def is_of_segment(page: Page) -> bool:
    """Whether a page is a segment's."""
    return FIRST_SEGMENT_PAGE <= page < FIRST_FILE_PAGE


def is_common(page: Page) -> bool:
    """Whether a page is the driver's own, of use to anybody."""
    return page < FIRST_SEGMENT_PAGE


def segment_of(page: Page) -> Segment | None:
    """The segment that a page is in, if it is in one."""
    return Segment(page & -SEGMENT_PAGES) if FIRST_SEGMENT_PAGE <= page < FIRST_FILE_PAGE else None


def page_in(segment: Segment, place: int) -> Page:
    """What the page at a place of a segment is called, whether or not it exists."""
    if not 0 <= place < SEGMENT_PAGES:
        raise InvalidOperation(f"a segment has no place {place}")
    return Page(segment + place)


def adjacent_runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split `pages` where a number does not follow the one before: (first number, count)."""
    start = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield pages[start], index - start
            start = index


def check_runs(runs: Sequence[PageRun], num_descriptors: int) -> None:
    """Raise InvalidOperation unless each descriptor has pages, and none of them twice."""
    ends = dict.fromkeys(range(num_descriptors), 0)
    for run in sorted(runs):
        if run.descriptor not in ends:
            raise InvalidOperation(f"{run} is of a descriptor that did not come")
        if run.num_pages < 1 or not ends[run.descriptor] <= run.place < SEGMENT_PAGES:
            raise InvalidOperation(f"{run} is no pages, or some that another run has")
        ends[run.descriptor] = run.place + run.num_pages
    if not all(0 < end <= SEGMENT_PAGES for end in ends.values()):
        raise InvalidOperation(f"a descriptor has no pages, or too many: {ends}")
