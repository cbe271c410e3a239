"""The compiled kernels behind `native`: found where the wheel put them, or compiled once.

A wheel carries the library. Where it is absent, or older than its source (an editable checkout),
the system's C compiler makes it in about two seconds, into the user's cache, under a name that
is a digest of the source.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ..errors import QuantError

_SOURCE = Path(__file__).parent / "native"
_BUILT = Path(__file__).parent / "_native.abi3.so"
_UNPACKING_S = 60  # an installer writes a wheel's files within it, in any order
_FLAGS = ("-O3", "-std=gnu11", "-fno-trapping-math", "-fPIC", "-shared")


class Int4Args(ctypes.Structure):
    """`struct vkv_int4` of `native/int4.h`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("inputs", "out", "codes", "scales", "zeros")),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("num_rows", "in_features", "out_features")),
        ("group_size", ctypes.c_int64),
        ("instruction_set", ctypes.c_char_p),
        ("num_threads", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    )


@cache
def load_library() -> ctypes.CDLL:
    """The kernels, compiled now if need be. The GIL is free while they run.

    Raises QuantError if there is no library and no way to compile one.
    """
    library = ctypes.CDLL(str(_find()))
    library.vkv_int4_multiply.argtypes = [ctypes.POINTER(Int4Args)]
    library.vkv_int4_multiply.restype = ctypes.c_int64
    library.vkv_int4_supported.argtypes = [ctypes.c_char_p]
    library.vkv_int4_supported.restype = ctypes.c_int32
    return library


@cache
def instruction_sets() -> tuple[str, ...]:
    """Those of this processor that there are kernels for, the fastest first.

    Raises QuantError as `load_library` does.
    """
    supported = load_library().vkv_int4_supported
    return tuple(name for name in ("avx512_bf16", "avx2") if supported(name.encode()))


@cache
def openmp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that PyTorch has loaded, or None.

    Its threads are shared: a second runtime's would compete with them for the cores.
    """
    with open("/proc/self/maps") as lines:
        loaded = {line.rstrip("\n").split(None, 5)[-1] for line in lines if "omp" in line}
    for path in sorted(loaded):
        if "torch" in path and ".so" in path:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
    return None


def _find() -> Path:
    sources = sorted(_SOURCE.glob("*.[ch]"))
    if _BUILT.exists():
        newest = max(source.stat().st_mtime for source in sources)
        if newest <= _BUILT.stat().st_mtime + _UNPACKING_S:
            return _BUILT
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update(" ".join(_FLAGS).encode())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "vkv" / f"int4-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        _compile(path)
    return path


def _compile(path: Path) -> None:
    """Compile into place in one move, so that two processes at once do no harm."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    compiler = compiler or shutil.which("clang")
    if compiler is None:
        raise QuantError("its kernels are not built, and there is no C compiler here")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            sources = map(str, sorted(_SOURCE.glob("*.c")))
            command = [*compiler.split(), *_FLAGS, *sources, "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(path)
    except subprocess.CalledProcessError as error:
        raise QuantError(f"compiling its kernels failed: {error.stderr}") from error
    except OSError as error:
        raise QuantError(f"compiling its kernels failed: {error}") from error
