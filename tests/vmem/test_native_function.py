"""One way to call a kernel: workspaces that grow, and observers of one thread's calls."""

import ctypes
import shutil
import threading
from collections.abc import Sequence

import pytest
from vkv.vmem.native_function import NativeFunction, Workspace, observed
from vkv.vmem.native_library import load_library

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)

SOURCE = """
#include <stdint.h>
#include <string.h>

struct fill { char *workspace; int64_t workspace_bytes, wanted; int32_t runs, aligned; };
int64_t vkv_fill(struct fill *args) {
    if (args->wanted < 0) return -1;
    if (args->workspace_bytes < args->wanted) return args->wanted;
    args->aligned = (uintptr_t)args->workspace % 64 == 0;
    memset(args->workspace, 1, (size_t)args->workspace_bytes);
    args->runs++;
    return 0;
}

struct number { int64_t value; };
int64_t vkv_copy(struct number *to, const struct number *from) {
    to->value = from->value;
    return 0;
}
"""


class Fill(ctypes.Structure):
    _fields_ = (
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("wanted", ctypes.c_int64),
        ("runs", ctypes.c_int32),
        ("aligned", ctypes.c_int32),
    )


class Number(ctypes.Structure):
    _fields_ = (("value", ctypes.c_int64),)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    package = tmp_path_factory.mktemp("package")
    (package / "native").mkdir()
    (package / "native" / "kernels.c").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(package / "cache"))
        return load_library(package)


@pytest.fixture
def fill(library: ctypes.CDLL) -> NativeFunction:
    return NativeFunction(library, "fill", Fill)


@pytest.fixture
def copy(library: ctypes.CDLL) -> NativeFunction:
    return NativeFunction(library, "copy", Number, Number)


class Seen(list[tuple[str, list[ctypes.Structure]]]):
    """An observer that keeps what it is told."""

    def __call__(self, kernel: NativeFunction, args: Sequence[ctypes.Structure]) -> None:
        self.append((kernel.name, list(args)))


def test_two_structs_go_by_address(copy: NativeFunction):
    to, source = Number(), Number(7)
    copy(to, source)
    assert to.value == 7


def test_a_workspace_grows_to_what_a_kernel_asks_and_stays(fill: NativeFunction):
    large = Fill(wanted=5 << 20)
    fill(large)
    assert (large.runs, large.aligned) == (1, 1)
    small = Fill(wanted=10)
    fill(small)
    assert (small.workspace, small.workspace_bytes) == (large.workspace, 5 << 20)


def test_every_thread_has_a_workspace_of_its_own(fill: NativeFunction):
    found = [Fill(wanted=3 << 20), Fill(wanted=1)]
    fill(found[0])
    thread = threading.Thread(target=fill, args=(found[1],))
    thread.start()
    thread.join()
    assert found[1].workspace_bytes < 3 << 20
    assert found[1].runs == 1


def test_a_workspace_is_the_memory_it_says():
    workspace = Workspace()
    workspace.grow(3 << 12)
    ctypes.memset(workspace.address, 1, workspace.num_bytes)
    assert ctypes.string_at(workspace.address, workspace.num_bytes) == b"\1" * (3 << 12)


def test_an_observer_is_told_once_of_what_has_run(fill: NativeFunction, copy: NativeFunction):
    seen = Seen()
    with observed(seen):
        elsewhere = threading.Thread(target=copy, args=(Number(), Number()))
        elsewhere.start()
        elsewhere.join()
        first, to, source = Fill(wanted=9 << 20), Number(), Number(3)
        fill(first)  # which it calls twice
        copy(to, source)
    copy(to, source)
    assert seen == [("fill", [first]), ("copy", [to, source])]
    assert to.value == 3


def test_observers_nest_and_leave_with_an_exception(copy: NativeFunction):
    outer, inner = Seen(), Seen()
    with observed(outer):
        try:
            with observed(inner):
                copy(Number(), Number())
                raise KeyError
        except KeyError:
            copy(Number(), Number())
    copy(Number(), Number())
    assert (len(outer), len(inner)) == (1, 1)


def test_a_kernel_that_refuses_its_arguments_is_a_mistake_of_ours(fill: NativeFunction):
    seen = Seen()
    with observed(seen), pytest.raises(AssertionError, match="vkv_fill refuses"):
        fill(Fill(wanted=-1))
    assert not seen
