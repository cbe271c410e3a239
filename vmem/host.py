"""Virtual memory on a plain Linux host: one memfd holds the pages, mmap puts them at addresses.

Page number n is the stretch of the memfd at offset n * page_bytes. Backed addresses are shared
mappings of the memfd; reserved ones are PROT_NONE, so that a stray access is a fault, as on a
GPU. Pages with adjacent numbers are mapped by one call and cost one mapping together.

Pages of other files have numbers of their own, from `FIRST_FILE_PAGE` on, and private mappings,
which copy what is written to. Pages of segments lie in memfds of their own (`segments.py`).
"""

import heapq
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EMFILE, ENFILE, ENOMEM, ENOSPC
from itertools import pairwise

import torch

from . import linux
from .base import Fence, VmemDriver
from .dlpack import tensor_from_address
from .errors import DriverError, InvalidConfig, OutOfMappings, OutOfPages
from .pages import (
    FIRST_FILE_PAGE,
    Page,
    PageRun,
    Segment,
    adjacent_runs,
    is_of_file,
    is_of_segment,
    segment_of,
)
from .segments import Segments

_SHORTAGES = (ENOMEM, ENOSPC, EMFILE, ENFILE)
_PART_BYTES = 4 << 20  # that are allocated by one call: a millisecond


@dataclass
class _Stretch:
    """Adjacent pages of a file: where the first is, and how many have not been released."""

    first: int
    fd: int
    offset: int
    num_pages: int


class HostDriver(VmemDriver):
    """Host memory as pages. The pages are zero-filled and resident from `create` on.

    A mapping, in the sense of `num_mappings`, is a VMA of the kernel, of which a process may have
    `vm.max_map_count`, for everything; past it even `malloc` fails. The count kept here is exact
    for each reservation by itself (two that touch may share one in the kernel), but for stretches
    of one file that were attached apart: where they continue each other the kernel has one, and
    two are counted. Half of its many methods are the calls that the contract names.

    Attributes:
        huge_pages: whether the pages created last are backed by 2 MiB huge pages; None before
            the first `create`.
    """

    has_segments = True

    def __init__(
        self,
        page_bytes: int = 2 << 20,
        max_mappings: int | None = None,
        readable_gaps: bool = False,
    ) -> None:
        """Args: page_bytes, a multiple of the system's page size; max_mappings, the budget of
        VMAs (default: half of what the system allows the process); readable_gaps, whether
        unbacked addresses read as zeros instead of faulting, for tensors that span them and may
        be read whole (writing faults all the same)."""
        super().__init__(
            device=torch.device("cpu"), granularity=linux.PAGE_SIZE, page_bytes=page_bytes
        )
        if max_mappings is not None and max_mappings < 1:
            raise InvalidConfig(f"max_mappings is {max_mappings}; it must be at least 1")
        self.huge_pages: bool | None = None
        self._try_huge_pages = page_bytes % linux.HUGE_PAGE_SIZE == 0
        self._max_mappings = max_mappings or linux.max_map_count() // 2
        self._gap_access = linux.PROT_READ if readable_gaps else linux.PROT_NONE
        self._num_mappings = 0
        self._next_page = 0  # the memfd holds, or held, the pages below it
        self._punched: list[int] = []  # heap of released numbers below `_next_page`
        self._memfd = os.memfd_create("vkv")
        self._next_file_page: int = FIRST_FILE_PAGE
        self._stretches: dict[Page, _Stretch] = {}  # by each page of a file
        self._segments = Segments(page_bytes)

    @property
    def num_mappings(self) -> int:
        return self._num_mappings

    @property
    def max_mappings(self) -> int:
        return self._max_mappings

    def record_fence(self) -> Fence:
        """Kernels on the host are done when their call returns: there is nothing to wait for."""
        return _Done()

    # -- address space ---------------------------------------------------------------------

    def _reserve(self, size: int) -> int:
        self._check_budget(1, self._max_mappings)
        address = self._reserve_aligned("reserve", size, DriverError)
        self._num_mappings += 1
        return address

    def _free(self, address: int, size: int) -> None:
        self._call("free", linux.munmap, address, size)
        self._num_mappings -= 1

    def _reserve_aligned(self, kind: str, size: int, shortage: type[Exception]) -> int:
        """Unbacked address space, aligned by reserving more and trimming both ends."""
        slack = self._alignment - linux.PAGE_SIZE
        start = self._map_unbacked(kind, None, size + slack, shortage)
        head = -start % self._alignment
        with ExitStack() as undo:
            # munmap of a range that is partly gone already is no error.
            undo.callback(self._call, kind, linux.munmap, start, size + slack)
            if head:
                self._call(kind, linux.munmap, start, head, shortage=shortage)
            if slack > head:
                end = start + head + size
                self._call(kind, linux.munmap, end, slack - head, shortage=shortage)
            undo.pop_all()
        return start + head

    # -- physical pages --------------------------------------------------------------------

    def _create(self, num_pages: int) -> list[Page]:
        self._check_memory(num_pages)
        with ExitStack() as undo:
            pages = self._take_numbers(num_pages, undo)
            for first, count in adjacent_runs(pages):
                self._allocate(first, count, undo)
            self.huge_pages = self._touch(pages)
            undo.pop_all()
        return pages

    def _create_for(self, homes: Sequence[int]) -> list[Page]:
        """Number the pages by their homes, so that what adjoins there adjoins in the memfd.

        The memfd is sparse, and no address is as low as the numbers that `_create` counts up. Where
        a number is taken, by a page that was mapped elsewhere or outlived its reservation, any
        other does.
        """
        pages = [Page(home // self.page_bytes) for home in homes]
        if any(page in self._map_counts for page in pages) or len(set(pages)) < len(pages):
            return self._create(len(homes))
        self._check_memory(len(pages))
        with ExitStack() as undo:
            for first, count in adjacent_runs(pages):
                self._allocate(first, count, undo)
            undo.pop_all()
        return pages

    def _allocate(self, first: int, count: int, undo: ExitStack) -> None:
        """Memory for `count` pages numbered from `first`, zeroed when it is first mapped."""
        fd, offset = self._locate(Page(first))
        end = offset + count * self.page_bytes
        undo.callback(self._punch, "create", first, count)
        # Unlike a first touch, which kills by SIGBUS, fallocate reports a shortage. In parts: a
        # signal undoes a call, in many kernels, and between two of a timer it must end.
        for start in range(offset, end, _PART_BYTES):
            size = min(_PART_BYTES, end - start)
            self._call("create", linux.fallocate, fd, 0, start, size, shortage=OutOfPages)

    def _locate(self, page: Page) -> tuple[int, int]:
        """Descriptor and offset of the memory of a page that is no file's."""
        if is_of_segment(page):
            return self._segments.locate(page)
        return self._memfd, page * self.page_bytes

    def _check_memory(self, num_pages: int) -> None:
        try:
            available = linux.available_bytes()
        except OSError as error:  # of too many open files, for one
            raise DriverError(f"what memory is available could not be read: {error}") from error
        if num_pages * self.page_bytes > available:
            raise OutOfPages(
                f"{num_pages} pages of {self.page_bytes} bytes were asked for, but only "
                f"{available} bytes of memory are available"
            )

    def _take_numbers(self, num_pages: int, undo: ExitStack) -> list[Page]:
        """Page numbers in ascending order, the lowest punched ones first."""
        recycled = [heapq.heappop(self._punched) for _ in range(min(num_pages, len(self._punched)))]
        first = self._next_page
        self._next_page += num_pages - len(recycled)

        def put_back() -> None:
            for number in recycled:
                heapq.heappush(self._punched, number)
            self._next_page = first

        undo.callback(put_back)
        return [Page(number) for number in (*recycled, *range(first, self._next_page))]

    def _touch(self, pages: Sequence[Page]) -> bool:
        """Make the pages resident, zeroed and, where the kernel agrees, huge. Returns that.

        The first touch is the largest cost in a page's life. So it happens here, once, through a
        staging window, and later mappings only enter page tables.
        """
        runs = list(adjacent_runs(pages))
        window_bytes = max(count for _, count in runs) * self.page_bytes
        huge = self._try_huge_pages
        with ExitStack() as undo:
            window = self._reserve_aligned("create", window_bytes, OutOfPages)
            undo.callback(
                self._call, "create", linux.munmap, window, window_bytes, shortage=OutOfPages
            )
            for first, count in runs:
                self._map_run("create", window, first, count, OutOfPages)
                if huge:
                    huge = self._collapse(window, count * self.page_bytes)
        return huge

    def _collapse(self, address: int, size: int) -> bool:
        """Ask for huge pages. Small ones work as well, so a refusal is an answer, not an error."""
        try:
            self._call("collapse", linux.madvise, address, size, linux.MADV_COLLAPSE)
        except DriverError:
            return False
        return True

    def _attach_file(self, fd: int, offset: int, num_pages: int) -> list[Page]:
        if offset % linux.PAGE_SIZE:
            raise InvalidConfig(
                f"offset {offset} of a file is not a multiple of {linux.PAGE_SIZE}, the system's "
                "page size"
            )
        own = self._call("attach", linux.fcntl, fd, linux.F_DUPFD_CLOEXEC, 0)
        end, size = offset + num_pages * self.page_bytes, os.fstat(own).st_size
        if end > size:
            os.close(own)
            raise InvalidConfig(f"{num_pages} pages end at byte {end} of a file of {size} bytes")
        first = self._next_file_page
        self._next_file_page += num_pages + 1  # two stretches never adjoin
        pages = [Page(first + index) for index in range(num_pages)]
        self._stretches.update(dict.fromkeys(pages, _Stretch(first, own, offset, num_pages)))
        return pages

    def _let_go(self, pages: Iterable[Page]) -> None:
        """Forget pages of files, and close the files of which none is left."""
        for page in pages:
            stretch = self._stretches.pop(page)
            stretch.num_pages -= 1
            if not stretch.num_pages:
                os.close(stretch.fd)

    def _release(self, pages: Sequence[Page]) -> None:
        self._let_go(page for page in pages if is_of_file(page))
        own = sorted(page for page in pages if not is_of_file(page))
        try:
            kept = self._segments.is_foreign  # by another process, whose memory it is
            for first, count in adjacent_runs([page for page in own if not kept(page)]):
                self._punch("release", first, count)
                for number in range(first, min(first + count, self._next_page)):
                    heapq.heappush(self._punched, number)
        finally:
            self._segments.remove([page for page in own if is_of_segment(page)])

    def _punch(self, kind: str, first: int, count: int) -> None:
        fd, offset = self._locate(Page(first))
        size = count * self.page_bytes
        self._call(kind, linux.fallocate, fd, linux.PUNCH_HOLE, offset, size)

    # -- pages that change hands -------------------------------------------------------------

    def _create_in(self, pages: Sequence[Page]) -> None:
        with self._lock:  # from here on they are counted, so that no other thread closes the files
            self._segments.open(pages, self._call)
        with ExitStack() as undo:
            undo.callback(self._forget, pages)
            self._check_memory(len(pages))
            for first, count in adjacent_runs(sorted(pages)):
                self._allocate(first, count, undo)
            undo.pop_all()

    def _forget(self, pages: Sequence[Page]) -> None:
        with self._lock:
            self._segments.remove(pages)

    def _copy_page(self, source: Page, target: Page) -> None:
        (from_fd, start), (to_fd, place) = self._locate(source), self._locate(target)
        try:
            content = os.pread(from_fd, self.page_bytes, start)
            os.pwrite(to_fd, content, place)
        except OSError as error:
            raise DriverError(f"a page could not be copied: {error}") from error

    def _bundle_of(self, page: Page) -> int | None:
        return segment_of(page)

    def _bundle_size(self, bundle: int) -> int:
        return self._segments.num_pages(Segment(bundle))

    def _lend(self, pages: Sequence[Page]) -> tuple[list[int], list[PageRun]]:
        return self._segments.lend(pages, self._call)

    def _borrow(self, descriptors: Sequence[int], runs: Sequence[PageRun]) -> list[Page]:
        segments = [self.open_segment() for _ in descriptors]
        return self._segments.borrow(descriptors, runs, segments, self._call)

    def _note_owned(self, pages: Sequence[Page], is_owned: bool) -> None:
        self._segments.note_owned(pages, is_owned)

    # -- mapping ---------------------------------------------------------------------------

    def _map(self, address: int, pages: Sequence[Page]) -> None:
        added = self._added_mappings(address, [None] * len(pages), pages)
        self._check_budget(added, self._max_mappings)
        position = address
        with ExitStack() as undo:
            # Over the whole run: where mmap fails, an older kernel may leave a hole in which a
            # stranger's mapping could settle.
            size = len(pages) * self.page_bytes
            undo.callback(self._map_unbacked, "map", address, size, DriverError)
            for first, count in adjacent_runs(pages):
                self._map_run("map", position, first, count, OutOfMappings)
                position += count * self.page_bytes
            undo.pop_all()
        self._num_mappings += added

    def _unmap(self, address: int, num_pages: int) -> None:
        run = [self.page_at(address + i * self.page_bytes) for i in range(num_pages)]
        added = self._added_mappings(address, run, [None] * num_pages)
        # Unmapping the inside of a mapping leaves up to two more than before. It may go beyond
        # the budget of `map` by a quarter, so that clean-up goes on where growth has stopped.
        # Past that, stretches that end at unmapped addresses can still go: they add none.
        self._check_budget(added, self._max_mappings + self._max_mappings // 4)
        self._map_unbacked("unmap", address, num_pages * self.page_bytes, OutOfMappings)
        self._num_mappings += added

    def _exchange(self, address: int, before: Page, page: Page) -> None:
        added = self._added_mappings(address, [before], [page])
        # As for `_unmap`: what was undone must fit where it was.
        self._check_budget(added, self._max_mappings + self._max_mappings // 4)
        with ExitStack() as undo:
            undo.callback(self._map_run, "map", address, before, 1, DriverError)
            self._map_run("map", address, page, 1, OutOfMappings)
            undo.pop_all()
        self._num_mappings += added

    def _map_run(
        self, kind: str, address: int, first: int, count: int, shortage: type[Exception]
    ) -> None:
        """Map `count` pages, numbered from `first`, by one call.

        It also fills page tables, but not for pages of a file, which are read when they are
        touched, nor for borrowed ones: those are there, and a touch fills in many at once.
        """
        if is_of_file(Page(first)):
            stretch = self._stretches[Page(first)]
            fd, offset = stretch.fd, stretch.offset + (first - stretch.first) * self.page_bytes
            flags = linux.MAP_PRIVATE | linux.MAP_NORESERVE
        else:
            fd, offset = self._locate(Page(first))
            is_foreign = self._segments.is_foreign(Page(first))
            flags = linux.MAP_SHARED | (0 if is_foreign else linux.MAP_POPULATE)
        self._call(
            kind,
            linux.mmap,
            address,
            count * self.page_bytes,
            linux.PROT_READ_WRITE,
            flags | linux.MAP_FIXED,
            fd,
            offset,
            shortage=shortage,
        )

    def _map_unbacked(
        self, kind: str, address: int | None, size: int, shortage: type[Exception]
    ) -> int:
        """Address space without memory: at `address`, over what is there, or anywhere."""
        flags = linux.MAP_UNBACKED | (linux.MAP_FIXED if address is not None else 0)
        return self._call(
            kind, linux.mmap, address, size, self._gap_access, flags, -1, 0, shortage=shortage
        )

    # -- the budget of mappings ------------------------------------------------------------

    def _added_mappings(
        self, address: int, before: Sequence[Page | None], after: Sequence[Page | None]
    ) -> int:
        """VMAs gained (or lost, if negative) when the run at `address` changes to `after`.

        A reservation has one VMA, and one more for every boundary between neighbouring pages
        that the kernel cannot merge; only boundaries within and at the ends of the run change.
        """
        reservation = self._space.around(address)
        assert reservation is not None
        end = address + len(before) * self.page_bytes
        left = [self.page_at(address - self.page_bytes)] if address > reservation.address else []
        right = [self.page_at(end)] if end < reservation.end else []
        return _boundaries([*left, *after, *right]) - _boundaries([*left, *before, *right])

    def _check_budget(self, added: int, budget: int) -> None:
        if added > 0 and self._num_mappings + added > budget:
            raise OutOfMappings(
                f"{added} more mappings beside {self._num_mappings} would exceed the budget of "
                f"{budget} kept below vm.max_map_count ({linux.max_map_count()}); use larger "
                "pages, or raise the limit with sysctl"
            )

    # -- use and end -----------------------------------------------------------------------

    def _tensor(
        self, address: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        return tensor_from_address(address, shape, strides, dtype, self.device)

    def _close(self) -> None:
        os.close(self._memfd)

    def _call(
        self,
        kind: str,
        function: linux.Syscall,
        *args: int | bytes | None,
        shortage: type[Exception] = DriverError,
    ) -> int:
        """One system call: counted as `kind`, and checked. Running short raises `shortage`."""
        start_s = time.perf_counter()
        try:
            return linux.call(function, *args)
        except OSError as error:
            raised = shortage if error.errno in _SHORTAGES else DriverError
            raise raised(
                f"{function.__name__} failed during {kind}: {os.strerror(error.errno or 0)}"
            ) from error
        finally:
            self._count(kind, start_s)


class _Done:
    """The fence of a device whose work is over when the call returns."""

    def wait(self) -> None:
        return


def _boundaries(pages: Sequence[Page | None]) -> int:
    return sum(not _merge(left, right) for left, right in pairwise(pages))


def _merge(left: Page | None, right: Page | None) -> bool:
    """Whether the kernel keeps two neighbouring pages in one VMA."""
    if left is None or right is None:
        return left is right
    return right == left + 1
