"""Random operations on a driver, compared after each with a model of plain dictionaries."""

import os

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from standin import StandInCudaDriver
from standin.process import kernel_mappings_of
from vkv.vmem import HostDriver, is_of_file
from vkv.vmem.errors import InvalidConfig, InvalidOperation

MAX_PAGES = 12  # of a reservation, and of physical pages alive
Index = st.integers(0, MAX_PAGES - 1)
Count = st.integers(1, 4)


class DriverMachine(RuleBasedStateMachine):
    """The model: what each page holds, where each is mapped, and what is reserved."""

    make_driver = staticmethod(lambda: HostDriver(page_bytes=16 << 10))

    def __init__(self):
        super().__init__()
        self.driver = self.make_driver()
        self.page_bytes = self.driver.page_bytes
        self.contents = {}  # page -> the byte that fills it
        self.backing = {}  # address -> page
        self.reserved = {}  # address -> number of pages

    @rule(num_pages=st.integers(1, MAX_PAGES))
    def reserve(self, num_pages):
        address = self.driver.reserve(num_pages * self.page_bytes)
        size = num_pages * self.page_bytes
        for other, pages in self.reserved.items():
            assert address + size <= other or other + pages * self.page_bytes <= address
        self.reserved[address] = num_pages

    @precondition(lambda self: self.reserved)
    @rule(which=Index)
    def free(self, which):
        address = self._pick(sorted(self.reserved), which)
        if any(at in self.backing for at in self._addresses(address, self.reserved[address])):
            with pytest.raises(InvalidOperation):
                self.driver.free(address)
            return
        self.driver.free(address)
        del self.reserved[address]

    @precondition(lambda self: len(self.contents) < MAX_PAGES)
    @rule(count=Count)
    def create(self, count):
        pages = self.driver.create(count)
        assert not self.contents.keys() & set(pages)
        assert len(set(pages)) == count
        self.contents.update(dict.fromkeys(pages, 0))

    @precondition(lambda self: self.contents)
    @rule(chosen=st.lists(Index, min_size=1, max_size=3, unique=True))
    def release(self, chosen):
        pages = [self._pick(sorted(self.contents), which) for which in chosen]
        if len(set(pages)) < len(pages) or set(pages) & set(self.backing.values()):
            with pytest.raises(InvalidOperation):
                self.driver.release(pages)
            return
        self.driver.release(pages)
        for page in pages:
            del self.contents[page]

    @precondition(lambda self: self.reserved and self.contents)
    @rule(which=Index, offset=Index, chosen=st.lists(Index, min_size=1, max_size=6))
    def map(self, which, offset, chosen):
        address = self._pick(sorted(self.reserved), which)
        run = self._addresses(address + offset * self.page_bytes, len(chosen))
        pages = [self._pick(sorted(self.contents), index) for index in chosen]
        if not self._is_reserved(run) or any(at in self.backing for at in run):
            with pytest.raises(InvalidOperation):
                self.driver.map(run[0], pages)
            return
        self.driver.map(run[0], pages)
        self.backing.update(zip(run, pages, strict=True))

    @precondition(lambda self: self.backing)
    @rule(which=Index, count=Count)
    def unmap(self, which, count):
        run = self._addresses(self._pick(sorted(self.backing), which), count)
        if not self._is_reserved(run) or any(at not in self.backing for at in run):
            with pytest.raises(InvalidOperation):
                self.driver.unmap(run[0], count * self.page_bytes)
            return
        self.driver.unmap(run[0], count * self.page_bytes)
        for at in run:
            del self.backing[at]

    @precondition(lambda self: self.reserved and self.contents)
    @rule(which=Index, offset=Index, chosen=Index)
    def exchange(self, which, offset, chosen):
        address = self._pick(sorted(self.reserved), which) + offset * self.page_bytes
        page = self._pick(sorted(self.contents), chosen)
        if address not in self.backing:
            with pytest.raises(InvalidOperation):
                self.driver.exchange(address, page)
            return
        self.driver.exchange(address, page)
        self.backing[address] = page

    @precondition(lambda self: self.backing)
    @rule(which=Index, value=st.integers(0, 255))
    def write(self, which, value):
        address = self._pick(sorted(self.backing), which)
        if is_of_file(self.backing[address]):  # whose pages nobody writes to
            return
        self._view(address).fill_(value)
        self.contents[self.backing[address]] = value

    @rule(size=st.integers(-1, 1))
    def reserve_an_impossible_size(self, size):
        with pytest.raises(InvalidConfig):
            self.driver.reserve(size)

    @invariant()
    def matches_the_model(self):
        driver = self.driver
        assert driver.num_pages == len(self.contents)
        assert driver.reserved_bytes == sum(self.reserved.values()) * self.page_bytes
        for address, num_pages in self.reserved.items():
            for at in self._addresses(address, num_pages):
                assert driver.page_at(at) == self.backing.get(at)
        for address, page in self.backing.items():
            assert bool((self._view(address) == self.contents[page]).all())

    def teardown(self):
        self.driver.close()
        assert self.driver.num_mappings == self.driver.num_pages == 0

    def _pick(self, items, index):
        return items[index % len(items)]

    def _addresses(self, address, num_pages):
        return [address + index * self.page_bytes for index in range(num_pages)]

    def _is_reserved(self, run):
        return any(
            at <= run[0] and run[-1] < at + num_pages * self.page_bytes
            for at, num_pages in self.reserved.items()
        )

    def _view(self, address):
        return self.driver.tensor(address, (self.page_bytes,), (1,), torch.uint8)


class HostMachine(DriverMachine):
    """With a file, whose pages come and go as others do."""

    def __init__(self):
        super().__init__()
        self.place_in_file = {}
        self.file = os.memfd_create("file")
        for number in range(8):
            os.write(self.file, bytes([100 + number]) * self.page_bytes)

    @precondition(lambda self: len(self.contents) < MAX_PAGES)
    @rule(first=st.integers(0, 7), count=Count)
    def attach_file(self, first, count):
        count = min(count, 8 - first)
        pages = self.driver.attach_file(self.file, first * self.page_bytes, count)
        assert not self.contents.keys() & set(pages)
        self.contents.update(zip(pages, range(100 + first, 108), strict=False))
        self.place_in_file.update(zip(pages, range(first, 8), strict=False))

    @invariant()
    def counts_the_mappings_of_the_kernel(self):
        ranges = [(address, count * self.page_bytes) for address, count in self.reserved.items()]
        counted, joined = len(kernel_mappings_of(ranges)), 0
        for address, num_pages in self.reserved.items():
            pages = [self.driver.page_at(address + i * self.page_bytes) for i in range(num_pages)]
            joined += sum(map(self._continues, pages, pages[1:]))
        assert self.driver.num_mappings == counted + joined

    def _continues(self, left, right):
        """Whether two pages, attached apart, are neighbours in the file: one mapping there."""
        if left is None or right is None or right == left + 1:
            return False
        both_of_file = is_of_file(left) and is_of_file(right)
        return both_of_file and self.place_in_file[right] == self.place_in_file[left] + 1

    def teardown(self):
        super().teardown()
        os.close(self.file)


MODEST = settings(max_examples=40, stateful_step_count=40)


def test_random_operations_on_the_host():
    run_state_machine_as_test(HostMachine, settings=MODEST)


def test_random_operations_on_the_standin(cuda_standin):
    class StandInMachine(DriverMachine):
        make_driver = StandInCudaDriver

        def teardown(self):
            super().teardown()
            assert not any(cuda_standin.held().values())
            cuda_standin.reset()

    run_state_machine_as_test(StandInMachine, settings=MODEST)
