"""Native libraries: found where the wheel put them, or compiled once.

A package that has C kernels keeps their sources in its folder `native/`, and a wheel puts the
library made of them beside that. Where it is absent, or older than a source (an editable
checkout), the system's C compiler makes it in a few seconds, into the user's cache, under a name
that is a digest of the sources.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .errors import NativeUnavailable

_BUILT = "_native.abi3.so"  # what a wheel calls a package's library
_UNPACKING_S = 60  # an installer writes a wheel's files within it, in any order
_FLAGS = ("-O3", "-std=gnu11", "-fno-trapping-math", "-fPIC", "-shared")


def load_library(package: Path) -> ctypes.CDLL:
    """The library of the C files in `package / "native"`, compiled now if need be.

    The interpreter's lock is free while its functions run. Raises NativeUnavailable if there is no
    library and no way to compile one.
    """
    return ctypes.CDLL(str(_find(package)))


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


def _find(package: Path) -> Path:
    """The wheel's library if it is no older than its sources, or one in the user's cache."""
    built, sources = package / _BUILT, sorted((package / "native").glob("*.[ch]"))
    if built.exists():
        newest = max(source.stat().st_mtime for source in sources)
        if newest <= built.stat().st_mtime + _UNPACKING_S:
            return built
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update(" ".join(_FLAGS).encode())
    path = _cache_folder() / f"{package.name}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        _compile([source for source in sources if source.suffix == ".c"], path)
    return path


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vkv"


def _compile(sources: list[Path], path: Path) -> None:
    """Compile into place in one move, so that two processes at once do no harm."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    compiler = compiler or shutil.which("clang")
    if compiler is None:
        raise NativeUnavailable(
            "its kernels are not built, and there is no C compiler here; install one (gcc or clang)"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command = [*compiler.split(), *_FLAGS, *map(str, sources), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(path)
    except subprocess.CalledProcessError as error:
        raise NativeUnavailable(f"compiling its kernels failed: {error.stderr}") from error
    except OSError as error:
        raise NativeUnavailable(f"compiling its kernels failed: {error}") from error
