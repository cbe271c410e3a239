"""What the kernel knows of this process: its mappings, and what becomes of a forked child."""

import faulthandler
import os
import warnings
from collections.abc import Callable
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
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, offset, *_ = line.split()
        start, end = (int(text, 16) for text in span.split("-"))
        if start < address + size and end > address:
            cut = max(start, address)
            in_file = int(offset, 16) + cut - start if permissions.endswith("s") else 0
            found.append(Mapped(cut, min(end, address + size), permissions, in_file))
    return found


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
