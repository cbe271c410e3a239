"""A stand-in for the CUDA driver, so that `CudaDriver`'s calls run, checked, without a GPU.

`libcuda.c` is compiled with the system's C compiler and loaded under the name `libcuda.so.1`
before the CUDA bindings look for it. It proves sequences of calls, not speed and not kernels:
the memory is the host's, and so are the tensors over it.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from vkv.vmem import CudaDriver

GRANULARITY = 16 << 10  # light; the real one is 2 MiB
OUT_OF_MEMORY, UNKNOWN = 2, 999  # CUresult
_SOURCE = Path(__file__).with_name("libcuda.c")


class StandInCudaDriver(CudaDriver):
    """The CUDA driver of the library, unchanged but for the device of its tensors."""

    def __init__(self, page_bytes: int | None = None, max_mappings: int = 400_000) -> None:
        super().__init__(0, page_bytes, max_mappings)
        self.device = torch.device("cpu")


class StandIn:
    """The loaded library, and the tests' controls over it. It has one state for the process."""

    def __init__(self, path: Path) -> None:
        # Global and early: the bindings' own dlopen("libcuda.so.1") then finds this one.
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        size, address = ctypes.c_size_t, ctypes.c_uint64
        self._reset = _declare(library.standin_reset, None, size, size, size)
        self._fail_at = _declare(library.standin_fail_at, None, ctypes.c_int64, ctypes.c_int)
        self.begin_work = _declare(library.standin_begin_work, None, address, size)
        self.end_work = _declare(library.standin_end_work, None)
        self.refuse_exportable = _declare(library.standin_refuse_exportable, None)
        self.num_files = _declare(library.standin_num_files, size)
        self.failure_pending = _declare(library.standin_failure_pending, ctypes.c_int)
        self.calls = _declare(library.standin_calls, ctypes.c_uint64)
        self._held = {
            name: _declare(getattr(library, f"standin_{name}"), size)
            for name in (
                "memory_used",
                "num_mappings",
                "num_reservations",
                "num_streams",
                "num_events",
                "num_retained",
            )
        }

    def reset(self, memory_limit: int = 1 << 30, mapping_limit: int = 1 << 16) -> None:
        """Forget everything, as after a reboot. No driver on it may be used afterwards."""
        self._reset(GRANULARITY, memory_limit, mapping_limit)

    def fail_at(self, call: int, status: int = UNKNOWN) -> None:
        """Let the `call`-th driver call from now (1 is the next) fail with `status`; 0: none."""
        self._fail_at(call, status)

    def held(self) -> dict[str, int]:
        """What a driver holds: bytes of memory, mappings, reservations, streams, events, …"""
        return {name: count() for name, count in self._held.items()}


def _declare(function, restype, *argtypes):
    function.restype, function.argtypes = restype, argtypes
    return function


@functools.cache
def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@functools.cache
def load() -> StandIn:
    """Compile the library, once a version of its source, and load it, once a process."""
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    folder = _SOURCE.parent / "__pycache__" / digest  # not a shared folder: it will be executed
    path = folder / "libcuda.so.1"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{os.getpid()}.so"  # renamed when whole: test runs may race
        flags = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")
        name = "-Wl,-soname,libcuda.so.1"
        subprocess.run([compiler(), *flags, name, "-o", fresh, _SOURCE], check=True)
        fresh.rename(path)
    return StandIn(path)
