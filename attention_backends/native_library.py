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

from ..vmem.errors import UnsupportedAttention

_SOURCE = Path(__file__).parent / "native"
_BUILT = Path(__file__).parent / "_native.abi3.so"
_UNPACKING_S = 60  # an installer writes a wheel's files within it, in any order
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared")


class AttentionArgs(ctypes.Structure):
    """`struct vkv_attention` of `native/attention.h`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", "lse")),
        *((name, ctypes.c_void_p) for name in ("sinks", "workspace")),
        ("workspace_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("query_starts", "kv_lens", "slots")),
        *((name, ctypes.c_int64) for name in ("query_token_stride", "query_head_stride")),
        ("key_slot_stride", ctypes.c_int64),
        ("key_token_stride", ctypes.c_int64),
        ("key_head_stride", ctypes.c_int64),
        ("value_slot_stride", ctypes.c_int64),
        ("value_token_stride", ctypes.c_int64),
        ("value_head_stride", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("out_token_stride", "out_head_stride")),
        *((name, ctypes.c_int32) for name in ("num_seqs", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int32) for name in ("key_dim", "value_dim", "dtype", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    )


@cache
def load_library() -> ctypes.CDLL:
    """The kernels, compiled now if need be. The GIL is free while they run.

    Raises UnsupportedAttention if there is no library and no way to compile one.
    """
    library = ctypes.CDLL(str(_find()))
    library.vkv_attend.argtypes = [ctypes.POINTER(AttentionArgs)]
    library.vkv_attend.restype = ctypes.c_int64
    library.vkv_instruction_set.argtypes = [ctypes.c_int32]
    library.vkv_instruction_set.restype = ctypes.c_char_p
    return library


def unavailable_reason() -> str | None:
    """Why there can be no library here, or None."""
    try:
        load_library()
    except UnsupportedAttention as error:
        return str(error)
    return None


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
    path = _cache_folder() / f"native-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        _compile(path)
    return path


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vkv"


def _compile(path: Path) -> None:
    """Compile into place in one move, so that two processes at once do no harm."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    compiler = compiler or shutil.which("clang")
    if compiler is None:
        raise UnsupportedAttention("its kernels are not built, and there is no C compiler here")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            source = _SOURCE / "attention.c"
            command = [*compiler.split(), *_FLAGS, str(source), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(path)
    except subprocess.CalledProcessError as error:
        raise UnsupportedAttention(f"compiling its kernels failed: {error.stderr}") from error
    except OSError as error:
        raise UnsupportedAttention(f"compiling its kernels failed: {error}") from error
