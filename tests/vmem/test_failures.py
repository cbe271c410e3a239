"""Every call that can fail is made to fail, once each, and must leave the state of before."""

import itertools
import os
from errno import ENOMEM, EPERM

import pytest
import torch
from standin import OUT_OF_MEMORY, UNKNOWN
from standin.process import kernel_mappings
from vkv.vmem import HostDriver, linux
from vkv.vmem.errors import DriverError, OutOfMappings, OutOfPages

NUM_PAGES = 12  # of the reservation


class HostRig:
    """A host driver whose k-th system call can be made to fail."""

    shortage, other = ENOMEM, EPERM

    def __init__(self, monkeypatch):
        self.driver = HostDriver(page_bytes=16 << 10)
        self._countdown = 0
        self._status = ENOMEM
        real = linux.call

        def call(function, *args):
            self._countdown -= 1
            if self._countdown == 0:
                raise OSError(self._status, "injected")
            return real(function, *args)

        monkeypatch.setattr(linux, "call", call)

    def fail_at(self, call, status):
        self._countdown, self._status = call, status

    def failure_pending(self):
        return self._countdown > 0

    def held(self):
        return {
            "bytes": os.fstat(self.driver._memfd).st_blocks * 512,
            "punched": sorted(self.driver._punched),
            "next": self.driver._next_page,
        }


class StandInRig:
    """A CUDA driver on the stand-in, which fails on demand itself."""

    shortage, other = OUT_OF_MEMORY, UNKNOWN

    def __init__(self, cuda_standin, driver):
        self.driver = driver
        self.fail_at = cuda_standin.fail_at
        self.failure_pending = cuda_standin.failure_pending
        self.held = cuda_standin.held


@pytest.fixture(params=["host", "standin"])
def rig(request, monkeypatch):
    if request.param == "host":
        rig = HostRig(monkeypatch)
        yield rig
        rig.driver.close()
        return
    factory = request.getfixturevalue("standin_driver_factory")
    yield StandInRig(request.getfixturevalue("cuda_standin"), factory())


def snapshot(rig, address):
    """All that an operation could have changed, as the driver and as the kernel see it."""
    driver = rig.driver
    contents = {
        at: driver.tensor(at, (driver.page_bytes,), (1,), torch.uint8).clone().numpy().tobytes()
        for at in driver._page_table
    }
    kernel = kernel_mappings(address, NUM_PAGES * driver.page_bytes)
    reserved = {one.address: one for one in driver._space}
    books = (dict(driver._page_table), dict(driver._map_counts), reserved)
    mapped = [reservation.num_mapped for reservation in driver._space]
    return contents, kernel, books, mapped, driver.num_mappings, rig.held()


def fail_every_call(rig, address, operation, status, expected):
    """Run `operation` with its first call failing, then its second, … until none is left."""
    failures = 0
    for call in itertools.count(1):
        before = snapshot(rig, address)
        rig.fail_at(call, status)
        try:
            operation()
        except expected:
            assert snapshot(rig, address) == before
            failures += 1
        else:
            assert rig.failure_pending(), f"call {call} failed and nobody noticed"
            rig.fail_at(0, status)
            return failures
    raise AssertionError


@pytest.fixture
def filled(rig):
    """Six pages mapped with a hole, each with contents of its own; four pages punched."""
    driver = rig.driver
    page = driver.page_bytes
    address = driver.reserve(NUM_PAGES * page)
    pages = driver.create(10)
    driver.map(address, pages[:4])
    driver.map(address + 6 * page, [pages[6], pages[8]])
    for index in (0, 1, 2, 3, 6, 7):
        at = address + index * page
        driver.tensor(at, (page,), (1,), torch.uint8).fill_(index + 1)
    driver.release([pages[5], pages[7], pages[9]])
    return address, pages


def test_create(rig, filled):
    for status, expected in ((rig.shortage, OutOfPages), (rig.other, DriverError)):
        create = lambda: rig.driver.create(5)  # noqa: E731
        assert fail_every_call(rig, filled[0], create, status, expected) >= 5


def test_reserve(rig, filled):
    for status in (rig.shortage, rig.other):
        reserve = lambda: rig.driver.reserve(rig.driver.page_bytes)  # noqa: E731
        assert fail_every_call(rig, filled[0], reserve, status, DriverError) >= 1


def test_free(rig, filled):
    spare = rig.driver.reserve(rig.driver.page_bytes)
    free = lambda: rig.driver.free(spare)  # noqa: E731
    assert fail_every_call(rig, filled[0], free, rig.other, DriverError) == 1


@pytest.mark.parametrize("kind", ["shortage", "other"])
def test_map_of_many_runs(rig, filled, kind):
    address, pages = filled
    # Out of memory while clearing a new page is no lack of mappings, so DriverError may come, too.
    expected = (OutOfMappings, DriverError) if kind == "shortage" else DriverError
    driver = rig.driver
    scattered = [pages[4], pages[0], pages[1], pages[8], pages[3]]
    driver.unmap(address, 3 * driver.page_bytes)
    driver.map(address + 4 * driver.page_bytes, pages[:1])
    driver.unmap(address + 3 * driver.page_bytes, 2 * driver.page_bytes)

    def operation():
        driver.map(address, scattered)

    failures = fail_every_call(rig, address, operation, getattr(rig, kind), expected)
    assert failures >= 4
    assert [driver.page_at(address + i * driver.page_bytes) for i in range(5)] == scattered


@pytest.mark.parametrize("kind", ["shortage", "other"])
def test_unmap_of_many_runs(rig, filled, kind):
    address, pages = filled
    driver = rig.driver
    driver.map(address + 4 * driver.page_bytes, [pages[2], pages[4]])

    def operation():
        driver.unmap(address, 8 * driver.page_bytes)

    expected = (OutOfMappings, DriverError) if kind == "shortage" else DriverError
    assert fail_every_call(rig, address, operation, getattr(rig, kind), expected) >= 1
    assert driver.page_at(address) is None
