"""Pages that are a file's: mapped, shared, copied when written to, and given back."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from standin.process import kernel_mappings
from vkv.vmem import HostDriver, VmemDriver, is_of_file
from vkv.vmem.errors import DriverError, ForkedProcess, InvalidConfig, InvalidOperation

PAGE = 16 << 10
SYSTEM_PAGE = 4096


@pytest.fixture
def driver():
    with HostDriver(page_bytes=PAGE) as driver:
        yield driver


@pytest.fixture
def content():
    return bytes(random.Random(1).randbytes(8 * PAGE + SYSTEM_PAGE))


@pytest.fixture
def file(tmp_path, content):
    path = tmp_path / "content"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def open_descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def read(driver, address, size):
    return bytes(driver.tensor(address, (size,), (1,), torch.uint8).numpy())


def test_pages_show_the_file_from_any_whole_system_page(driver, file, content):
    address = driver.reserve(8 * PAGE)
    for offset in (0, SYSTEM_PAGE):
        pages = driver.attach_file(file, offset, 8)
        driver.map(address, pages)
        assert read(driver, address, 8 * PAGE) == content[offset : offset + 8 * PAGE]
        driver.unmap(address, 8 * PAGE)
        driver.release(pages)


def test_what_is_written_stays_out_of_the_file(driver, file, content):
    address = driver.reserve(2 * PAGE)
    driver.map(address, driver.attach_file(file, PAGE, 2))
    tensor = driver.tensor(address, (2 * PAGE,), (1,), torch.uint8)
    tensor[:100] = 7
    assert bytes(tensor[:101].numpy()) == bytes([7] * 100) + content[PAGE + 100 : PAGE + 101]
    assert os.pread(file, 2 * PAGE, PAGE) == content[PAGE : 3 * PAGE]


def test_pages_are_told_from_created_ones(driver, file):
    created, of_file = driver.create(2), driver.attach_file(file, 0, 2)
    home = driver.create(1, [driver.reserve(PAGE)])
    assert list(map(is_of_file, [*created, *of_file, *home])) == [False, False, True, True, False]
    assert driver.num_pages == 5


def test_nothing_is_read_until_it_is_touched(driver, tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb+") as sparse:
        sparse.truncate(1 << 30)
        before = driver.counters["map"]
        address = driver.reserve(1 << 30)
        driver.map(address, driver.attach_file(sparse.fileno(), 0, (1 << 30) // PAGE))
    assert driver.counters["map"] == before + 1
    assert kernel_rss(address) == 0
    assert read(driver, address + (1 << 29), 4) == bytes(4)
    assert 0 < kernel_rss(address) <= 1 << 20  # what the kernel reads around a fault


def kernel_rss(address):
    """Resident bytes of the mapping that begins at `address`."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            return next(int(li.split()[1]) * 1024 for li in lines if li.startswith("Rss:"))
    raise AssertionError("no such mapping")


def test_mappings_are_counted_as_the_kernel_does(driver, file):
    address = driver.reserve(16 * PAGE)
    first, second = driver.attach_file(file, 0, 4), driver.attach_file(file, PAGE, 4)
    created = driver.create(4)

    def check(expected):
        assert driver.num_mappings == len(kernel_mappings(address, 16 * PAGE)) == expected

    driver.map(address, first[:2])
    check(2)
    driver.map(address + 2 * PAGE, first[2:])  # goes on where the mapping ends
    check(2)
    driver.map(address + 4 * PAGE, created)
    check(3)
    driver.map(address + 8 * PAGE, second)
    check(4)
    driver.map(address + 12 * PAGE, [second[0], second[2]])  # aliases
    check(6)
    driver.unmap(address + PAGE, PAGE)
    check(8)
    driver.map(address + PAGE, created[:1])
    check(8)
    driver.unmap(address, 14 * PAGE)
    check(1)


def test_mappings_are_counted_through_random_changes(driver, file):
    random_ = random.Random(3)
    address = driver.reserve(24 * PAGE)
    pages = [*driver.create(6), *driver.attach_file(file, 0, 8)]
    pages += driver.attach_file(file, SYSTEM_PAGE, 8)
    for _ in range(300):
        at = random_.randrange(24)
        count = random_.randint(1, min(4, 24 - at))
        here = range(address + at * PAGE, address + (at + count) * PAGE, PAGE)
        if all(driver.page_at(a) is None for a in here):
            first = random_.randrange(len(pages) - count + 1)
            driver.map(here[0], pages[first : first + count])
        elif all(driver.page_at(a) is not None for a in here):
            driver.unmap(here[0], count * PAGE)
        assert driver.num_mappings == len(kernel_mappings(address, 24 * PAGE))


def test_the_file_is_kept_open_by_its_pages_alone(driver, file, content):
    before = open_descriptors()
    address = driver.reserve(4 * PAGE)
    again = os.dup(file)
    pages = driver.attach_file(again, 0, 4)
    os.close(again)
    assert len(open_descriptors()) == len(before) + 1
    driver.release(pages[1:3])
    driver.map(address, pages[3:])
    assert read(driver, address, PAGE) == content[3 * PAGE : 4 * PAGE]
    driver.unmap(address, PAGE)
    driver.release([pages[3], pages[0]])
    assert open_descriptors() == before
    assert driver.counters["release"] == 0  # no hole was made in anything
    assert driver.num_pages == 0


def test_closing_the_driver_closes_the_files(file):
    before = open_descriptors()
    with HostDriver(page_bytes=PAGE) as driver:
        address = driver.reserve(4 * PAGE)
        driver.map(address, driver.attach_file(file, 0, 4))
        driver.attach_file(file, 0, 2)
    assert open_descriptors() == before
    assert not any(
        kernel_mappings(start, PAGE) for start in range(address, address + 4 * PAGE, PAGE)
    )


@pytest.mark.parametrize(
    ("offset", "num_pages", "words"),
    [
        (0, 0, "0 pages"),
        (-PAGE, 1, "offset -16384"),
        (17, 1, "not a multiple of 4096"),
        (PAGE, 8, "of a file of"),
        (0, 9, "end at byte"),
    ],
)
def test_what_is_no_stretch_of_the_file_is_refused(driver, file, offset, num_pages, words):
    before = open_descriptors()
    with pytest.raises(InvalidConfig, match=words):
        driver.attach_file(file, offset, num_pages)
    assert open_descriptors() == before
    assert driver.num_pages == 0


def test_what_is_no_file_is_refused(driver):
    with pytest.raises(DriverError, match="Bad file descriptor"):
        driver.attach_file(10**6, 0, 1)


def test_a_mapped_page_is_not_released(driver, file):
    pages = driver.attach_file(file, 0, 2)
    driver.map(address := driver.reserve(2 * PAGE), pages)
    with pytest.raises(InvalidOperation, match="mapped"):
        driver.release(pages)
    driver.unmap(address, 2 * PAGE)
    driver.release(pages)
    with pytest.raises(InvalidOperation, match="does not exist"):
        driver.map(address, pages)


def test_a_device_refuses(standin_driver_factory, file):
    driver: VmemDriver = standin_driver_factory()
    with pytest.raises(InvalidOperation, match="read it into pages"):
        driver.attach_file(file, 0, 1)
    assert driver.num_pages == 0


def test_a_forked_child_is_refused(driver, file):
    pid = os.fork()
    if not pid:
        try:
            driver.attach_file(file, 0, 1)
        except ForkedProcess:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


_READER = """
import os, sys
import torch
from vkv.vmem import HostDriver

fd = os.open(sys.argv[1], os.O_RDONLY)
driver = HostDriver(page_bytes=16 << 10)
size = os.fstat(fd).st_size
address = driver.reserve(size)
driver.map(address, driver.attach_file(fd, 0, size // (16 << 10)))
driver.tensor(address, (size,), (1,), torch.uint8).sum()
print("read", flush=True)
sys.stdin.readline()
for line in open("/proc/self/smaps"):
    fields = line.split()
    if "-" in fields[0] and not fields[0].endswith(":"):
        found = sys.argv[1] in line
    elif found and fields[0] in ("Rss:", "Pss:"):
        print(fields[0], fields[1], flush=True)
driver.close()
"""


@pytest.mark.usefixtures("quick_processes")
def test_processes_share_one_copy(tmp_path):
    path = tmp_path / "shared"
    path.write_bytes(bytes(4 << 20))
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", _READER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for reader in readers:
        assert reader.stdout.readline() == "read\n"
    for reader in readers[:1]:
        shown, _ = reader.communicate("\n")
        found = dict(line.split() for line in shown.splitlines())
        assert int(found["Rss:"]) == 4 << 10
        assert int(found["Pss:"]) <= (4 << 10) * 0.55
    readers[1].communicate("\n")
