"""The physical pages of a process: created lazily, counted, limited, returned."""

import heapq
import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence, Set
from typing import Literal, Protocol

from ..vmem import (
    Fence,
    OwnedLock,
    Page,
    ProcessOwner,
    Segment,
    is_common,
    is_of_file,
    segment_of,
)
from ..vmem.errors import InvalidConfig, InvalidOperation, OutOfPages
from .memory_limit import MemoryLimit

Sanitize = Literal["never", "tenants", "zero"]

Owner = Hashable
"""Names whose bytes a page may hold: equal ones may see what each other left there."""

UNKNOWN: Owner = object()
"""The owner of bytes of which nobody can say whose they are: others than whoever comes next."""


class PageSource(Protocol):
    """What a pool needs of whatever makes its pages; a `VmemDriver`, as a rule.

    `create` gives pages that are zero-filled wherever they are seen first.
    """

    page_bytes: int
    counters: Counter[str]

    @property
    def num_mappings(self) -> int: ...
    def create(self, num_pages: int) -> list[Page]: ...
    def create_in(self, pages: Sequence[Page]) -> None: ...
    def attach_file(self, fd: int, offset: int, num_pages: int) -> list[Page]: ...
    def release(self, pages: Sequence[Page]) -> None: ...
    def record_fence(self) -> Fence: ...


class Reservation:
    """A claim on `num_pages` pages of a pool, good until taken or cancelled."""

    def __init__(self) -> None:
        self.num_pages = 0


class PagePool:
    """Owns physical pages, counts their references, keeps the limit.

    A page is *free* (created, nobody's), or *held* (one reference or more). Pages are created
    when first needed and stay in the pool when released; `trim` returns the free ones to the
    system. A `Reservation` sets pages aside before anything is promised, so
    that two admissions can never count on the same page.

    Pages of files (`attach_file`) are guests: their references are counted, and nothing else. They
    come under no limit, are never free, and go back to the driver with their last reference.

    Pages of segments are asked for by name and serve nobody else: with their last reference they go
    back to the system. Those whose `commit` was undone are free until then, and give way to others.

    Args:
        driver: creates and releases the pages.
        limit: the most memory the pool may hold, in bytes, rounded down to whole pages; or what
            several pools may hold together.
        most_bytes: the most that this one may hold, if that is less.
        low_watermark: free pages that `refill` keeps ready.
        sanitize: whether whoever maps a page that has had an owner must clear it first
            (`needs_zero`): "never", "tenants" if that was another than the next, "zero" always.

    All methods may be called from several threads, none from a forked child (ForkedProcess). They
    are many because eight of them are counts.
    """

    def __init__(
        self,
        driver: PageSource,
        limit: int | MemoryLimit,
        *,
        most_bytes: int | None = None,
        low_watermark: int = 0,
        sanitize: Sanitize = "never",
    ) -> None:
        self.driver = driver
        self.shared_limit = limit if isinstance(limit, MemoryLimit) else None
        limit_bytes = limit.num_bytes if isinstance(limit, MemoryLimit) else limit
        if most_bytes is not None:
            limit_bytes = min(limit_bytes, most_bytes)
        self.limit_pages = limit_bytes // driver.page_bytes
        if self.limit_pages < 1:
            raise InvalidConfig(
                f"a pool of {limit_bytes} bytes holds no page of {driver.page_bytes} bytes; "
                "give it more memory or choose smaller pages"
            )
        if sanitize not in ("never", "tenants", "zero"):
            raise InvalidConfig(f"sanitize is {sanitize!r}; use 'never', 'tenants' or 'zero'")
        if low_watermark < 0:
            raise InvalidConfig(f"low_watermark is {low_watermark} pages; use 0 or more")
        self.low_watermark = min(low_watermark, self.limit_pages)
        self.sanitize: Sanitize = sanitize
        self._created = threading.Condition(threading.RLock())
        self._lock = OwnedLock(ProcessOwner("this page pool"), self._created)
        self._free: list[Page] = []  # a heap: low numbers first, so that runs stay adjacent
        self._references: dict[Page, int] = {}
        self._file_references: dict[Page, int] = {}
        self._owners: dict[Page, Owner] = {}  # of pages that have had one: the last
        self._foreign: set[Page] = set()  # pages whose memory another process has, too
        self._num_reserved = 0
        self._num_creating = 0
        self._num_taken = 0  # pages counted against the shared limit

    # -- counts ----------------------------------------------------------------------------

    @property
    def num_created(self) -> int:
        """Pages that exist, held or free."""
        with self._lock:
            return len(self._free) + len(self._references)

    @property
    def num_free(self) -> int:
        """Pages that exist and are nobody's."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Pages with at least one reference."""
        return len(self._references)

    @property
    def num_reserved(self) -> int:
        """Pages set aside by reservations and not yet taken."""
        return self._num_reserved

    @property
    def num_available(self) -> int:
        """Pages that a new reservation could still claim."""
        with self._lock:
            own = self.limit_pages - len(self._references) - self._num_reserved
            if self.shared_limit is None:
                return own
            room = self.shared_limit.room_bytes // self.driver.page_bytes
            return min(own, self.num_spare + room)

    @property
    def num_spare(self) -> int:
        """Pages that exist, or are being made, and that nobody has or was promised."""
        with self._lock:
            return max(0, len(self._free) + self._num_creating - self._num_reserved)

    @property
    def num_of_files(self) -> int:
        """Pages of files with at least one reference."""
        return len(self._file_references)

    def references(self, page: Page) -> int:
        """References to a held page; 0 if it is free or unknown. A file counts as one more."""
        if is_of_file(page):
            count = self._file_references.get(page, 0)
            return count + 1 if count else 0
        return self._references.get(page, 0)

    # -- claims ----------------------------------------------------------------------------

    def reserve(self, num_pages: int, into: Reservation | None = None) -> Reservation:
        """Set `num_pages` more pages aside, in a new reservation or `into` one.

        Raises OutOfPages, with nothing changed, if too few are left.
        """
        if num_pages < 0:
            raise InvalidConfig(f"cannot reserve {num_pages} pages")
        with self._lock:
            if num_pages > self.num_available:
                raise self._shortage(num_pages)
            self._num_reserved += num_pages
            if not self._settle():  # another pool was faster
                self._num_reserved -= num_pages
                raise self._shortage(num_pages)
            reservation = into or Reservation()
            reservation.num_pages += num_pages
            return reservation

    def _shortage(self, num_pages: int) -> OutOfPages:
        return OutOfPages(
            f"{num_pages} pages asked, {self.num_available} of {self.limit_pages} "
            "available; wait for a request to finish, or raise the memory limit"
        )

    def commit(
        self, reservation: Reservation, num_pages: int, named: Sequence[Page] | None = None
    ) -> list[Page]:
        """Take `num_pages` pages of a reservation, with one reference each; these, if `named`.

        Creates what is missing. Raises OutOfPages (named pages: or OutOfMappings, DriverError),
        with the reservation intact, if the device itself has no memory left.
        """
        with self._lock:
            if num_pages > reservation.num_pages:
                raise InvalidOperation(
                    f"{num_pages} pages committed of a reservation of {reservation.num_pages}"
                )
            pages = self._pop_free(num_pages) if named is None else self._pop_named(named)
            for page in pages:
                self._references[page] = 1
            reservation.num_pages -= num_pages
            self._num_reserved -= num_pages
            return pages

    def _pop_free(self, num_pages: int) -> list[Page]:
        """The free pages with the lowest numbers, and new ones."""
        # A refill under way may be creating the very pages the limit leaves room for.
        while self._num_creating and num_pages > len(self._free):
            self._created.wait()
        missing = num_pages - len(self._free)
        if missing > 0:
            self._add_free(self.driver.create(missing))
        return [heapq.heappop(self._free) for _ in range(num_pages)]

    def _pop_named(self, named: Sequence[Page]) -> list[Page]:
        """Pages of segments, free ones or new."""
        found = set(named).intersection(self._free)
        missing = [page for page in named if page not in found]
        if missing:
            self._make_way(len(missing), found)
            self.driver.create_in(missing)
        if found:
            self._free = [page for page in self._free if page not in found]
            heapq.heapify(self._free)
        return list(named)

    def _make_way(self, num_pages: int, keep: set[Page]) -> None:
        """Give free pages, but `keep`, back so that so many promised ones can come from outside."""
        while self._num_creating:
            self._created.wait()
        surplus = num_pages - max(0, self._num_reserved - len(self._free))
        if surplus > 0:
            self._drop_free([page for page in self._free if page not in keep][:surplus])

    def restore(
        self, reservation: Reservation, pages: Sequence[Page], owner: Owner | None = None
    ) -> None:
        """Undo a `commit`: the pages are free again, and the reservation claims them as before.

        `owner` is whose bytes they hold now; None if they were not written to. It makes no call
        that could fail.
        """
        with self._lock:
            unused = self._drop_references(pages)
            for page in unused:
                self._owners[page] = self._owners.get(page, UNKNOWN) if owner is None else owner
            self._add_free(unused)
            self._num_reserved += len(pages)
            reservation.num_pages += len(pages)

    def admit(self, reservation: Reservation, pages: Sequence[Page]) -> None:
        """Hold pages that another process lent, with one reference each, as a `commit` would.

        Raises InvalidOperation, with nothing changed, if fewer are reserved.
        """
        with self._lock:
            if len(pages) > reservation.num_pages:
                raise InvalidOperation(
                    f"{len(pages)} pages came for a reservation of {reservation.num_pages}"
                )
            self._make_way(len(pages), set())
            self._references.update(dict.fromkeys(pages, 1))
            self._foreign.update(pages)
            reservation.num_pages -= len(pages)
            self._num_reserved -= len(pages)

    def dismiss(self, reservation: Reservation, pages: Sequence[Page]) -> None:
        """Undo an `admit`: the pages are the other process's alone, and as many reserved again."""
        with self._lock:
            leaving = self._drop_references(pages)
            self._foreign.difference_update(leaving)
            self._num_reserved += len(leaving)
            reservation.num_pages += len(leaving)
            if leaving:
                self.driver.release(leaving)

    def own(self, pages: Iterable[Page]) -> None:
        """Pages that were admitted are this pool's alone: once released they are free."""
        with self._lock:
            self._foreign.difference_update(pages)

    def disown(self, pages: Iterable[Page]) -> None:
        """Held pages are another process's now: once released they are gone from here."""
        with self._lock:
            self._foreign.update(page for page in pages if page in self._references)

    def cancel(self, reservation: Reservation, num_pages: int | None = None) -> None:
        """Give back `num_pages` of a reservation, or all it still claims."""
        with self._lock:
            if num_pages is None:
                num_pages = reservation.num_pages
            if not 0 <= num_pages <= reservation.num_pages:
                raise InvalidOperation(
                    f"{num_pages} pages cancelled of a reservation of {reservation.num_pages}"
                )
            self._num_reserved -= num_pages
            reservation.num_pages -= num_pages
            self._settle()

    # -- references ------------------------------------------------------------------------

    def attach_file(self, fd: int, offset: int, num_pages: int) -> list[Page]:
        """Pages that are a file's (`VmemDriver.attach_file`), with one reference each.

        They are shared with the file as they would be with another slot: never to be written to.
        """
        with self._lock:
            pages = self.driver.attach_file(fd, offset, num_pages)
            self._file_references.update(dict.fromkeys(pages, 1))
            return pages

    def retain(self, pages: Sequence[Page]) -> None:
        """Add a reference to each page. Raises InvalidOperation if one is not held."""
        with self._lock:
            for page in pages:
                if not self.references(page):
                    raise InvalidOperation(f"page {page} is not held and cannot be retained")
            for page in pages:
                self._counts_of(page)[page] += 1

    def release(self, pages: Sequence[Page], owner: Owner = UNKNOWN) -> None:
        """Drop a reference to each page; pages without one are free again, with `owner`'s bytes, or
        go to where they belong: to their file, to the process that owns them or, as a segment's, to
        the system.


        Who has a page last is the only one who may have written to it while it was not shared. A
        page must be unmapped before its last reference goes. Raises InvalidOperation, with
        nothing changed, if a page is not held as often as it is named.
        """
        with self._lock:
            unused = self._drop_references(pages)
            leaving: list[Page] = []
            for page in unused:
                if is_common(page) and page not in self._foreign:
                    self._owners[page] = owner
                    heapq.heappush(self._free, page)
                else:
                    self._owners.pop(page, None)
                    self._foreign.discard(page)
                    leaving.append(page)
            self._settle()
            if leaving:
                self.driver.release(leaving)

    def _drop_references(self, pages: Sequence[Page]) -> list[Page]:
        """Returns the pages that nobody refers to any more."""
        for page, times in Counter(pages).items():
            if self._counts_of(page).get(page, 0) < times:
                raise InvalidOperation(f"page {page} is released more often than it is held")
        unused: list[Page] = []
        for page in pages:
            counts = self._counts_of(page)
            counts[page] -= 1
            if not counts[page]:
                del counts[page]
                unused.append(page)
        return unused

    def _counts_of(self, page: Page) -> dict[Page, int]:
        return self._file_references if is_of_file(page) else self._references

    def needs_zero(self, pages: Iterable[Page], owner: Owner = UNKNOWN) -> bool:
        """True if a page among `pages`, which were just taken, must be cleared before `owner` may
        see it."""
        if self.sanitize == "never" or not self._owners:
            return False
        known = self._owners
        return any(page in known and self.hides(known[page], owner) for page in pages)

    def hides(self, before: Owner, owner: Owner) -> bool:
        """True if `owner` must not see what `before` left."""
        if self.sanitize == "tenants":
            return before is UNKNOWN or before != owner
        return self.sanitize == "zero"

    # -- elasticity ------------------------------------------------------------------------

    def refill(self, extra: int = 0) -> int:
        """Create pages until `low_watermark + extra` are free, within the limit; returns how many.

        Meant for a background thread: the pool is not locked while the system clears memory.
        Raises OutOfPages, with nothing changed, if the device itself has no memory left.
        """
        with self._lock:
            room = self.limit_pages - self.num_created - self._num_creating
            goal = self.low_watermark + extra
            wanted = min(goal - len(self._free) - self._num_creating, room)
            if self.shared_limit is not None:  # what is promised is counted already
                ready = len(self._free) + self._num_creating
                uncounted = self.shared_limit.room_bytes // self.driver.page_bytes
                wanted = min(wanted, uncounted + max(0, self._num_reserved - ready))
            if wanted <= 0:
                return 0
            self._num_creating += wanted
            if not self._settle():  # another pool was faster
                self._num_creating -= wanted
                return 0
        created: list[Page] = []
        try:
            created = self.driver.create(wanted)
        finally:
            with self._lock:
                self._num_creating -= wanted
                self._add_free(created)
                self._settle()
                self._created.notify_all()
        return wanted

    def trim(self, keep: int = 0) -> int:
        """Return free pages to the system until `keep` are left; returns how many went.

        Raises DriverError if the system refuses; the pool is rid of the pages all the same.
        """
        if keep < 0:
            raise InvalidConfig(f"cannot keep {keep} pages; use 0 or more")
        with self._lock:
            surplus = len(self._free) - keep
            if surplus <= 0:
                return 0
            self._drop_free(sorted(self._free)[keep:])
            return surplus

    def trim_segments(self, segments: Set[Segment]) -> None:
        """Return the free pages of these segments to the system."""
        with self._lock:
            leaving = [page for page in self._free if segment_of(page) in segments]
            if leaving:
                self._drop_free(leaving)

    def _drop_free(self, leaving: Sequence[Page]) -> None:
        gone = set(leaving)
        self._free = [page for page in self._free if page not in gone]
        heapq.heapify(self._free)
        for page in gone:
            self._owners.pop(page, None)
        try:
            self.driver.release(leaving)
        finally:
            self._settle()

    def _settle(self) -> bool:
        """Count against a shared limit what exists or is promised; False if that is too much.

        It may only be where a reservation or a page was added.
        """
        if self.shared_limit is None:
            return True
        ready = len(self._free) + self._num_creating
        num_pages = len(self._references) + max(self._num_reserved, ready)
        more = num_pages - self._num_taken
        if more and not self.shared_limit.take(more * self.driver.page_bytes):
            return False
        self._num_taken = num_pages
        return True

    def _add_free(self, pages: Iterable[Page]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)

    # -- proof -----------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Recount everything; AssertionError names what does not add up."""
        with self._lock:
            free = set(self._free)
            assert len(free) == len(self._free), "a page is free twice"
            assert not free & self._references.keys(), "a page is free and held"
            assert self._foreign <= self._references.keys(), "a page of another process is kept"
            counts = (*self._references.values(), *self._file_references.values())
            assert all(count > 0 for count in counts), "a dead reference"
            owned = not any(map(is_of_file, (*self._free, *self._references, *self._owners)))
            assert owned, "a page of a file is taken for the pool's"
            assert self.num_created <= self.limit_pages, "the limit is exceeded"
            assert self._num_reserved >= 0, "negative reservation"
            own = self.limit_pages - len(self._references) - self._num_reserved
            assert own >= 0, "more promised than the pool may hold"
            if self.shared_limit is not None:
                before = self._num_taken
                assert self._settle(), "the shared limit is exceeded"
                assert before == self._num_taken, "the shared limit counts otherwise"
