"""Memory for weights: they are read in order, over and over, and laid out anew at load."""

import ctypes
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

from ..vmem import linux

_HUGE_PAGE = 2 << 20

_libc = ctypes.CDLL(None)


def empty_apart(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU in memory of its own, which goes back to the system with it.

    It lies on huge pages where whole ones fit: a weight read in order was read 1.1 to 1.2 times as
    fast there, since fetching ahead ends with a page.
    """
    count = math.prod(shape)
    num_bytes = count * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    whole = num_bytes // _HUGE_PAGE * _HUGE_PAGE
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # or a short weight would take a whole one
        if whole:
            memory.madvise(mmap.MADV_HUGEPAGE, offset, whole)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def trim_heap() -> None:
    """Give back what is free within the C library's heap, where it knows how to.

    Weights that are laid out anew, one after the other, leave holes there as large as they were.
    """
    if trim := getattr(_libc, "malloc_trim", None):
        trim(ctypes.c_size_t(0))


def drop_file_pages(tensor: torch.Tensor, files: Sequence[tuple[int, int]]) -> None:
    """Drop the pages of a tensor that lies in one of `files`: the file has them, if need be.

    A file stays mapped as long as any tensor lies in it, and its pages would stay resident. Only
    for a tensor as it was read: what was written to it is gone with them.
    """
    if lies_in(tensor, files):
        with suppress(OSError):  # memory that is locked
            linux.drop_pages(tensor.data_ptr(), tensor.nbytes)


def lies_in(tensor: torch.Tensor, files: Sequence[tuple[int, int]]) -> bool:
    """Whether the memory of a tensor is that of a mapped file."""
    address, num_bytes = tensor.data_ptr(), tensor.nbytes
    return any(start <= address and address + num_bytes <= end for start, end in files)
