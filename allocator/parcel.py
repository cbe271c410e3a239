"""What is said of pages that go to another process, beside the descriptors by which they do."""

from itertools import groupby

import msgspec

from ..vmem.errors import InvalidOperation, TransferError
from .layout import TokenFormat

Streams = tuple[tuple[tuple[int, str, int, int], ...], ...]


class Stretch(msgspec.Struct, frozen=True, array_like=True):
    """Adjacent pages of one range.

    Attributes:
        range_index: the range.
        position: of the first, in pages from the beginning of the range.
        num_pages: how many.
        descriptor: behind which one they lie; None if their bytes are to be copied.
        place: where, in pages from its beginning; 0 if they are copied.
    """

    range_index: int
    position: int
    num_pages: int
    descriptor: int | None = None
    place: int = 0


class Parcel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first tokens of a slot, as pages: plain data, for any wire.

    Attributes:
        memory: whose pages they are (`VmemDriver.memory_name`).
        page_bytes: size of a page.
        dtype, streams: the token format.
        num_tokens: tokens that move.
        num_descriptors: descriptors that come with it.
        stretches: all pages that the tokens lie in, range by range, in order.
        growing: the descriptor behind which the next pages may lie; None if others' might be there.
    """

    page_bytes: int
    dtype: str
    streams: Streams
    num_tokens: int
    num_descriptors: int
    stretches: tuple[Stretch, ...]
    growing: int | None = None
    memory: str = "host"

    @property
    def num_lent_pages(self) -> int:
        """Pages that change hands."""
        return sum(s.num_pages for s in self.stretches if s.descriptor is not None)

    def bytes_of(self, stretch: Stretch, width: int) -> tuple[int, int]:
        """From which byte of its range to which a stretch holds tokens of `width` bytes each."""
        start = stretch.position * self.page_bytes
        stop = min(start + stretch.num_pages * self.page_bytes, self.num_tokens * width)
        return start, stop

    def check(
        self, memory: str, page_bytes: int, token_format: TokenFormat, num_descriptors: int
    ) -> None:
        """Raise InvalidOperation unless the pages can be a slot's of this format, TransferError if
        the parcel contradicts itself."""
        if self.memory != memory:
            raise InvalidOperation(
                f"pages of {self.memory} are none of {memory}; copy the tokens instead"
            )
        theirs = TokenFormat(self.dtype, self.streams)
        if self.page_bytes != page_bytes or theirs != token_format:
            raise InvalidOperation(
                f"pages of {self.page_bytes} bytes of {self.dtype} tokens cannot be mapped by a "
                f"cache of {page_bytes} bytes a page, unless both and the layers in a range are "
                "equal; copy the tokens instead"
            )
        if num_descriptors != self.num_descriptors:
            raise TransferError(f"{num_descriptors} of {self.num_descriptors} descriptors came")
        groups = groupby(self.stretches, key=lambda s: s.range_index)
        by_range = [(index, list(stretches)) for index, stretches in groups]
        indices = [index for index, _ in by_range]
        if self.num_tokens < 0 or indices != [*range(len(theirs.widths) if self.num_tokens else 0)]:
            raise TransferError(f"{self.num_tokens} tokens in pages of the ranges {indices} came")
        for index, stretches in by_range:
            end = 0
            for stretch in stretches:
                if stretch.position != end or stretch.num_pages < 1 or stretch.place < 0:
                    raise TransferError(f"{stretch} does not follow page {end} of its range")
                end += stretch.num_pages
            if end * page_bytes < self.num_tokens * theirs.widths[index]:
                raise TransferError(f"{end} pages of range {index} are too few for its tokens")
        if self.growing is not None and not 0 <= self.growing < num_descriptors:
            raise TransferError(f"pages cannot follow behind descriptor {self.growing}")
