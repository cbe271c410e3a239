"""Native libraries: where one is found, when it is compiled, and what a refusal says."""

import os
import shutil
import time
from pathlib import Path

import pytest
from vkv.vmem.errors import NativeUnavailable
from vkv.vmem.native_library import load_library

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose library has a function `answer` that returns 1; an empty user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "kernels"
    (folder / "native").mkdir(parents=True)
    _write(folder, 1)
    return folder


def _write(package: Path, answer: int) -> None:
    source = package / "native"
    (source / "answer.h").write_text(f"#define ANSWER {answer}\n")
    (source / "answer.c").write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')


def _cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "vkv").iterdir())


def test_sources_are_compiled_once_and_anew_when_they_change(package: Path, tmp_path: Path):
    assert load_library(package).answer() == 1
    (first,) = _cached(tmp_path)
    before = first.stat().st_mtime_ns
    assert load_library(package).answer() == 1
    assert first.stat().st_mtime_ns == before
    _write(package, 2)  # in a header alone
    assert load_library(package).answer() == 2
    assert len(_cached(tmp_path)) == 2


def test_the_wheels_library_is_taken_unless_a_source_is_newer(package: Path, tmp_path: Path):
    load_library(package)
    (made,) = _cached(tmp_path)
    built = package / "_native.abi3.so"
    shutil.move(made, built)
    assert load_library(package).answer() == 1
    assert _cached(tmp_path) == []
    _write(package, 3)
    hour_ago = time.time() - 3600
    os.utime(built, (hour_ago, hour_ago))
    assert load_library(package).answer() == 3
    assert len(_cached(tmp_path)) == 1


def test_without_a_compiler_the_refusal_says_so(package: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NativeUnavailable, match="no C compiler here; install"):
        load_library(package)


def test_what_does_not_compile_leaves_nothing_behind(package: Path, tmp_path: Path):
    (package / "native" / "answer.c").write_text("int answer(void) { return nothing; }\n")
    with pytest.raises(NativeUnavailable, match="nothing"):
        load_library(package)
    assert _cached(tmp_path) == []
    (tmp_path / "cache" / "vkv").rmdir()
    (tmp_path / "cache" / "vkv").write_text("a file where the folder should be")
    with pytest.raises(NativeUnavailable, match="compiling its kernels failed"):
        load_library(package)
