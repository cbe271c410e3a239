"""One way to call a C kernel: a workspace that grows as it asks, and an observer that is told.

A kernel takes the addresses of one or two structs. It returns 0 when it is done, or the bytes of
workspace that it lacks, with nothing done.
"""

import ctypes
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

_FIRST_BYTES = 1 << 16  # of a workspace; it grows as kernels ask


class Workspace:
    """Memory for kernels to work in, one at a time, on a page's boundary.

    Attributes:
        address: of its first byte.
        num_bytes: its size.
    """

    def __init__(self) -> None:
        self.grow(_FIRST_BYTES)
        with _guard:
            _workspaces.add(self)

    def grow(self, num_bytes: int) -> None:
        """Have `num_bytes` from now on. It moves, and what was in it is gone."""
        self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.num_bytes = num_bytes


_workspaces: weakref.WeakSet[Workspace] = weakref.WeakSet()
_guard = threading.Lock()  # a set that changes meanwhile cannot be gone through


def workspace_bytes() -> int:
    """Bytes of all workspaces of this process: each thread that calls kernels has one."""
    with _guard:
        return sum(workspace.num_bytes for workspace in _workspaces)


class NativeFunction:
    """The kernel `int64_t vkv_NAME(const struct FIRST *, const struct SECOND *)` of a library.

    Args:
        library: what it is in.
        name: without `vkv_`.
        structs: the types of its one or two arguments. Where the first has the fields `workspace`
            and `workspace_bytes`, calls fill them in with the calling thread's workspace.

    Attributes:
        name: as given.
        address: where its code is, for callers in C.
    """

    def __init__(self, library: ctypes.CDLL, name: str, *structs: type[ctypes.Structure]) -> None:
        self.name = name
        self._function = library[f"vkv_{name}"]
        self._function.argtypes = [ctypes.POINTER(struct) for struct in structs]
        self._function.restype = ctypes.c_int64
        self._needs_workspace = any(field[0] == "workspace" for field in structs[0]._fields_)
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value

    def __call__(self, *args: ctypes.Structure) -> None:
        """Run the kernel to its end, then tell the thread's observer, if it has one."""
        if self._needs_workspace:
            self._run_in_workspace(args)
        else:
            needed = self._function(*args)
            assert not needed, f"vkv_{self.name} has no workspace, and wants {needed} bytes"
        observer = _thread.observer
        if observer is not None:
            observer(self, args)

    def _run_in_workspace(self, args: Sequence[ctypes.Structure]) -> None:
        workspace, first = _thread.workspace, args[0]
        while True:
            first.workspace, first.workspace_bytes = workspace.address, workspace.num_bytes
            needed = self._function(*args)
            if not needed:
                return
            assert needed > 0, f"vkv_{self.name} refuses its arguments"
            workspace.grow(needed)


Observer: TypeAlias = Callable[[NativeFunction, Sequence[ctypes.Structure]], None]
"""Told of a kernel that has run, and of its arguments, which are the caller's and may change."""


class _Thread(threading.local):
    """What every thread has of its own."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.observer: Observer | None = None


_thread = _Thread()


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Have `observer`, and no other, told of every kernel that this thread runs meanwhile."""
    before = _thread.observer
    _thread.observer = observer
    try:
        yield
    finally:
        _thread.observer = before
