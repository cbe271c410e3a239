"""What every driver promises, whatever is below it: the host, the stand-in, a real GPU."""

import random
import threading

import pytest
import torch
from vkv.vmem import HostDriver, open_driver
from vkv.vmem.errors import InvalidConfig, InvalidOperation


@pytest.fixture
def driver(vmem_driver):
    return vmem_driver


@pytest.fixture
def page(driver):
    return driver.page_bytes


def view(driver, address, num_bytes):
    return driver.tensor(address, (num_bytes,), (1,), torch.uint8)


def holds(tensor, value):
    return bool((tensor == value).all())


def unmap(driver, address, num_bytes):
    """As every user must: once the work launched so far, which may touch the range, is over."""
    driver.record_fence().wait()
    driver.unmap(address, num_bytes)


def test_a_reservation_is_aligned_and_unbacked(driver, page):
    address = driver.reserve(8 * page)
    assert address % page == 0
    assert driver.reserved_bytes == 8 * page
    assert driver.page_at(address) is None
    assert driver.num_pages == 0
    driver.free(address)
    assert driver.reserved_bytes == 0


def test_created_pages_are_zero_wherever_they_are_mapped(driver, page):
    address = driver.reserve(4 * page)
    driver.map(address + page, driver.create(3))
    assert not view(driver, address + page, 3 * page).any()


def test_pages_with_a_home_are_as_any_others(driver, page):
    address = driver.reserve(4 * page)
    homes = [address, address + 2 * page, address + 3 * page]
    with pytest.raises(InvalidConfig, match="2 pages cannot have 3 homes"):
        driver.create(2, homes)
    for _ in range(2):
        pages = driver.create(3, homes)
        driver.map(address + 2 * page, pages[1:])
        assert not view(driver, address + 2 * page, 2 * page).any()
        view(driver, address + 2 * page, 2 * page).fill_(7)
        unmap(driver, address + 2 * page, 2 * page)
        driver.map(address + page, pages[1:2])  # a home is no duty
        assert holds(view(driver, address + page, page), 7)
        others = driver.create(3, homes)  # while those live
        assert len({*pages, *others}) == 6
        unmap(driver, address + page, page)
        driver.release([*pages, *others])
    assert driver.num_pages == 0


def test_pages_given_back_to_the_system_come_back_zeroed(driver, page):
    address = driver.reserve(4 * page)
    pages = driver.create(4)
    driver.map(address, pages)
    view(driver, address, 4 * page).fill_(255)
    unmap(driver, address, 4 * page)
    driver.release(pages)
    assert driver.num_pages == 0
    driver.map(address, driver.create(4))
    assert not view(driver, address, 4 * page).any()


def test_data_stays_with_the_page_and_not_with_the_address(driver, page):
    address = driver.reserve(4 * page)
    first, second = driver.create(2)
    driver.map(address, [first, second])
    view(driver, address, page).fill_(1)
    view(driver, address + page, page).fill_(2)
    unmap(driver, address, 2 * page)
    driver.map(address + 2 * page, [second, first])
    assert holds(view(driver, address + 2 * page, page), 2)
    assert holds(view(driver, address + 3 * page, page), 1)
    assert driver.page_at(address) is None
    assert driver.page_at(address + 3 * page) == first
    assert driver.mapped(address, 3 * page) == {address + 2 * page: second}


def test_a_page_written_through_one_alias_reads_the_same_through_the_others(driver, page):
    address = driver.reserve(6 * page)
    other = driver.reserve(page)
    (shared,) = driver.create(1)
    driver.map(address, [shared, shared])
    driver.map(other, [shared])
    view(driver, address, page).fill_(5)
    assert holds(view(driver, address + page, page), 5)
    unmap(driver, address, page)
    view(driver, other, page)[17] = 6
    assert view(driver, address + page, page)[17].item() == 6


def test_a_strided_tensor_reads_across_pages_and_over_holes(driver, page):
    address = driver.reserve(4 * page)
    pages = driver.create(2)
    driver.map(address, pages[:1])
    driver.map(address + 2 * page, pages[1:])
    # Two rows, each on a page of its own with a hole between: the hole is never touched.
    rows = driver.tensor(address, (2, 3, 5), (page, 7, 1), torch.bfloat16)
    rows.copy_(torch.arange(30).view(2, 3, 5))
    assert rows.shape == (2, 3, 5)
    assert rows.stride() == (page, 7, 1)
    assert rows.device == driver.device
    assert rows.data_ptr() == address
    assert torch.equal(rows.cpu(), torch.arange(30, dtype=torch.bfloat16).view(2, 3, 5))


def test_tensors_may_span_what_is_not_backed_yet(driver, page):
    address = driver.reserve(1024 * page)
    tensor = driver.tensor(address, (1024 * page // 4,), (1,), torch.float32)
    driver.map(address + 512 * page, driver.create(1))
    middle = tensor[512 * page // 4 :][: page // 4]
    middle.fill_(1)
    assert middle.sum().item() == page // 4


@pytest.mark.parametrize(
    ("shape", "strides", "shift"),
    [((2,), (1,), -1), ((5,), (1,), 0), ((2, 2), (3, 1), 0), ((1,), (1,), 4)],
)
def test_a_tensor_that_leaves_its_reservation_is_refused(driver, page, shape, strides, shift):
    unit = page // 2  # a reservation of two pages holds four of these
    address = driver.reserve(2 * page)
    with pytest.raises(InvalidOperation, match="leaves its reservation"):
        driver.tensor(
            address + shift * unit,
            (*shape, unit),
            (*(stride * unit for stride in strides), 1),
            torch.uint8,
        )


@pytest.mark.parametrize(
    ("shape", "strides"), [((2, 3), (1,)), ((2,), (-1,)), ((-1,), (1,)), ((0, 2), (1,))]
)
def test_a_tensor_of_impossible_geometry_is_refused(driver, page, shape, strides):
    with pytest.raises(InvalidConfig, match="equal length"):
        driver.tensor(driver.reserve(page), shape, strides, torch.float32)


def test_a_tensor_of_a_dtype_without_an_exchange_format_is_refused(driver, page):
    with pytest.raises(InvalidConfig, match="complex64"):
        driver.tensor(driver.reserve(page), (1,), (1,), torch.complex64)


def test_empty_tensors_and_every_dtype(driver, page):
    address = driver.reserve(page)
    driver.map(address, driver.create(1))
    assert driver.tensor(address, (0, 3), (3, 1), torch.float32).shape == (0, 3)
    for dtype in (torch.float16, torch.float64, torch.int8, torch.int64, torch.bool):
        tensor = driver.tensor(address, (4,), (1,), dtype)
        assert tensor.dtype == dtype
        assert not tensor.any()


def test_an_empty_run_maps_nothing(driver, page):
    driver.map(driver.reserve(page), [])
    assert driver.num_mappings <= 1  # the host counts the reservation itself


class TestRefusals:
    """What the state forbids is an InvalidOperation, and nothing has changed."""

    @pytest.fixture
    def mapped(self, driver, page):
        """Two pages at `address`, a hole, and one page more; and one page mapped nowhere."""
        address = driver.reserve(4 * page)
        pages = driver.create(4)
        driver.map(address, pages[:2])
        driver.map(address + 3 * page, pages[2:3])
        state = (dict(driver._page_table), dict(driver._map_counts), driver.num_mappings)
        view(driver, address, 2 * page).fill_(3)
        yield address, pages
        assert state == (driver._page_table, driver._map_counts, driver.num_mappings)
        assert holds(view(driver, address, 2 * page), 3)

    def test_mapping_over_a_mapping(self, driver, page, mapped):
        address, pages = mapped
        with pytest.raises(InvalidOperation, match="already mapped"):
            driver.map(address + 2 * page, [pages[3], pages[0]])

    def test_mapping_outside_of_a_reservation(self, driver, page, mapped):
        address, pages = mapped
        with pytest.raises(InvalidOperation, match="one reservation"):
            driver.map(address + 4 * page, pages[3:])

    def test_mapping_across_the_end_of_a_reservation(self, driver, page, mapped):
        address, pages = mapped
        with pytest.raises(InvalidOperation, match="one reservation"):
            driver.map(address + 2 * page, pages[1:])

    def test_mapping_at_an_odd_address(self, driver, mapped):
        address, pages = mapped
        with pytest.raises(InvalidOperation, match="aligned"):
            driver.map(address + 4096, pages[3:])

    def test_mapping_a_page_that_does_not_exist(self, driver, page, mapped):
        with pytest.raises(InvalidOperation, match="does not exist"):
            driver.map(mapped[0] + 2 * page, [max(mapped[1]) + 1])

    def test_unmapping_what_is_not_mapped(self, driver, page, mapped):
        with pytest.raises(InvalidOperation, match="is not mapped"):
            driver.unmap(mapped[0], 4 * page)

    def test_unmapping_a_part_of_a_page(self, driver, page, mapped):
        with pytest.raises(InvalidConfig, match="multiple of the page size"):
            driver.unmap(mapped[0], page // 2)

    def test_releasing_a_mapped_page(self, driver, mapped):
        with pytest.raises(InvalidOperation, match="still mapped at 1 addresses"):
            driver.release([mapped[1][3], mapped[1][0]])

    def test_releasing_a_page_twice(self, driver, mapped):
        with pytest.raises(InvalidOperation, match="named twice"):
            driver.release([mapped[1][3], mapped[1][3]])

    def test_releasing_a_page_that_does_not_exist(self, driver, mapped):
        with pytest.raises(InvalidOperation, match="does not exist"):
            driver.release([mapped[1][3], max(mapped[1]) + 1])

    def test_freeing_a_mapped_reservation(self, driver, mapped):
        with pytest.raises(InvalidOperation, match="3 pages mapped"):
            driver.free(mapped[0])

    def test_freeing_a_part_of_a_reservation(self, driver, page, mapped):
        with pytest.raises(InvalidOperation, match="start of a reservation"):
            driver.free(mapped[0] + page)

    @pytest.mark.parametrize("size", [0, -1, 1000])
    def test_reserving_an_impossible_size(self, driver, mapped, size):
        with pytest.raises(InvalidConfig, match="multiple of the page size"):
            driver.reserve(size)

    def test_creating_no_pages(self, driver, mapped):
        with pytest.raises(InvalidConfig, match="num_pages is 0"):
            driver.create(0)


def test_closing_gives_everything_back_and_ends_the_driver(driver, page):
    address = driver.reserve(8 * page)
    pages = driver.create(5)
    driver.map(address, pages[:3])
    driver.map(address + 5 * page, pages[:2])
    driver.close()
    assert (driver.num_pages, driver.num_mappings, driver.reserved_bytes) == (0, 0, 0)
    driver.close()
    with pytest.raises(InvalidOperation, match="closed"):
        driver.reserve(page)


def test_closing_where_mapped_reservations_touch_each_other(driver, page):
    pages = driver.create(1)
    for _ in range(16):  # systems hand out neighbours, if not always
        driver.map(driver.reserve(page), pages)
    driver.close()
    assert (driver.num_pages, driver.num_mappings, driver.reserved_bytes) == (0, 0, 0)


def test_threads_that_map_alias_and_unmap_at_once(driver, page):
    num_threads, num_rounds, num_slots = 4, 60, 6
    shared = driver.create(1)
    errors = []

    def work(seed):
        rng = random.Random(seed)
        address = driver.reserve(num_slots * page)
        for round in range(num_rounds):
            count = rng.randint(1, num_slots - 1)
            pages = driver.create(count)
            rng.shuffle(pages)
            driver.map(address, [*pages, *shared])
            tensor = view(driver, address, count * page)
            tensor.fill_(1 + (seed + round) % 250)
            if not holds(tensor, 1 + (seed + round) % 250):
                errors.append((seed, round))
            unmap(driver, address, (count + 1) * page)
            driver.release(pages)
        driver.free(address)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (driver.num_pages, driver.reserved_bytes, driver.num_mappings) == (1, 0, 0)


def test_open_driver_picks_by_device():
    with open_driver("cpu") as driver:
        assert isinstance(driver, HostDriver)
        assert driver.page_bytes == 2 << 20
    with open_driver(torch.device("cpu"), page_bytes=8192) as driver:
        assert driver.page_bytes == 8192
    for device in ("mps", "toaster"):
        with pytest.raises(InvalidConfig, match="use 'cpu' or 'cuda'"):
            open_driver(device)


def test_a_page_takes_the_place_of_another(driver, page):
    address = driver.reserve(3 * page)
    first, second, third, other = driver.create(4)
    driver.map(address, [first, second, third])
    view(driver, address, 3 * page).fill_(1)
    driver.record_fence().wait()
    driver.exchange(address + page, other)
    assert driver.page_at(address + page) == other
    assert not view(driver, address + page, page).any()
    assert holds(view(driver, address, page), 1)
    assert holds(view(driver, address + 2 * page, page), 1)
    driver.record_fence().wait()
    driver.exchange(address + page, second)
    assert holds(view(driver, address + page, page), 1)
    driver.release([other])
    for where, what in ((address + page, other), (address + page, 10**9)):
        with pytest.raises(InvalidOperation, match="does not exist"):
            driver.exchange(where, what)
    unmap(driver, address, page)
    with pytest.raises(InvalidOperation, match="is not mapped"):
        driver.exchange(address, first)
    with pytest.raises(InvalidOperation, match="reservation"):
        driver.exchange(address + 3 * page, first)
