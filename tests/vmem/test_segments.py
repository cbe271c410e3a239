"""Segments: memory that is handed to another process alone, and what each side may do to it."""

import os
import resource
import socket

import pytest
import torch
from allocator_model import FlakyHostDriver
from standin import StandInCudaDriver
from standin.process import kernel_mappings
from vkv.vmem import HostDriver, Page, PageRun, linux, page_in, segment_of
from vkv.vmem.errors import DriverError, InvalidOperation, OutOfMappings, OutOfPages

PAGE = 16 << 10


def make() -> FlakyHostDriver:
    return FlakyHostDriver(PAGE)


@pytest.fixture
def near():
    with make() as driver:
        yield driver


@pytest.fixture
def far():
    with make() as driver:
        yield driver


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def view(driver: HostDriver, address: int, num_bytes: int = PAGE) -> torch.Tensor:
    return driver.tensor(address, (num_bytes,), (1,), torch.uint8)


def segment(driver: HostDriver, places: list[int], value: int = 0) -> tuple[int, list[Page]]:
    """Pages at these places of a new segment, mapped one after the other and filled."""
    base = driver.open_segment()
    pages = [page_in(base, place) for place in places]
    driver.create_in(pages)
    address = driver.reserve(len(pages) * PAGE)
    driver.map(address, pages)
    assert not view(driver, address, len(pages) * PAGE).any()
    view(driver, address, len(pages) * PAGE).fill_(value)
    return address, pages


def put_away(driver: HostDriver, address: int, pages: list[Page]) -> None:
    driver.unmap(address, len(pages) * PAGE)
    driver.release(pages)
    driver.free(address)


def resident_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_a_segment_has_a_file_from_its_first_page_to_its_last(near):
    before = descriptors()
    base = near.open_segment()
    assert descriptors() == before
    address, pages = segment(near, [5, 6, 1 << 29, 7])
    assert len(descriptors()) == len(before) + 1
    assert near.bundle_of(pages[0]) == segment_of(pages[0])
    assert near.bundle_size(segment_of(pages[0])) == 4
    assert segment_of(pages[0]) != base
    assert len(kernel_mappings(address, 4 * PAGE)) == 3  # 5 and 6 lie side by side
    assert near.num_mappings == 3
    near.unmap(address, 4 * PAGE)
    near.release(pages[:3])
    assert near.bundle_size(segment_of(pages[3])) == 1
    near.release(pages[3:])
    assert descriptors() == before
    assert near.bundle_size(segment_of(pages[3])) == 0
    near.create_in(pages[:1])  # and it may have some again
    near.map(address, pages[:1])
    assert not view(near, address).any()


def test_pages_of_segments_are_created_once_and_nowhere_else(near):
    (page,) = segment(near, [0])[1]
    for pages in ([page], [Page(7)], [page_in(near.open_segment(), 1)] * 2):
        with pytest.raises(InvalidOperation):
            near.create_in(pages)
    with pytest.raises(InvalidOperation, match="no place"):
        page_in(near.open_segment(), 1 << 30)
    assert near.num_pages == 1


def test_what_is_lent_is_the_same_memory_on_both_sides(near, far):
    address, pages = segment(near, [0, 1, 9], 1)
    fds, runs = near.lend(pages)
    assert runs == [(0, 0, 2), (0, 9, 1)]
    borrowed = far.borrow(fds, runs)
    linked = far.reserve(3 * PAGE)
    far.map(linked, borrowed)
    view(far, linked)[3] = 7
    assert view(near, address)[3] == 7
    assert len({segment_of(page) for page in borrowed}) == 1
    os.close(*fds)


def test_only_the_owner_gives_memory_back(near, far):
    address, pages = segment(near, [0, 1], 1)
    fds, runs = near.lend(pages)
    assert resident_bytes(fds[0]) == 2 * PAGE
    far.release(far.borrow(fds, runs))  # as if it had never been
    assert resident_bytes(fds[0]) == 2 * PAGE
    assert view(near, address, 2 * PAGE).all()

    borrowed = far.borrow(fds, runs)
    near.disown(pages)
    far.own(borrowed)
    put_away(near, address, pages)
    linked = far.reserve(2 * PAGE)
    far.map(linked, borrowed)
    assert view(far, linked, 2 * PAGE).all()
    put_away(far, linked, borrowed)
    assert resident_bytes(fds[0]) == 0
    assert near.num_pages == far.num_pages == 0
    os.close(*fds)


def test_memory_lives_as_long_as_either_side(near):
    with make() as other:
        fds, runs = other.lend(segment(other, [3], 9)[1])
    borrowed = near.borrow(fds, runs)
    os.close(*fds)
    address = near.reserve(PAGE)
    near.map(address, borrowed)
    assert not view(
        near, address
    ).any()  # the driver that was closed gave it back: it was the owner

    with make() as other:
        _, pages = segment(other, [3], 9)
        fds, runs = other.lend(pages)
        borrowed = near.borrow(fds, runs)
        other.disown(pages)
    near.own(borrowed)
    near.exchange(address, borrowed[0])
    assert view(near, address).eq(9).all()
    os.close(*fds)


def test_nothing_of_others_goes_with_what_is_lent(near):
    _, pages = segment(near, [0, 1, 2])
    with pytest.raises(InvalidOperation, match="others' pages"):
        near.lend(pages[:2])
    fds, runs = near.lend(pages[:2], staying=pages[2:])
    assert runs == [(0, 0, 2)]
    os.close(*fds)
    with pytest.raises(InvalidOperation, match="cannot be handed"):
        near.lend(near.create(1))


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [PageRun(0, 0, 0)],
        [PageRun(1, 0, 1)],
        [PageRun(-1, 0, 1)],
        [PageRun(0, -1, 1)],
        [PageRun(0, 0, 2), PageRun(0, 1, 1)],
        [PageRun(0, 0, 3)],  # more than the file has
        [PageRun(0, 1 << 29, 1)],
        [PageRun(0, (1 << 30) - 1, 2)],
    ],
)
def test_what_cannot_be_true_is_refused(near, far, runs):
    fds, _ = near.lend(segment(near, [0, 1])[1])
    before = descriptors()
    with pytest.raises(InvalidOperation):
        far.borrow(fds, runs)
    assert descriptors() == before
    assert far.num_pages == 0
    os.close(*fds)


def test_files_that_are_no_memory_are_refused(far, tmp_path):
    """Touching what somebody can cut off would end the process."""
    plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    short = os.memfd_create("short", linux.MEMFD_FLAGS)
    linux.call(linux.fcntl, short, linux.F_ADD_SEALS, linux.F_SEAL_SHRINK)
    one, other = socket.socketpair()
    for fd in (plain, unsealed):
        os.ftruncate(fd, PAGE)
    for fd in (plain, unsealed, short, one.fileno()):
        with pytest.raises(InvalidOperation, match="descriptor came"):
            far.borrow([fd], [PageRun(0, 0, 1)])
    for fd in (plain, unsealed, short):
        os.close(fd)
    one.close(), other.close()


@pytest.mark.parametrize("short", [False, True])
def test_every_call_may_fail_and_nothing_is_left(near, far, short):
    base = near.open_segment()
    pages = [page_in(base, place) for place in (0, 1, 5)]
    before = descriptors()

    def attempt(driver, action):
        for call in range(20):
            driver.fail_after, driver.fail_short = call, short
            state = descriptors(), driver.num_pages
            try:
                result = action()
            except (DriverError, OutOfPages, OutOfMappings, InvalidOperation):
                assert driver.fail_after is None
                assert (descriptors(), driver.num_pages) == state
            else:
                driver.fail_after = None
                assert call, "it made no call"
                return result
        raise AssertionError("it fails for ever")

    attempt(near, lambda: near.create_in(pages))
    fds, runs = attempt(near, lambda: near.lend(pages))
    borrowed = attempt(far, lambda: far.borrow(fds, runs))
    os.close(*fds)
    near.fail_after = 0
    with pytest.raises(DriverError):
        near.release(pages)  # the punch fails; the file goes all the same
    far.release(borrowed)
    assert descriptors() == before


def test_where_descriptors_run_short_the_error_names_the_limit(near):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    page = page_in(near.open_segment(), 0)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OutOfMappings, match="open files"):
            near.create_in([page])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    near.create_in([page])


def test_a_driver_without_segments_hands_over_page_by_page(cuda_standin):
    with StandInCudaDriver() as near, StandInCudaDriver() as far:
        assert not near.has_segments
        for refused in (near.open_segment, lambda: near.create_in([Page(1 << 48)])):
            with pytest.raises(InvalidOperation):
                refused()
        size = near.page_bytes
        address, linked = near.reserve(3 * size), far.reserve(3 * size)
        pages = near.create(3)
        near.map(address, pages)
        view(near, address, 3 * size).fill_(4)
        assert (near.bundle_of(pages[0]), near.bundle_size(pages[0])) == (pages[0], 1)
        before = len(descriptors()) - cuda_standin.num_files()
        for call in (1, 2, 3):
            refused_once = near.create(3)
            cuda_standin.fail_at(call)
            with pytest.raises(DriverError):
                near.lend(refused_once)
            with pytest.raises(InvalidOperation, match="cannot be handed"):  # from then on
                near.lend(refused_once)
            near.release(refused_once)
            assert len(descriptors()) == before + cuda_standin.num_files()
        fds, runs = near.lend(pages[::-1])
        cuda_standin.fail_at(2)
        with pytest.raises(DriverError):
            far.borrow(fds, runs)
        with pytest.raises(InvalidOperation, match="each descriptor is one page"):
            far.borrow(fds, [PageRun(index, 1, 1) for index in range(3)])
        assert far.num_pages == 0
        borrowed = far.borrow(fds, runs)
        for fd in fds:
            os.close(fd)
        assert len(descriptors()) == before + cuda_standin.num_files()
        far.map(linked, borrowed[::-1])
        assert view(far, linked, 3 * size).eq(4).all()  # and not cleared, as new ones are
        near.unmap(address, 3 * size)
        near.disown(pages)
        near.release(pages)
        far.own(borrowed)
        assert view(far, linked, 3 * size).eq(4).all()
        assert cuda_standin.held()["memory_used"] == 3 * size
    assert cuda_standin.held()["memory_used"] == 0
