"""What is particular to the host driver: recycled page numbers, huge pages, and VMAs."""

import ctypes
import os
import random
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from errno import EBADF, EINTR, ENOMEM
from pathlib import Path

import pytest
import torch
from standin.process import kernel_mappings, kernel_mappings_of
from vkv.vmem import HostDriver, Page, linux
from vkv.vmem.errors import DriverError, InvalidConfig, OutOfMappings, OutOfPages

PAGE = 16 << 10


@pytest.fixture
def driver():
    with HostDriver(page_bytes=PAGE) as driver:
        yield driver


def resident_bytes(driver):
    return os.fstat(driver._memfd).st_blocks * 512


def test_adjacent_pages_are_mapped_by_one_call_and_unmapped_by_one(driver):
    address = driver.reserve(64 * PAGE)
    pages = driver.create(60)
    driver.map(address, pages)
    assert driver.counters["map"] == 1
    driver.unmap(address + PAGE, 50 * PAGE)
    assert driver.counters["unmap"] == 1


def test_a_run_is_split_only_where_page_numbers_jump(driver):
    address = driver.reserve(8 * PAGE)
    first, second, third, fourth = driver.create(4)
    driver.map(address, [second, third, first, fourth, fourth])
    assert driver.counters["map"] == 4
    assert driver.num_mappings == len(kernel_mappings(address, 8 * PAGE)) == 5


def test_pages_at_home_take_one_mapping_in_whatever_order_they_come(driver):
    address = driver.reserve(64 * PAGE)
    for start in (4, 0, 2, 6):
        home = address + start * PAGE
        driver.map(home, driver.create(2, [home, home + PAGE]))
    assert driver.num_mappings == len(kernel_mappings(address, 64 * PAGE)) == 2
    assert resident_bytes(driver) == 8 * PAGE
    pages = list(driver.mapped(address, 8 * PAGE).values())
    driver.unmap(address, 8 * PAGE)
    driver.release(pages)
    assert resident_bytes(driver) == 0
    assert driver.create(2) == [0, 1]  # numbers of homes are not among those used again


def test_a_page_is_exchanged_where_no_more_mappings_may_be_made():
    """Past the budget, too, to which `unmap` may go: what is copied on write has a place."""
    with HostDriver(page_bytes=PAGE, max_mappings=8) as driver:
        address = driver.reserve(16 * PAGE)
        pages = driver.create(10)
        driver.map(address, pages[:8])
        driver.map(address + 12 * PAGE, [pages[8]])
        for place in (1, 3, 5):
            driver.unmap(address + place * PAGE, PAGE)
        assert driver.num_mappings == 10
        with pytest.raises(OutOfMappings):
            driver.map(address + 14 * PAGE, [pages[9]])
        driver.exchange(address + 12 * PAGE, pages[9])
        assert driver.page_at(address + 12 * PAGE) == pages[9]
        with pytest.raises(OutOfMappings):
            driver.exchange(address + 7 * PAGE, pages[1])  # which would be one more
        assert driver.page_at(address + 7 * PAGE) == pages[7]
        assert driver.num_mappings == len(kernel_mappings(address, 16 * PAGE)) == 10


def test_gaps_can_be_readable_and_cost_nothing():
    with HostDriver(page_bytes=PAGE, readable_gaps=True) as driver:
        address = driver.reserve(64 * PAGE)
        driver.map(address + PAGE, driver.create(1))
        whole = driver.tensor(address, (64 * PAGE,), (1,), torch.uint8)
        whole[PAGE : 2 * PAGE] = 1
        assert whole.clone().sum() == PAGE
        driver.unmap(address + PAGE, PAGE)
        assert whole.clone().sum() == 0


def test_the_lowest_released_numbers_are_created_again_first(driver):
    pages = driver.create(8)
    driver.release([pages[6], pages[1], pages[4], pages[2]])
    assert driver.create(2) == [pages[1], pages[2]]
    assert driver.create(3) == [pages[4], pages[6], 8]


def test_pages_are_resident_from_creation_to_release(driver):
    pages = driver.create(10)
    assert resident_bytes(driver) == 10 * PAGE
    driver.release(pages[2:9])
    assert resident_bytes(driver) == 3 * PAGE


def test_more_than_the_available_memory_is_refused_before_the_system_is_asked(driver):
    num_pages = 2 * linux.available_bytes() // PAGE
    with pytest.raises(OutOfPages, match="available"):
        driver.create(num_pages)
    assert driver.num_pages == driver.counters["create"] == 0


def machine(root, own, groups):
    """A machine with 8,000 kB to spare; `groups` have (limit, usage, cache), by their folders."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    if own is not None:
        (root / "proc/self/cgroup").write_text(own)
    for folder, (limit, usage, cache) in groups.items():
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        old = folder.startswith("memory")
        names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
        for name, value in zip(names, (limit, usage), strict=True):
            (path / f"memory.{name}").write_text(f"{value}\n")
        total = "total_" if old else ""
        stat = f"anon 7\n{total}inactive_file {cache}\n{total}active_file 0\n"
        (path / "memory.stat").write_text(stat)
    return root


MACHINE = 8000 * 1024
V1_ENDLESS = 9223372036854771712


@pytest.mark.parametrize(
    ("own", "groups", "available"),
    [
        (None, {}, MACHINE),
        ("0::/\n", {}, MACHINE),  # a machine without limits
        (None, {"": (5000, 4000, 340)}, 1000 + 340),
        ("0::/\n", {"": ("max", 9, 0)}, MACHINE),
        ("0::/\n", {"": (5000, 4000, 340)}, 1000 + 340),
        ("0::/\n", {"": (5000, 5100, 0)}, 0),
        # The tightest of all above counts, wherever it is.
        ("0::/a/b\n", {"a/b": ("max", 9, 0), "a": (700, 100, 50), "": (9000, 200, 0)}, 650),
        ("0::/a/b\n", {"a/b": (300, 100, 0), "a": (700, 100, 50)}, 200),
        ("0::/a/b\n", {"a/b": (900, 100, 0), "other": (2, 1, 0)}, 800),
        # In a container: its own group is the root, whatever path the host has for it.
        ("0::/docker/3f2a\n", {"": (5000, 4000, 0)}, 1000),
        ("0::/../other\n", {"": (5000, 4000, 0), "other": (2, 1, 0)}, 1000),
        # Version 1, alone or beside an empty version 2.
        ("4:cpu:/x\n2:memory:/\n0::/\n", {"memory": (500, 400, 40)}, 140),
        ("2:cpu,memory:/a\n", {"memory": (V1_ENDLESS, 9, 0), "memory/a": (500, 400, 0)}, 100),
        ("2:memory:/docker/3f2a\n", {"memory": (500, 400, 0)}, 100),
        ("2:cpu:/a\n", {"memory/a": (500, 400, 0)}, MACHINE),
    ],
)
def test_available_memory_is_the_least_that_the_system_or_a_group_has(
    tmp_path, own, groups, available
):
    assert linux.available_bytes(machine(tmp_path, own, groups)) == available


def test_reclaimable_slab_counts_as_available(tmp_path):
    root = machine(tmp_path, "0::/\n", {"": (5000, 4000, 40)})
    with (root / "sys/fs/cgroup/memory.stat").open("a") as stat:
        stat.write("slab_reclaimable 60\nslab_unreclaimable 500\n")
    assert linux.available_bytes(root) == 1100


def test_a_group_that_ends_while_it_is_read_is_left_out(tmp_path):
    root = machine(tmp_path, "0::/a\n", {"a": (300, 100, 0), "": (5000, 4000, 0)})
    (root / "sys/fs/cgroup/a/memory.current").unlink()
    assert linux.available_bytes(root) == 1000


def test_the_example_in_the_readme_runs():
    text = (Path(__file__).parents[2] / "vmem/README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])


def test_a_system_call_that_a_signal_interrupts_is_made_again():
    answers = [EINTR, EINTR, EBADF]

    def function(*args):
        ctypes.set_errno(answers.pop(0))
        return -1

    with pytest.raises(OSError, match="Errno 9"):
        linux.call(function, 1)
    assert not answers


def test_a_long_allocation_ends_between_two_signals(monkeypatch):
    """Many kernels undo what a call has allocated when a signal comes, as a timer's do."""
    real, sizes = linux.fallocate, []

    def fallocate(fd, mode, offset, size):
        if mode == 0:
            sizes.append(size)
            assert len(sizes) < 100, "it begins anew, and does not end"
            if size > 4 << 20:
                ctypes.set_errno(EINTR)
                return -1
        return real(fd, mode, offset, size)

    monkeypatch.setattr(linux, "fallocate", fallocate)
    with HostDriver(page_bytes=3 << 20) as driver:
        pages = driver.create(4)
        assert sum(sizes) == 12 << 20
        assert resident_bytes(driver) >= 12 << 20
        driver.release(pages)


def test_a_reservation_that_cannot_be_trimmed_is_given_back(driver, monkeypatch):
    real, calls = linux.call, []

    def call(function, *args):
        calls.append((function, args))
        if len(calls) == 2:
            raise OSError(ENOMEM, "injected")
        result = real(function, *args)
        calls[-1] += (result,)
        return result

    monkeypatch.setattr(linux, "call", call)
    with pytest.raises(DriverError, match="munmap"):
        driver.reserve(1 << 30)
    _, (_, size, *_), start = calls[0]
    assert not kernel_mappings(start + size // 2, 4096)


class TestHugePages:
    def test_are_used_where_the_kernel_grants_them(self):
        with HostDriver() as driver:
            assert driver.huge_pages is None
            pages = driver.create(2)
            address = driver.reserve(4 << 20)
            driver.map(address, pages)
            assert address % (2 << 20) == 0
            if not driver.huge_pages:
                pytest.skip("this kernel grants no huge pages to shared memory")
            assert huge_bytes(address) == 4 << 20

    def test_are_not_asked_for_where_pages_are_smaller(self):
        with HostDriver(PAGE) as driver:
            driver.create(1)
            assert driver.huge_pages is False
            assert driver.counters["collapse"] == 0

    def test_are_done_without_where_the_kernel_refuses(self, monkeypatch):
        real = linux.call

        def call(function, *args):
            if function is linux.madvise:
                raise OSError(22, "injected")
            return real(function, *args)

        monkeypatch.setattr(linux, "call", call)
        with HostDriver() as driver:
            assert len(driver.create(1)) == 1
            assert driver.huge_pages is False


def huge_bytes(address):
    """What the kernel maps by huge entries in the mapping that starts at `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.startswith(f"{address:x}-")
        elif inside and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"nothing is mapped at {address:#x}")


class TestBudgetOfMappings:
    def test_the_count_is_the_kernels(self, driver):
        rng = random.Random(1)
        size = 32
        reservations = [driver.reserve(size * PAGE) for _ in range(2)]
        pages = driver.create(24)
        for _ in range(300):
            address = rng.choice(reservations)
            start = rng.randrange(size)
            stop = rng.randint(start + 1, min(size, start + 6))
            run = range(address + start * PAGE, address + stop * PAGE, PAGE)
            backed = [driver.page_at(at) is not None for at in run]
            if all(backed):
                driver.unmap(run[0], len(run) * PAGE)
            elif not any(backed):
                first = rng.randrange(len(pages) - len(run))
                chosen = pages[first : first + len(run)]
                if rng.random() < 0.3:
                    rng.shuffle(chosen)
                driver.map(run[0], chosen)
            counted = kernel_mappings_of([(at, size * PAGE) for at in reservations])
            assert driver.num_mappings == len(counted)

    def test_defaults_to_half_of_what_the_system_allows(self, driver):
        assert driver.max_mappings == linux.max_map_count() // 2

    def test_must_hold_something(self):
        with pytest.raises(InvalidConfig, match="max_mappings is 0"):
            HostDriver(max_mappings=0)

    def test_a_map_beyond_it_changes_nothing(self):
        with HostDriver(PAGE, max_mappings=8) as driver:
            address = driver.reserve(32 * PAGE)
            pages = driver.create(10)
            driver.map(address, pages[:8:2])  # four mappings and the rest of the reservation
            kernel = kernel_mappings(address, 32 * PAGE)
            with pytest.raises(OutOfMappings, match="budget of 8"):
                driver.map(address + 8 * PAGE, pages[::3])
            assert kernel_mappings(address, 32 * PAGE) == kernel
            assert driver.num_mappings == 5
            driver.map(address + 8 * PAGE, pages)  # one more for the run, one for what follows

    def test_a_reservation_counts(self):
        with HostDriver(PAGE, max_mappings=2) as driver:
            driver.reserve(PAGE)
            driver.reserve(PAGE)
            with pytest.raises(OutOfMappings):
                driver.reserve(PAGE)

    def test_unmapping_may_go_beyond_it_by_a_quarter_and_by_whole_stretches_always(self):
        with HostDriver(PAGE, max_mappings=16) as driver:
            address = driver.reserve(64 * PAGE)
            driver.map(address, driver.create(64))
            for index in range(1, 19, 2):  # nine holes make nineteen mappings of one
                driver.unmap(address + index * PAGE, PAGE)
            assert driver.num_mappings == 19
            with pytest.raises(OutOfMappings, match="budget of 20"):
                driver.unmap(address + 19 * PAGE, PAGE)
            tensor = driver.tensor(address + 19 * PAGE, (PAGE,), (1,), torch.uint8)
            assert not tensor.any()  # still mapped
            for index in range(0, 18, 2):
                driver.unmap(address + index * PAGE, PAGE)
            assert driver.num_mappings == 2


def test_mapping_does_not_wait_for_pages_being_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    with HostDriver(page_bytes=4096) as driver:
        address = driver.reserve(4096)
        pages = driver.create(1)
        clearing, mapped = threading.Event(), threading.Event()
        touch = driver._touch

        def slow_touch(numbers: Sequence[Page]) -> bool:
            clearing.set()
            assert mapped.wait(timeout=30), "mapping waited for a page that is being created"
            return touch(numbers)

        monkeypatch.setattr(driver, "_touch", slow_touch)
        with ThreadPoolExecutor(1) as pool:
            creating = pool.submit(driver.create, 1)
            assert clearing.wait(timeout=30)
            driver.map(address, pages)
            mapped.set()
            assert len(creating.result(timeout=30)) == 1
        driver.unmap(address, 4096)
