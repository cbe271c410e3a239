"""What is particular to the CUDA driver, run against the stand-in for libcuda.so.1."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from standin import GRANULARITY
from vkv.vmem import CudaDriver
from vkv.vmem.errors import (
    DriverError,
    InvalidConfig,
    InvalidOperation,
    OutOfMappings,
    OutOfPages,
)


def test_access_is_set_once_for_a_run_however_many_pages(standin_driver_factory):
    driver = standin_driver_factory()
    address = driver.reserve(driver.page_bytes * 50)
    driver.map(address, driver.create(50))
    assert driver.counters["set_access"] == 1
    assert driver.counters["map"] == driver.num_mappings == 50


def test_pages_larger_than_the_granularity(standin_driver_factory):
    driver = standin_driver_factory(page_bytes=3 * GRANULARITY)
    address = driver.reserve(driver.page_bytes * 5)
    driver.map(address + driver.page_bytes, driver.create(2))
    driver.tensor(address + driver.page_bytes, (2 * driver.page_bytes,), (1,), torch.uint8).fill_(7)


def test_unmapping_under_work_in_flight_is_caught_and_a_fence_prevents_it(
    cuda_standin, standin_driver_factory
):
    driver = standin_driver_factory()
    size = driver.page_bytes
    address = driver.reserve(size * 4)
    driver.map(address, driver.create(4))
    earlier = driver.record_fence()
    cuda_standin.begin_work(address + size, size)
    earlier.wait()
    with pytest.raises(DriverError, match="ILLEGAL_ADDRESS"):
        driver.unmap(address, size * 4)
    assert driver.num_mappings == cuda_standin.held()["num_mappings"] == 4
    later = driver.record_fence()
    later.wait()
    later.wait()
    driver.unmap(address, size * 4)


def test_fences_not_waited_for_end_with_the_driver(cuda_standin, standin_driver_factory):
    driver = standin_driver_factory()
    fence = driver.record_fence()
    assert cuda_standin.held()["num_events"] == 1
    driver.close()
    assert cuda_standin.held()["num_events"] == 0
    fence.wait()  # nothing is left to wait for


def test_out_of_memory_creates_nothing(cuda_standin, standin_driver_factory):
    cuda_standin.reset(memory_limit=10 * GRANULARITY)
    driver = standin_driver_factory()
    driver.create(2)
    with pytest.raises(OutOfPages, match="cuMemCreate"):
        driver.create(9)
    assert driver.num_pages == 2
    assert cuda_standin.held()["memory_used"] == 2 * driver.page_bytes
    driver.create(8)


def test_the_budget_of_mappings_is_kept_before_the_driver_is_asked(standin_driver_factory):
    driver = standin_driver_factory(max_mappings=3)
    address = driver.reserve(driver.page_bytes * 8)
    pages = driver.create(4)
    calls = driver.counters.total()
    with pytest.raises(OutOfMappings, match="budget of 3"):
        driver.map(address, pages)
    assert driver.counters.total() == calls
    driver.map(address, pages[:3])


def test_running_into_the_drivers_own_limit_of_mappings(cuda_standin, standin_driver_factory):
    cuda_standin.reset(mapping_limit=5)
    driver = standin_driver_factory()
    address = driver.reserve(driver.page_bytes * 8)
    pages = driver.create(3)
    driver.map(address, pages)
    with pytest.raises(OutOfMappings, match="cuMemSetAccess"):
        driver.map(address + 3 * driver.page_bytes, pages)
    assert driver.num_mappings == cuda_standin.held()["num_mappings"] == 3
    driver.map(address + 3 * driver.page_bytes, pages[:2])


def test_a_page_is_cleared_once_so_aliasing_and_remapping_keep_its_contents(
    standin_driver_factory,
):
    driver = standin_driver_factory()
    size = driver.page_bytes
    address = driver.reserve(size * 4)
    page = driver.create(1)
    driver.map(address, page)
    view = driver.tensor(address, (4 * size,), (1,), torch.uint8)
    view[:size] = 9
    driver.map(address + size, page)
    driver.unmap(address, size * 2)
    driver.map(address + 3 * size, page)
    assert bool((view[3 * size :] == 9).all())


def test_a_page_whose_clearing_failed_is_cleared_by_the_next_map(
    cuda_standin, standin_driver_factory
):
    driver = standin_driver_factory()
    address = driver.reserve(driver.page_bytes)
    page = driver.create(1)
    cuda_standin.fail_at(3)  # cuMemMap, cuMemSetAccess, cuMemsetD8Async
    with pytest.raises(DriverError, match="cuMemsetD8Async"):
        driver.map(address, page)
    driver.map(address, page)
    assert not driver.tensor(address, (driver.page_bytes,), (1,), torch.uint8).any()


def test_pages_released_without_ever_being_mapped_are_forgotten(standin_driver_factory):
    driver = standin_driver_factory()
    driver.release(driver.create(3))
    assert not driver._unwritten


def test_any_thread_may_call_and_keeps_the_context_it_had(standin_driver_factory):
    from cuda.bindings import driver as cuda

    driver = standin_driver_factory()
    address = driver.reserve(driver.page_bytes)
    contexts = []

    def work():
        driver.map(address, driver.create(1))
        contexts.append(int(cuda.cuCtxGetCurrent()[1]))
        driver.record_fence().wait()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert contexts == [0]
    assert driver.num_mappings == 1


def test_pages_that_the_driver_refuses_to_release_are_lost_and_the_others_are_not(
    cuda_standin, standin_driver_factory
):
    driver = standin_driver_factory()
    pages = driver.create(3)
    cuda_standin.fail_at(1)
    with pytest.raises(DriverError, match="cuMemRelease"):
        driver.release(pages)
    assert driver.num_pages == 0
    driver.close()
    assert cuda_standin.held()["memory_used"] == driver.page_bytes
    cuda_standin.reset()


def test_a_driver_that_cannot_be_built_holds_nothing(cuda_standin, standin_driver_factory):
    cuda_standin.fail_at(1)
    with pytest.raises(DriverError, match="cuStreamCreate"):
        standin_driver_factory()
    assert not any(cuda_standin.held().values())


@pytest.mark.parametrize("call", ["cuEventCreate", "cuEventRecord"])
def test_a_fence_that_cannot_be_recorded_holds_nothing(cuda_standin, standin_driver_factory, call):
    driver = standin_driver_factory()
    cuda_standin.fail_at(["cuEventCreate", "cuEventRecord"].index(call) + 1)
    with pytest.raises(DriverError, match=call):
        driver.record_fence()
    assert cuda_standin.held()["num_events"] == 0


def test_a_wrong_device_or_page_size_is_refused_with_the_remedy(standin_driver_factory):
    with pytest.raises(InvalidConfig, match="no CUDA device 7; this process sees 1"):
        CudaDriver(7)
    with pytest.raises(InvalidConfig, match="granularity"):
        standin_driver_factory(page_bytes=1000)


@pytest.mark.parametrize(
    ("prelude", "message"),
    [
        ("", "no NVIDIA driver"),
        ("sys.modules['cuda.bindings'] = None", "pip install 'vkv\\[cuda\\]'"),
    ],
)
def test_without_a_driver_or_its_bindings_the_error_says_what_to_install(prelude, message):
    if torch.cuda.is_available():
        pytest.skip("a CUDA driver is here")
    program = f"import sys; {prelude}\nfrom vkv.vmem import open_driver; open_driver('cuda')"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 1
    last = child.stderr.strip().splitlines()[-1]
    assert last.startswith("vkv.vmem.errors.DriverUnavailable")
    assert re.search(message, last)


def test_a_fence_waited_for_twice_leaves_the_next_one_its_event(
    cuda_standin, standin_driver_factory
):
    """CUDA gives the next event the handle of the one that went."""
    driver = standin_driver_factory()
    address = driver.reserve(driver.page_bytes)
    driver.map(address, driver.create(1))
    first = driver.record_fence()
    first.wait()
    cuda_standin.begin_work(address, driver.page_bytes)
    second = driver.record_fence()
    assert first._event == second._event
    first.wait()
    assert cuda_standin.held()["num_events"] == 1
    second.wait()
    driver.unmap(address, driver.page_bytes)  # the work is over


def test_where_no_memory_can_be_handed_over_there_is_memory_all_the_same(
    cuda_standin, standin_driver_factory
):
    cuda_standin.refuse_exportable()
    driver = standin_driver_factory()
    pages = driver.create(3)
    address = driver.reserve(3 * driver.page_bytes)
    driver.map(address, pages)
    assert driver.bundle_of(pages[0]) is None
    with pytest.raises(InvalidOperation, match="cannot be handed"):
        driver.lend(pages)


def test_what_turns_out_not_to_be_exported_is_not_tried_again(cuda_standin, standin_driver_factory):
    driver = standin_driver_factory()
    pages = driver.create(2)
    assert driver.bundle_of(pages[0]) == pages[0]
    cuda_standin.refuse_exportable()
    with pytest.raises(DriverError, match="NOT_SUPPORTED"):
        driver.lend(pages)
    assert driver.bundle_of(pages[0]) is None


def test_a_page_that_is_not_exported_is_not_tried_again_and_others_are(
    cuda_standin, standin_driver_factory
):
    driver = standin_driver_factory()
    one, other = driver.create(2)
    cuda_standin.fail_at(1)
    with pytest.raises(DriverError, match="cuMemExportToShareableHandle"):
        driver.lend([one])
    assert driver.bundle_of(one) is None
    fds, _ = driver.lend([other])
    for fd in fds:
        os.close(fd)
    driver.release([one])
    assert not driver._refused


def test_where_nothing_imported_is_exported_what_is_made_here_still_is(
    cuda_standin, standin_driver_factory
):
    """The reference does not say whether it can be."""
    driver = standin_driver_factory()
    page, other = driver.create(2)
    fds, runs = driver.lend([page])
    (imported,) = driver.borrow(fds, runs)
    os.close(fds[0])
    cuda_standin.refuse_exportable()
    with pytest.raises(DriverError, match="NOT_SUPPORTED"):
        driver.lend([imported])
    assert driver.bundle_of(imported) is None
    assert driver.bundle_of(other) == other
    driver.release([imported])
    assert not driver._imported


def test_drivers_of_one_gpu_name_its_memory_alike(standin_driver_factory):
    names = {standin_driver_factory().memory_name for _ in range(2)}
    assert len(names) == 1
    assert "host" not in names


def test_a_descriptor_keeps_memory_as_long_as_it_is_open(cuda_standin, standin_driver_factory):
    driver = standin_driver_factory()
    pages = driver.create(2)
    address = driver.reserve(2 * driver.page_bytes)
    driver.map(address, pages)
    driver.tensor(address, (2 * driver.page_bytes,), (1,), torch.uint8).fill_(5)
    fds, runs = driver.lend(pages)
    again = driver.borrow(fds, runs)  # by the same process: other pages of the same memory
    assert not {*again} & {*pages}
    driver.unmap(address, 2 * driver.page_bytes)
    driver.release(pages)
    driver.release(again)
    assert cuda_standin.held()["memory_used"] == 2 * driver.page_bytes
    driver.map(address, back := driver.borrow(fds, runs))
    assert driver.tensor(address, (2 * driver.page_bytes,), (1,), torch.uint8).eq(5).all()
    for fd in fds:
        os.close(fd)
    driver.unmap(address, 2 * driver.page_bytes)
    driver.release(back)
    assert cuda_standin.held()["memory_used"] == 0
