"""Fixtures every folder's tests share: drivers of virtual memory, and the marker for GPUs."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ready_python
import standin
import torch
from hypothesis import settings
from vkv.vmem import CudaDriver, HostDriver, VmemDriver

if TYPE_CHECKING:
    from vkv import LLM

pytest_plugins = ("flash_standin",)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nothing did yet

# Times vary on shared machines, and no test here asserts one.
settings.register_profile("vkv", deadline=None)
settings.load_profile("vkv")


def pytest_configure() -> None:
    """What a shell runs in the background ignores Ctrl-C, which tests send to themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # a machine with a GPU may have no xdist
def pytest_xdist_auto_num_workers() -> int:
    """Each worker imports PyTorch; those on one GPU would see each other's memory."""
    return 0 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """Tests collect garbage: none is among the modules and the tests that are there by now."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or it would outlive the interpreter, and libraries would complain of leaks as that ends."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def loaded_standin() -> standin.StandIn:
    if torch.cuda.is_available():
        pytest.skip("a real CUDA driver is loaded here, and one process cannot hold both")
    if standin.compiler() is None:
        pytest.skip("the stand-in for the CUDA driver needs a C compiler")
    return standin.load()


@pytest.fixture
def cuda_standin(loaded_standin: standin.StandIn) -> Iterator[standin.StandIn]:
    """The stand-in for libcuda.so.1, fresh; fails the test if drivers leave anything behind."""
    loaded_standin.reset()
    yield loaded_standin
    assert not any(loaded_standin.held().values()), "a driver was not closed, or it leaks"


@pytest.fixture
def standin_driver_factory(
    cuda_standin: standin.StandIn,
) -> Iterator[Callable[..., standin.StandInCudaDriver]]:
    """Makes CUDA drivers on the stand-in, as the class does, and closes them after the test."""
    drivers: list[standin.StandInCudaDriver] = []

    def make(**options: int) -> standin.StandInCudaDriver:
        drivers.append(standin.StandInCudaDriver(**options))
        return drivers[-1]

    yield make
    cuda_standin.end_work()
    for driver in drivers:
        driver.close()


@pytest.fixture(params=["host", "standin", pytest.param("cuda", marks=pytest.mark.gpu)])
def vmem_driver(request: pytest.FixtureRequest) -> Iterator[VmemDriver]:
    """A driver of each kind in turn, with the smallest pages that suit it."""
    if request.param == "standin":
        yield request.getfixturevalue("standin_driver_factory")()
        return
    with HostDriver(page_bytes=16 << 10) if request.param == "host" else CudaDriver() as driver:
        yield driver
        if driver.reserved_bytes:  # or the test has closed it, and a GPU's has no fence any more
            driver.record_fence().wait()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in a folder, as users have it."""
    import zoo  # here: it loads transformers, which many tests do without

    path = tmp_path_factory.mktemp("llama")
    zoo.save_checkpoint(path)
    return path


@pytest.fixture
def llm(llama_folder: Path) -> Iterator["LLM"]:
    """The tiny checkpoint, served in fp32 with small pages."""
    import zoo
    from vkv import LLM

    options = zoo.with_defaults({"max_seqs": 8})
    with LLM(llama_folder, device="cpu", dtype="float32", **options) as llm:
        yield llm
        if not llm.is_closed:
            llm.engine.cache.check_invariants()


@pytest.fixture(scope="session")
def _stand_in_for_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with ready_python.serving(tmp_path_factory.mktemp("ready")) as stand_in:
        yield stand_in


@pytest.fixture
def quick_processes(_stand_in_for_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started as `sys.executable` have the large packages imported already."""
    monkeypatch.setattr(sys, "executable", str(_stand_in_for_python))


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """Ray for all clusters of a module, of which each would start and end its own."""
    pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")
    from vkv.runtime.cluster.instances.launcher import Launcher

    launcher = Launcher()
    yield
    launcher.close()


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks measure the machine's limits on next to nothing, so in no time."""
    from vkv.bench import limits

    monkeypatch.setitem(limits._READ_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(limits._MATRIX_SIZE, "cpu", 16)
