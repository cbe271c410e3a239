"""The few Linux calls behind the host driver, and what the system says of its limits.

Python's own `mmap` module can neither reserve without backing nor map at a chosen address, so the
calls go to the C library through ctypes, which releases the interpreter lock around each.
"""

import ctypes
import mmap as _mmap
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from errno import EINTR
from pathlib import Path

PAGE_SIZE = _mmap.PAGESIZE
HUGE_PAGE_SIZE = 2 << 20

PROT_NONE = 0
PROT_READ = _mmap.PROT_READ
PROT_READ_WRITE = _mmap.PROT_READ | _mmap.PROT_WRITE
MAP_SHARED = _mmap.MAP_SHARED
MAP_PRIVATE = _mmap.MAP_PRIVATE
MAP_NORESERVE = 0x4000
MAP_POPULATE = 0x8000
MAP_FIXED = 0x10
MAP_UNBACKED = MAP_PRIVATE | _mmap.MAP_ANONYMOUS | MAP_NORESERVE
MADV_DONTNEED = 4
MADV_COLLAPSE = 25
F_DUPFD_CLOEXEC = 1030
F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SHRINK = 0x02
MEMFD_FLAGS = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE with FALLOC_FL_KEEP_SIZE, which it requires

Syscall = Callable[..., int]

_libc = ctypes.CDLL(None, use_errno=True)


def _declare(name: str, *argtypes: type) -> Syscall:
    function = _libc[name]
    function.argtypes = argtypes
    function.restype = ctypes.c_ssize_t if name == "mmap" else ctypes.c_int
    return function


_address, _size, _int, _offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
mmap = _declare("mmap", _address, _size, _int, _int, _int, _offset)
munmap = _declare("munmap", _address, _size)
madvise = _declare("madvise", _address, _size, _int)
fallocate = _declare("fallocate", _int, _int, _offset, _offset)
fcntl = _declare("fcntl", _int, _int, _int)
memfd_create = _declare("memfd_create", ctypes.c_char_p, ctypes.c_uint)


def call(function: Syscall, *args: int | bytes | None) -> int:
    """Call `function`, again if a signal interrupted it; raise OSError where it returns -1."""
    while True:
        result = function(*args)
        if result != -1:
            return result
        error = ctypes.get_errno()
        if error != EINTR:
            raise OSError(error, "the system call failed")


def max_map_count() -> int:
    """How many mappings (VMAs) the system allows a process."""
    return int(Path("/proc/sys/vm/max_map_count").read_text())


def max_open_files() -> int:
    """How many file descriptors the system allows the process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if limit == resource.RLIM_INFINITY else limit


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can have without swapping, in bytes, reclaimable cache included.

    The least of what the system has and of what every control group that the process is in has
    left, its own and those above. Asking first matters: past a group's limit the kernel kills the
    process instead of failing the call. `root` stands for `/`.
    """
    available = _fields(root / "proc/meminfo")["MemAvailable:"] * 1024
    return max(0, min([available, *_group_rooms(root)]))


@dataclass(frozen=True)
class _Hierarchy:
    """Where a version of control groups keeps its figures on memory."""

    mount: str
    limit: str
    usage: str
    cache: tuple[str, ...]  # of memory.stat: what the kernel reclaims on demand


_V1 = _Hierarchy(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
_V2 = _Hierarchy(
    "sys/fs/cgroup",
    "memory.max",
    "memory.current",
    ("active_file", "inactive_file", "slab_reclaimable"),
)


def _group_rooms(root: Path) -> Iterator[int]:
    """What each control group with a limit has left, from the process's own up to the root."""
    own = root / "proc/self/cgroup"
    lines = own.read_text().splitlines() if own.exists() else ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        hierarchy = _V1 if controllers else _V2
        parts = [part for part in path.split("/") if part]
        # A container often sees its own group as the root, and a path that leads outside of it.
        for depth in range(0 if ".." in parts else len(parts), -1, -1):
            folder = root.joinpath(hierarchy.mount, *parts[:depth])
            try:
                limit = (folder / hierarchy.limit).read_text().strip()
                if limit == "max":
                    continue
                usage = int((folder / hierarchy.usage).read_text())
                stat = _fields(folder / "memory.stat")
            except OSError:  # no such group here, or it was removed meanwhile
                continue
            yield int(limit) - usage + sum(stat.get(name, 0) for name in hierarchy.cache)


def _fields(path: Path) -> dict[str, int]:
    """A `/proc`-style file of `name number …` lines."""
    words = (line.split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which may have to be made first."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def mapped_files(paths: Iterable[str | Path]) -> list[tuple[int, int]]:
    """Where files are mapped, as (start, end), neighbours joined; links are followed."""
    resolved = {os.path.realpath(path) for path in paths}
    found: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        if path not in resolved:
            continue
        start, end = (int(part, 16) for part in span.split("-"))
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def drop_pages(address: int, num_bytes: int) -> None:
    """Let the whole pages within a mapped file go; they are read again when touched."""
    first = -(-address // PAGE_SIZE) * PAGE_SIZE
    last = (address + num_bytes) // PAGE_SIZE * PAGE_SIZE
    if first < last:
        call(madvise, first, last - first, MADV_DONTNEED)
