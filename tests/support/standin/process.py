"""What the kernel knows of this process: its mappings, and what becomes of a forked child."""

import faulthandler
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple


class Mapped(NamedTuple):
    """One line of /proc/self/maps, cut to the range asked for."""

    start: int
    end: int
    permissions: str
    offset: int  # into the file behind it; 0 where there is none


def kernel_mappings(address: int, size: int) -> list[Mapped]:
    """The kernel's mappings that make up `[address, address + size)`."""
    return kernel_mappings_of([(address, size)])


def kernel_mappings_of(ranges: Iterable[tuple[int, int]]) -> list[Mapped]:
    """The kernel's mappings that make up several ranges, each an address and a size.

    All from one reading, whose lines are in order: PyTorch's libraries alone are thousands.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = []
    for address, size in ranges:
        for line in lines[bisect_right(lines, address, key=_end_of) :]:
            span, permissions, offset, *_ = line.split()
            start, end = (int(text, 16) for text in span.split("-"))
            if start >= address + size:
                break
            cut = max(start, address)
            in_file = int(offset, 16) + cut - start if permissions.endswith("s") else 0
            found.append(Mapped(cut, min(end, address + size), permissions, in_file))
    return found


def _end_of(line: str) -> int:
    return int(line[line.index("-") + 1 : line.index(" ")], 16)


def run_in_fork(function: Callable[[], int]) -> int:
    """Run `function` in a forked child; its result, or minus the signal that ended the child."""
    with warnings.catch_warnings():
        # Python warns that threads (PyTorch's) do not survive; the child needs none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        result = 99
        try:
            faulthandler.disable()  # an expected fault needs no traceback
            result = function()
        finally:
            os._exit(result)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
