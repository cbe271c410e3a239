"""What only another process can show: unbacked memory faults, and a forked child is refused."""

import ctypes
import signal
import threading

import pytest
import standin.process
import torch
from vkv.vmem import HostDriver
from vkv.vmem.errors import ForkedProcess


@pytest.fixture(params=["host", "standin"])
def driver(request):
    """No real GPU here: the host cannot touch its addresses, and no context survives a fork."""
    if request.param == "standin":
        yield request.getfixturevalue("standin_driver_factory")()
        return
    with HostDriver(page_bytes=16 << 10) as driver:
        yield driver


def touch(address):
    """Read and write one byte in a forked child."""

    def child():
        byte = ctypes.c_uint8.from_address(address)
        byte.value = byte.value + 1
        return 0

    return standin.process.run_in_fork(child)


def test_only_backed_addresses_can_be_touched(driver):
    page = driver.page_bytes
    address = driver.reserve(4 * page)
    assert touch(address) == -signal.SIGSEGV
    pages = driver.create(2)
    driver.map(address + page, pages)
    assert touch(address + page) == 0
    assert touch(address + 3 * page - 1) == 0
    assert touch(address + page - 1) == -signal.SIGSEGV
    assert touch(address + 3 * page) == -signal.SIGSEGV
    driver.unmap(address + page, page)
    assert touch(address + page) == -signal.SIGSEGV
    assert touch(address + 2 * page) == 0


def test_a_forked_child_is_refused_every_verb(driver):
    page = driver.page_bytes
    address = driver.reserve(2 * page)
    pages = driver.create(2)
    driver.map(address, pages[:1])
    verbs = [
        lambda: driver.reserve(page),
        lambda: driver.free(address),
        lambda: driver.create(1),
        lambda: driver.release(pages[1:]),
        lambda: driver.map(address + page, pages[1:]),
        lambda: driver.unmap(address, page),
        lambda: driver.tensor(address, (1,), (1,), torch.uint8),
        lambda: driver.mapped(address, page),
        lambda: driver.still().__enter__(),
        driver.close,
    ]

    def child():
        signal.alarm(20)  # ends one that waits for a lock that nobody holds there
        for index, verb in enumerate(verbs):
            try:
                verb()
            except ForkedProcess:
                continue
            return index + 1
        return 0

    held, go_on = threading.Event(), threading.Event()

    def work():
        with driver.still():
            held.set()
            go_on.wait(20)

    thread = threading.Thread(target=work)
    thread.start()
    assert held.wait(20)
    assert standin.process.run_in_fork(child) == 0
    go_on.set()
    thread.join()
    driver.unmap(address, page)
