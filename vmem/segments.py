"""The segments of the host's memory: a memfd each, which another process can be given.

The page at place n of a segment is the stretch of its memfd at offset n * page_bytes. Files are
sparse, so places may be chosen as they suit. A memfd cannot be made shorter, or whoever else maps
it would be ended by SIGBUS; holes may be punched into it by its owner.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from . import linux
from .errors import DriverError, InvalidOperation, OutOfMappings
from .pages import Page, PageRun, Segment, adjacent_runs, page_in, segment_of

Call = Callable[..., int]
"""Makes a system call: the kind it counts as, the function, its arguments, and `shortage`."""


@dataclass
class _File:
    fd: int
    num_pages: int = 0


class Segments:
    """Which segments of a driver have memory. Not for use from several threads at once.

    Args:
        page_bytes: size of a page.
    """

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._files: dict[Segment, _File] = {}
        self._foreign: set[Page] = set()  # pages that another process owns

    def locate(self, page: Page) -> tuple[int, int]:
        """Descriptor and offset of a page's memory."""
        segment = _segment(page)
        return self._files[segment].fd, (page - segment) * self._page_bytes

    def num_pages(self, segment: Segment) -> int:
        """How many pages of a segment have memory."""
        file = self._files.get(segment)
        return 0 if file is None else file.num_pages

    # -- coming and going ------------------------------------------------------------------

    def open(self, pages: Sequence[Page], call: Call) -> None:
        """Count pages that are to be made, with a memfd for all of them; `remove` undoes it.

        Raises OutOfMappings, with none counted, if descriptors run short.
        """
        with ExitStack() as undo:
            for segment in {_segment(page) for page in pages}.difference(self._files):
                self._files[segment] = _File(self._make_file(call))
                undo.callback(self._close, segment)
                fd = self._files[segment].fd
                call("create", linux.fcntl, fd, linux.F_ADD_SEALS, linux.F_SEAL_SHRINK)
            undo.pop_all()
        self.add(pages)

    @staticmethod
    def _make_file(call: Call) -> int:
        name, flags = b"vkv-segment", linux.MEMFD_FLAGS
        try:
            return call("create", linux.memfd_create, name, flags, shortage=OutOfMappings)
        except OutOfMappings as error:
            raise OutOfMappings(
                f"{error}; every slot takes a descriptor, so raise the limit on open files "
                f"({linux.max_open_files()})"
            ) from error

    def add(self, pages: Iterable[Page]) -> None:
        """Count pages of segments that have a memfd."""
        for segment, count in Counter(map(_segment, pages)).items():
            self._files[segment].num_pages += count

    def remove(self, pages: Sequence[Page]) -> None:
        """Forget pages, and close what has none left."""
        self._foreign.difference_update(pages)
        for segment, count in Counter(map(_segment, pages)).items():
            self._files[segment].num_pages -= count
            if not self._files[segment].num_pages:
                self._close(segment)

    def _close(self, segment: Segment) -> None:
        os.close(self._files.pop(segment).fd)

    # -- changing hands --------------------------------------------------------------------

    def is_foreign(self, page: Page) -> bool:
        """Whether another process owns a page."""
        return page in self._foreign

    def note_owned(self, pages: Iterable[Page], is_owned: bool) -> None:
        """Note whose pages are."""
        if is_owned:
            self._foreign.difference_update(pages)
        else:
            self._foreign.update(pages)

    def lend(self, pages: Sequence[Page], call: Call) -> tuple[list[int], list[PageRun]]:
        """A new descriptor a segment, and where the pages lie."""
        indices: dict[Segment, int] = {}
        descriptors: list[int] = []
        runs: list[PageRun] = []
        with ExitStack() as undo:
            for first, count in adjacent_runs(pages):
                segment = _segment(Page(first))
                if segment not in indices:
                    fd = self._files[segment].fd
                    own = call("lend", linux.fcntl, fd, linux.F_DUPFD_CLOEXEC, 0)
                    undo.callback(os.close, own)
                    indices[segment] = len(descriptors)
                    descriptors.append(own)
                runs.append(PageRun(indices[segment], first - segment, count))
            undo.pop_all()
        return descriptors, runs

    def borrow(
        self,
        descriptors: Sequence[int],
        runs: Sequence[PageRun],
        segments: Sequence[Segment],
        call: Call,
    ) -> list[Page]:
        """Take in, as `segments`, what another process lent."""
        with ExitStack() as undo:
            files: list[int] = []
            for fd in descriptors:
                files.append(call("borrow", linux.fcntl, fd, linux.F_DUPFD_CLOEXEC, 0))
                undo.callback(os.close, files[-1])
            for index, fd in enumerate(files):
                end = max(run.place + run.num_pages for run in runs if run.descriptor == index)
                self._check(fd, end * self._page_bytes, call)
            undo.pop_all()
        self._files.update(
            (segment, _File(fd)) for segment, fd in zip(segments, files, strict=True)
        )
        pages = [
            page_in(segments[run.descriptor], place)
            for run in runs
            for place in range(run.place, run.place + run.num_pages)
        ]
        self.add(pages)
        self._foreign.update(pages)
        return pages

    @staticmethod
    def _check(fd: int, num_bytes: int, call: Call) -> None:
        """Touching what a file lacks ends the process, so it must have all and keep it."""
        try:
            seals = call("borrow", linux.fcntl, fd, linux.F_GET_SEALS, 0)
        except DriverError as error:
            if getattr(error.__cause__, "errno", None) != errno.EINVAL:
                raise
            raise InvalidOperation("a descriptor came that is no memory") from error
        if not seals & linux.F_SEAL_SHRINK or os.fstat(fd).st_size < num_bytes:
            raise InvalidOperation("a descriptor came whose memory is, or may become, too short")


def _segment(page: Page) -> Segment:
    segment = segment_of(page)
    assert segment is not None, "a segment was asked of a page without one"
    return segment
