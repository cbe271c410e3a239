"""Where 4-bit and packed weights lie: memory that goes back, on huge pages."""

import ctypes
import re
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch
from vkv.quant import empty_apart, trim_heap


def test_memory_apart_is_advised_to_lie_on_huge_pages_and_goes_back() -> None:
    tensor = empty_apart((3 << 20,), torch.int32)
    address = tensor.data_ptr()
    assert address % (2 << 20) == 0
    assert "hg" in _flags_at(address)  # of private memory: that of files has its own rule
    del tensor
    assert _flags_at(address) == []


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc's heap")
def test_holes_in_the_heap_go_back() -> None:
    held = [torch.ones(25 << 10) for _ in range(640)]  # 100 KiB each, every other let go
    held = held[::2]
    before = _resident_bytes()
    trim_heap()
    assert _resident_bytes() < before - (16 << 20)
    assert all(tensor.sum() == 25 << 10 for tensor in held)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE


def _flags_at(address: int) -> list[str]:
    """Flags of private memory at an address, of /proc/self/smaps; none where nothing is mapped."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = start <= address < end and line.split()[1].endswith("p")
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []
