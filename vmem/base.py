"""The contract of a virtual-memory driver, and the bookkeeping every driver shares.

A driver does four separate things: it reserves address ranges, creates physical pages, maps
pages at addresses, and lays tensors over addresses. It knows nothing of KV, layers or tokens.

The base class owns the *page table* (which page backs which address) and refuses whatever the
state forbids, so that a mistake is a typed error on every device, with nothing changed. The
subclasses own the system calls, and only those.
"""

import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from .address_space import AddressSpace, Reservation
from .dlpack import strided_extent
from .errors import InvalidConfig, InvalidOperation
from .pages import (
    FIRST_SEGMENT_PAGE,
    SEGMENT_PAGES,
    Page,
    PageRun,
    Segment,
    check_runs,
    is_of_segment,
)
from .process import OwnedLock, ProcessOwner


class Fence(Protocol):
    """A point in the device's work; `wait` returns once all work before it has finished."""

    def wait(self) -> None: ...


class VmemDriver(ABC):
    """Reserves address ranges, creates physical pages, maps and unmaps them.

    Addresses are integers, sizes are bytes. Every operation is all or nothing: one that raises
    has changed nothing (`release` and `close` say where they differ). All methods may be called
    from several threads. A third of them is what a subclass supplies, hence their number.

    Attributes:
        device: where the memory is; the device of the tensors it hands out.
        granularity: the smallest page size, in bytes, that the device can map.
        page_bytes: the size of one physical page, a multiple of `granularity`.
        counters: system or driver calls so far, by kind (`map`, `unmap`, `set_access`, …).
        call_times_s: seconds spent in them, by kind.
        has_segments: whether pages are handed over by segments. Where they are not, each page is
            handed over by itself, if at all.
        memory_name: names the memory that pages are of. They can be handed over among drivers of
            one machine that agree in it: a page of another GPU could be mapped where the two reach
            each other, and each access would go over the bus.
    """

    has_segments = False
    memory_name = "host"

    def __init__(self, *, device: torch.device, granularity: int, page_bytes: int) -> None:
        if page_bytes <= 0 or page_bytes % granularity:
            raise InvalidConfig(
                f"page size {page_bytes} is not a positive multiple of {granularity} bytes, "
                f"the granularity of {device}; choose e.g. {granularity * 2}"
            )
        self.device = device
        self.granularity = granularity
        self.page_bytes = page_bytes
        self.counters: Counter[str] = Counter()
        self.call_times_s: defaultdict[str, float] = defaultdict(float)
        owner = ProcessOwner("this driver")
        self._lock = OwnedLock(owner)
        # Held while pages come and go, always before `_lock`: clearing memory takes milliseconds,
        # and mapping elsewhere must not wait for it.
        self._paging_lock = OwnedLock(owner)
        self._closed = False
        self._space = AddressSpace()
        self._page_table: dict[int, Page] = {}  # address of a mapped page -> page
        self._map_counts: dict[Page, int] = {}  # live page -> addresses it is mapped at
        self._next_segment: int = FIRST_SEGMENT_PAGE

    # -- address space ---------------------------------------------------------------------

    def reserve(self, size: int) -> int:
        """Reserve `size` bytes of address space, unbacked, and return the address.

        `size` must be a positive multiple of `page_bytes`. The address is aligned to the largest
        power of two that divides `page_bytes`; pages lie at multiples of `page_bytes` from it.
        Raises DriverError if the system has no such range left, OutOfMappings if the budget of
        mappings is spent.
        """
        self._check_multiple("size", size)
        with self._guarded():
            address = self._reserve(size)
            self._space.add(address, size)
            return address

    def free(self, address: int) -> None:
        """Give a whole reservation back. Raises InvalidOperation if any of it is mapped."""
        with self._guarded():
            reservation = self._space.at(address)
            if reservation is None:
                raise InvalidOperation(f"{address:#x} is not the start of a reservation")
            if reservation.num_mapped:
                raise InvalidOperation(
                    f"the reservation at {address:#x} still has {reservation.num_mapped} pages "
                    "mapped; unmap them first"
                )
            self._free(address, reservation.size)
            self._space.remove(address)

    # -- physical pages --------------------------------------------------------------------

    def create(self, num_pages: int, homes: Sequence[int] | None = None) -> list[Page]:
        """Create `num_pages` physical pages, zero-filled, each of `page_bytes`.

        `homes` says where each is going to be mapped, an address a page, for pages that stay at
        one address as long as they live. Where mappings are counted by how pages adjoin (the
        host), those that adjoin at home then take one mapping, in whatever order they came.

        Raises OutOfPages, with none created, if the device's memory is exhausted.
        """
        if num_pages < 1:
            raise InvalidConfig(f"num_pages is {num_pages}; at least one page must be created")
        if homes is not None and len(homes) != num_pages:
            raise InvalidConfig(f"{num_pages} pages cannot have {len(homes)} homes")
        with self._paging_lock:
            with self._guarded():
                pass  # refused before the work, not after it
            pages = self._create(num_pages) if homes is None else self._create_for(homes)
            with self._lock:
                for page in pages:
                    self._map_counts[page] = 0
            return pages

    def attach_file(self, fd: int, offset: int, num_pages: int) -> list[Page]:
        """Pages that are the file `fd` itself, `num_pages * page_bytes` bytes of it from `offset`.

        Nothing is read until it is touched, and all processes that map the file share one copy.
        What is written to such a page stays in this process and leaves the file as it is. The
        pages keep the file open until they are released; `fd` itself may be closed. They say
        `is_of_file`. Whoever cuts the file short under a mapping ends the process that reads it.

        Raises InvalidConfig if the stretch does not begin at a multiple of the system's page size
        or leaves the file, InvalidOperation where memory is not the host's.
        """
        if num_pages < 1 or offset < 0:
            raise InvalidConfig(f"{num_pages} pages from offset {offset} of a file are none")
        with self._paging_lock, self._guarded():
            pages = self._attach_file(fd, offset, num_pages)
            for page in pages:
                self._map_counts[page] = 0
            return pages

    def release(self, pages: Sequence[Page]) -> None:
        """Return pages to the system. Raises InvalidOperation if one is mapped or unknown.

        A call that the system refuses (DriverError) loses the pages all the same: what it did
        not take back stays allocated, and none of `pages` may be used again.
        """
        with self._guarded():
            for page in pages:
                count = self._map_counts.get(page)
                if count is None:
                    raise InvalidOperation(f"page {page} does not exist (released twice?)")
                if count:
                    raise InvalidOperation(f"page {page} is still mapped at {count} addresses")
            if len(set(pages)) != len(pages):
                raise InvalidOperation("a page is named twice in one release")
            try:
                self._release(pages)
            finally:
                for page in pages:
                    del self._map_counts[page]

    # -- pages that change hands -------------------------------------------------------------

    def open_segment(self) -> Segment:
        """A name for pages that can be handed to another process, and no others with them.

        It has memory from its first page on and until its last is released. Raises
        InvalidOperation where there are none (`has_segments`).
        """
        with self._guarded():
            if not self.has_segments:
                raise InvalidOperation(f"memory of {self.device} has no segments")
            self._next_segment += SEGMENT_PAGES
            return Segment(self._next_segment - SEGMENT_PAGES)

    def create_in(self, pages: Sequence[Page]) -> None:
        """Create these very pages, each named by `page_in(segment, place)`, zero-filled.

        Adjacent places take one mapping. Raises OutOfPages or OutOfMappings (of descriptors), with
        none created, InvalidOperation if one exists or is no segment's.
        """
        with self._paging_lock:
            with self._guarded():
                for page in pages:
                    if page in self._map_counts or not is_of_segment(page):
                        raise InvalidOperation(f"page {page} exists already, or is no segment's")
                if len(set(pages)) != len(pages):
                    raise InvalidOperation("a page is to be created twice")
            self._create_in(pages)
            with self._lock:
                self._map_counts.update(dict.fromkeys(pages, 0))

    def copy_page(self, source: Page, target: Page) -> None:
        """Copy the bytes of one page of a segment to another, mapped or not."""
        with self._guarded():
            if not {source, target} <= self._map_counts.keys():
                raise InvalidOperation(f"page {source} or page {target} does not exist")
            self._copy_page(source, target)

    def bundle_of(self, page: Page) -> int | None:
        """The name of the pages that a page is handed over with; None if it cannot be."""
        return self._bundle_of(page)

    def bundle_size(self, bundle: int) -> int:
        """How many live pages a bundle has."""
        with self._guarded():
            return self._bundle_size(bundle)

    def lend(
        self, pages: Sequence[Page], staying: Sequence[Page] = ()
    ) -> tuple[list[int], list[PageRun]]:
        """Descriptors by which another process can map `pages`, and where they lie behind them.

        The runs are in the order of `pages`, and end where a page does not lie behind the one
        before; the descriptors are the caller's to close. Whoever has them can read all that is in
        the same bundles. So nothing may be but `pages` and `staying`, which is the same owner's and
        is not handed over; InvalidOperation otherwise.
        """
        with self._guarded():
            if not self._map_counts.keys() >= {*pages, *staying}:
                raise InvalidOperation("pages that do not exist cannot be handed over")
            found = Counter(map(self._bundle_of, {*pages, *staying}))
            for bundle, count in found.items():
                if bundle is None:
                    raise InvalidOperation("a page cannot be handed to another process")
                if count != self._bundle_size(bundle):
                    raise InvalidOperation("others' pages would be handed over with these")
            return self._lend(pages)

    def borrow(self, descriptors: Sequence[int], runs: Sequence[PageRun]) -> list[Page]:
        """The pages of `runs`, in order, that another process lent; it owns them until `own`.

        Releasing them leaves their memory to it. The descriptors may be closed afterwards. Raises
        InvalidOperation if they are not what a driver with pages of this size lends.
        """
        with self._paging_lock, self._guarded():
            check_runs([*runs], len(descriptors))
            pages = self._borrow(descriptors, runs)
            self._map_counts.update(dict.fromkeys(pages, 0))
            return pages

    def own(self, pages: Sequence[Page]) -> None:
        """Own what was borrowed: with `release` its memory goes back to the system."""
        self._set_owned(pages, True)

    def disown(self, pages: Sequence[Page]) -> None:
        """Leave what was lent to the process that has it now: `release` takes no memory from it."""
        self._set_owned(pages, False)

    def _set_owned(self, pages: Sequence[Page], is_owned: bool) -> None:
        with self._guarded():
            for page in pages:
                if page not in self._map_counts:
                    raise InvalidOperation(f"page {page} does not exist")
            self._note_owned(pages, is_owned)

    # -- mapping ---------------------------------------------------------------------------

    def map(self, address: int, pages: Sequence[Page]) -> None:
        """Back the run of `len(pages)` pages at `address`, in order, readable and writable.

        A page may be mapped at several addresses at once (aliasing). Raises InvalidOperation if
        an address is taken or not reserved, OutOfMappings if the budget is spent, DriverError if
        a call fails; in each case with nothing mapped.
        """
        if not pages:
            return
        with self._guarded():
            reservation = self._check_run(address, len(pages))
            for index, page in enumerate(pages):
                if page not in self._map_counts:
                    raise InvalidOperation(f"page {page} does not exist")
                if address + index * self.page_bytes in self._page_table:
                    raise InvalidOperation(
                        f"{address + index * self.page_bytes:#x} is already mapped"
                    )
            self._map(address, pages)
            for index, page in enumerate(pages):
                self._page_table[address + index * self.page_bytes] = page
                self._map_counts[page] += 1
            reservation.num_mapped += len(pages)

    def unmap(self, address: int, size: int) -> None:
        """Take the backing of `[address, address + size)` away; the range stays reserved.

        Every page of it must be mapped. The caller answers for no work in flight touching the
        range (see `record_fence`). Raises InvalidOperation if a page is not mapped, DriverError
        if a call fails. Where taking a part of a mapping away leaves more mappings than before
        (the host), it may raise OutOfMappings; unmapping a stretch up to its unmapped neighbours
        never does.
        """
        self._check_multiple("size", size)
        num_pages = size // self.page_bytes
        with self._guarded():
            reservation = self._check_run(address, num_pages)
            addresses = range(address, address + size, self.page_bytes)
            for page_address in addresses:
                if page_address not in self._page_table:
                    raise InvalidOperation(f"{page_address:#x} is not mapped")
            self._unmap(address, num_pages)
            for page_address in addresses:
                self._map_counts[self._page_table.pop(page_address)] -= 1
            reservation.num_mapped -= num_pages

    def exchange(self, address: int, page: Page) -> None:
        """Put `page` in place of the one that is mapped at `address`.

        As `unmap` and `map`, but where it raises (OutOfMappings, DriverError), the page before is
        there as it was. The caller answers for no work in flight touching it.
        """
        with self._guarded():
            self._check_run(address, 1)
            before = self._page_table.get(address)
            if before is None:
                raise InvalidOperation(f"{address:#x} is not mapped")
            if page not in self._map_counts:
                raise InvalidOperation(f"page {page} does not exist")
            self._exchange(address, before, page)
            self._page_table[address] = page
            self._map_counts[before] -= 1
            self._map_counts[page] += 1

    def page_at(self, address: int) -> Page | None:
        """The page mapped with its first byte at `address`, or None."""
        return self._page_table.get(address)

    def mapped(self, address: int, size: int) -> dict[int, Page]:
        """The pages mapped in `[address, address + size)`, by address. For checks: it is slow."""
        with self._lock:
            return {a: p for a, p in self._page_table.items() if address <= a < address + size}

    # -- use -------------------------------------------------------------------------------

    def tensor(
        self, address: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """A tensor over `address`, without a copy; `strides` in elements.

        It may span unmapped addresses, which must not be touched. It keeps nothing alive: once
        the reservation is freed the tensor must not be used. Raises InvalidOperation if it would
        reach outside one reservation.
        """
        extent = strided_extent(shape, strides) * dtype.itemsize
        with self._guarded():
            if self._space.around(address, extent) is None:
                raise InvalidOperation(
                    f"a tensor of {extent} bytes at {address:#x} leaves its reservation"
                )
            return self._tensor(address, shape, strides, dtype)

    @contextmanager
    def still(self) -> Iterator[None]:
        """While it lasts no page comes, goes or moves: other threads that ask for it wait."""
        with self._paging_lock, self._guarded():
            yield

    @abstractmethod
    def record_fence(self) -> Fence:
        """Mark the work launched so far. Unmapping what it touches must wait for the fence."""

    @property
    @abstractmethod
    def num_mappings(self) -> int:
        """Mappings in use, in the unit that the system limits (VMAs, driver mappings)."""

    @property
    @abstractmethod
    def max_mappings(self) -> int:
        """The budget of `num_mappings`, kept below the system's own limit."""

    @property
    def num_pages(self) -> int:
        """Physical pages alive."""
        return len(self._map_counts)

    @property
    def reserved_bytes(self) -> int:
        """Address space reserved, backed or not."""
        return sum(reservation.size for reservation in self._space)

    def close(self) -> None:
        """Unmap, release and free everything; a second call does nothing.

        The caller answers for work in flight and for tensors, which dangle from here on. If a
        call fails (DriverError), what is left stays open and `close` may be called again.
        """
        if self._closed:
            return
        with self._paging_lock, self._guarded():
            for address, size in list(self._mapped_stretches()):
                self.unmap(address, size)
            if self._map_counts:
                self.release(list(self._map_counts))
            for reservation in self._space:
                self.free(reservation.address)
            self._close()
            self._closed = True

    def __enter__(self) -> "VmemDriver":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- what a subclass provides: the calls, with arguments already checked ----------------

    @abstractmethod
    def _reserve(self, size: int) -> int: ...

    @abstractmethod
    def _free(self, address: int, size: int) -> None: ...

    @abstractmethod
    def _create(self, num_pages: int) -> list[Page]:
        """Called without the lock of the page table, and one at a time."""

    def _create_for(self, homes: Sequence[int]) -> list[Page]:
        """As `_create`, for pages whose addresses are known."""
        return self._create(len(homes))

    def _attach_file(self, fd: int, offset: int, num_pages: int) -> list[Page]:
        """Refuses: only the host's memory can be a file's."""
        raise InvalidOperation(
            f"a file cannot be mapped as memory of {self.device}; read it into pages instead"
        )

    @abstractmethod
    def _release(self, pages: Sequence[Page]) -> None: ...

    def _create_in(self, pages: Sequence[Page]) -> None:
        """As `_create`, for drivers that have segments."""
        raise InvalidOperation(f"memory of {self.device} has no segments")

    def _copy_page(self, source: Page, target: Page) -> None:
        raise InvalidOperation(f"memory of {self.device} has no segments")

    @abstractmethod
    def _bundle_of(self, page: Page) -> int | None: ...

    @abstractmethod
    def _bundle_size(self, bundle: int) -> int: ...

    @abstractmethod
    def _lend(self, pages: Sequence[Page]) -> tuple[list[int], list[PageRun]]: ...

    @abstractmethod
    def _borrow(self, descriptors: Sequence[int], runs: Sequence[PageRun]) -> list[Page]: ...

    @abstractmethod
    def _note_owned(self, pages: Sequence[Page], is_owned: bool) -> None: ...

    @abstractmethod
    def _map(self, address: int, pages: Sequence[Page]) -> None: ...

    @abstractmethod
    def _unmap(self, address: int, num_pages: int) -> None: ...

    @abstractmethod
    def _exchange(self, address: int, before: Page, page: Page) -> None: ...

    @abstractmethod
    def _tensor(
        self, address: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor: ...

    @abstractmethod
    def _close(self) -> None: ...

    @property
    def _alignment(self) -> int:
        """What reservations are aligned to, in bytes."""
        return self.page_bytes & -self.page_bytes

    def _count(self, kind: str, start_s: float) -> None:
        """Account for a call of `kind` that began at `start_s` of `time.perf_counter`."""
        self.counters[kind] += 1
        self.call_times_s[kind] += time.perf_counter() - start_s

    # -- the page table --------------------------------------------------------------------

    def _mapped_stretches(self) -> Iterator[tuple[int, int]]:
        """The address and size of every longest mapped stretch within one reservation."""
        addresses = sorted(self._page_table)
        start = 0
        for index in range(1, len(addresses) + 1):
            if (
                index == len(addresses)
                or addresses[index] != addresses[index - 1] + self.page_bytes
                or self._space.at(addresses[index]) is not None
            ):
                yield addresses[start], (index - start) * self.page_bytes
                start = index

    # -- checks ----------------------------------------------------------------------------

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise InvalidOperation(f"this driver of {self.device} is closed")
            yield

    def _check_multiple(self, name: str, value: int) -> None:
        if value <= 0 or value % self.page_bytes:
            raise InvalidConfig(
                f"{name} is {value}, not a positive multiple of the page size, {self.page_bytes}"
            )

    def _check_run(self, address: int, num_pages: int) -> Reservation:
        reservation = self._space.around(address, num_pages * self.page_bytes)
        if reservation is None:
            raise InvalidOperation(
                f"{num_pages} pages at {address:#x} do not lie within one reservation"
            )
        if (address - reservation.address) % self.page_bytes:
            raise InvalidOperation(f"{address:#x} is not aligned to {self.page_bytes} bytes")
        return reservation
