"""Virtual memory under real kernels, in the order in which a first run on a GPU wants to know.

Each test runs on the host too, where an unmapped address is a fault just as it is on a GPU, so that
what a machine with a GPU runs first has run before; and where no kernel is needed, over the
stand-in for the CUDA driver. Fences are the exception: work on the host is over when its call
returns.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import TOLERANCE
from vkv.allocator import KVCache, KVLayout, LayerGeometry, PagePool, Slot
from vkv.attention_backends import AttentionBackend, AttentionBatch, LayerAttention
from vkv.attention_backends.flash_attn import FlashAttn3Backend, FlashAttnBackend
from vkv.attention_backends.flashinfer import FlashInferBackend
from vkv.attention_backends.native import NativeBackend
from vkv.attention_backends.reference import ReferenceBackend
from vkv.attention_backends.sdpa import SdpaBackend
from vkv.attention_backends.torch_flash import TorchFlashBackend
from vkv.vmem import CudaDriver, HostDriver, VmemDriver
from vkv.vmem.errors import Shortage

KERNELS = [
    pytest.param(backend, device, id=f"{backend.name}-{device}", marks=marks)
    for device, marks, backends in (
        ("cpu", (), (NativeBackend, SdpaBackend)),
        (
            "cuda",
            (pytest.mark.gpu,),
            (TorchFlashBackend, FlashInferBackend, FlashAttnBackend, FlashAttn3Backend),
        ),
    )
    for backend in backends
]
LAYOUTS = [
    pytest.param({"layers_per_range": 1}, id="g=1"),
    pytest.param({"layers_per_range": 1, "split_kv": True}, id="g=1, split"),
    pytest.param({}, id="g=all"),
]
HEADS, KV_HEADS, DIM = 32, 8, 128  # Llama-3-8B's, and the size of kernel that is built ahead
PAGE_TOKENS = 512  # of one layer, of one page of 2 MiB
LENGTHS = (PAGE_TOKENS, 1, PAGE_TOKENS - 1, PAGE_TOKENS + 1, 2 * PAGE_TOKENS, 2 * PAGE_TOKENS + 37)


@pytest.fixture(params=["cpu", "standin", pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> Iterator[VmemDriver]:
    if request.param == "standin":
        yield request.getfixturevalue("standin_driver_factory")(page_bytes=2 << 20)
        return
    with make_driver(request.param) as driver:
        yield driver
        driver.record_fence().wait()


def make_driver(device: str) -> VmemDriver:
    """Pages of 2 MiB on both."""
    return HostDriver() if device == "cpu" else CudaDriver()


# -- tensors -----------------------------------------------------------------------------------


def test_tensors_over_wholly_unmapped_addresses(driver: VmemDriver) -> None:
    """Laid, cut and restrided while nothing backs them; 256 GiB is more than the device has."""
    page, size = driver.page_bytes, 1 << 38
    address = driver.reserve(size)
    whole = driver.tensor(address, (size // page, page // 2), (page // 2, 1), torch.bfloat16)
    row = whole[77_777].unflatten(0, (-1, 8, 128))
    strided = whole.as_strided((4, 16), (page, 1), whole[5].storage_offset())
    assert whole.device == driver.device
    assert row.data_ptr() == address + 77_777 * page
    driver.map(row.data_ptr(), driver.create(1))
    row.copy_(torch.arange(8, device=driver.device)[:, None].expand(8, 128))
    assert row.sum(dtype=torch.float32).item() == sum(range(8)) * row.numel() / 8
    driver.map(address + 5 * page, driver.create(7))  # the four strided rows, and between them
    strided.fill_(3)
    assert strided.sum().item() == 3 * 64


def test_one_access_call_opens_a_run_of_pages_to_kernels(driver: VmemDriver) -> None:
    count = 64
    address = driver.reserve(count * driver.page_bytes)
    driver.map(address, driver.create(count))
    words = driver.tensor(address, (count * driver.page_bytes // 4,), (1,), torch.int32)
    assert not words.any()  # what nobody has written is zero, whatever the memory held before
    torch.arange(words.numel(), dtype=torch.int32, out=words)
    assert torch.equal(words.cpu(), torch.arange(words.numel(), dtype=torch.int32))
    if "set_access" in driver.counters:
        assert driver.counters["set_access"] == 1


def test_a_thread_that_never_used_the_device_may_map(driver: VmemDriver) -> None:
    """No context is current in a fresh thread."""
    address = driver.reserve(4 * driver.page_bytes)

    def work() -> None:
        driver.map(address, driver.create(4))
        driver.record_fence().wait()

    with ThreadPoolExecutor(1) as fresh_thread:
        fresh_thread.submit(work).result()
    assert not driver.tensor(address, (4 * driver.page_bytes,), (1,), torch.uint8).any()


# -- kernels over partly mapped slots ----------------------------------------------------------


def make_cache(
    driver: VmemDriver, tile: int, knobs: dict, *, num_slots: int, limit: int
) -> KVCache:
    layers = (LayerGeometry(num_kv_heads=KV_HEADS, key_dim=DIM, value_dim=DIM),) * 2
    max_len = 8 * PAGE_TOKENS
    layout = KVLayout(
        layers, torch.bfloat16, max_len, driver.page_bytes, over_read_tokens=tile, **knobs
    )
    return KVCache(layout, PagePool(driver, limit), num_slots=num_slots)


def fill(cache: KVCache, slot: Slot, num_tokens: int, seed: int) -> None:
    """Grow, write noise, and poison every mapped row that a kernel has no business reading."""
    cache.grow(slot, num_tokens)
    tile = cache.layout.over_read_tokens
    readable = -(-num_tokens // tile) * tile
    generator = torch.Generator(cache.pool.driver.device).manual_seed(seed)
    for layer in range(2):
        for part in cache.layer(layer):
            backed = cache.layout.tokens_backed([len(pages) for pages in slot.pages])
            part[slot.index, :backed] = torch.nan
            part[slot.index, :readable].normal_(generator=generator)


def make_batch(
    device: torch.device, slots: list[Slot], query_lens: list[int], kv_lens: list[int]
) -> AttentionBatch:
    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    offsets = [sum(query_lens[:count]) for count in range(len(query_lens) + 1)]
    nowhere = torch.empty(0, dtype=torch.int64)
    indices = [slot.index for slot in slots]
    return AttentionBatch(
        query_lens=tuple(query_lens),
        kv_lens=tuple(kv_lens),
        slots=tuple(indices),
        cu_seqlens_q=int32(offsets),
        seqused_k=int32(kv_lens),
        slot_ids=int32(indices),
        write_index=(nowhere, nowhere),
    )


def check(backend: AttentionBackend, cache: KVCache, batch: AttentionBatch) -> None:
    """Both layers, against the reference over the very same rows."""
    device = cache.pool.driver.device
    query = torch.randn(batch.num_tokens, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    query = query.to(device, torch.bfloat16)
    layer = LayerAttention(scale=DIM**-0.5)
    for index in range(2):
        keys, values = cache.layer(index)
        backend.check_cache(keys, values)
        found = backend.forward(query, keys, values, batch, layer)
        expected = ReferenceBackend().forward(query, keys, values, batch, layer)
        assert expected.isfinite().all()
        rounding = TOLERANCE[torch.bfloat16]
        torch.testing.assert_close(found, expected, atol=rounding, rtol=rounding)


def usable(backend: type[AttentionBackend]) -> AttentionBackend:
    if reason := backend.unavailable_reason():
        pytest.skip(f"{backend.name} {reason}")
    return backend()


@pytest.mark.parametrize(("backend", "device"), KERNELS)
@pytest.mark.parametrize("knobs", LAYOUTS)
def test_kernels_read_nothing_past_their_contract(
    backend: type[AttentionBackend], device: str, knobs: dict
) -> None:
    """Unmapped right behind the last row where a length fills its pages, NaN where it does not.

    Kernels that load whole tiles declare them: backed are then the rows up to the tile's end.
    """
    kernel, tile = usable(backend), backend.capabilities.over_read_tokens
    with (
        make_driver(device) as driver,
        make_cache(driver, tile, knobs, num_slots=8, limit=1 << 28) as cache,
    ):
        slots = [cache.open() for _ in range(8)]
        random.Random(0).shuffle(slots)
        slots = slots[: len(LENGTHS)]  # of the others nothing is mapped at all
        for number, (slot, length) in enumerate(zip(slots, LENGTHS, strict=True)):
            fill(cache, slot, length, seed=number)
        lengths = list(LENGTHS)
        for query_lens in ([1] * len(lengths), [min(length, 129) for length in lengths]):
            check(kernel, cache, make_batch(driver.device, slots, query_lens, lengths))
        driver.record_fence().wait()


@pytest.mark.parametrize(("backend", "device"), KERNELS)
def test_kernels_over_pages_aliased_at_several_addresses(
    backend: type[AttentionBackend], device: str
) -> None:
    kernel, tile = usable(backend), backend.capabilities.over_read_tokens
    with (
        make_driver(device) as driver,
        make_cache(driver, tile, {}, num_slots=4, limit=1 << 28) as cache,
    ):
        parent = cache.open()
        length = 2 * PAGE_TOKENS + 37
        fill(cache, parent, length, seed=0)
        slots = [parent, *(cache.fork(parent, length) for _ in range(3))]
        assert cache.pool.num_held < 4 * parent.num_pages  # shared, not copied
        batch = make_batch(driver.device, slots, [1] * 4, [length] * 4)
        check(kernel, cache, batch)
        keys, _ = cache.layer(0)
        first = keys[slots[0].index, :length]
        for slot in slots[1:]:
            assert torch.equal(keys[slot.index, :length], first)
        driver.record_fence().wait()


# -- work in flight ----------------------------------------------------------------------------


def keep_busy(device: torch.device, milliseconds: float) -> None:
    """Let the device's current stream wait, so that what is launched next is still to come."""
    if device.type == "cuda":
        torch.cuda._sleep(int(milliseconds * 1.5e6))  # cycles


@pytest.mark.gpu
@pytest.mark.parametrize("end", ["close", "truncate", "trim", "shutdown"])
def test_nothing_is_unmapped_under_a_running_kernel(end: str) -> None:
    """The kernel cannot have run when the memory is let go; were it taken, this would fault."""
    with CudaDriver() as driver:
        cache = make_cache(driver, 1, {}, num_slots=2, limit=1 << 28)
        slot = cache.open()
        fill(cache, slot, 4 * PAGE_TOKENS, seed=0)
        rows = cache.layer(1)[0][slot.index, : 4 * PAGE_TOKENS]
        expected = rows.float().sum(dtype=torch.float64).item()
        keep_busy(driver.device, 200)
        found = rows.float().sum(dtype=torch.float64)
        over = torch.cuda.Event()
        over.record()
        assert not over.query(), "the kernel ran before the test had begun"
        if end == "trim":
            cache.park(slot, list(range(4 * PAGE_TOKENS)))
        actions: dict[str, Callable[[], object]] = {
            "close": lambda: cache.close(slot),
            "truncate": lambda: cache.truncate(slot, 1),
            "trim": cache.trim,
            "shutdown": cache.shutdown,
        }
        actions[end]()
        assert over.query(), "the pages went while the kernel was still to run"
        assert found.item() == expected
        cache.shutdown()


class Traffic:
    """Random operations on a cache, whose rows are written and compared by work in flight.

    A token's row holds its number and its place, so that equal prefixes have equal rows. Mismatches
    are counted on the device and read seldom: the host runs ahead, as an engine does.
    """

    MAX_LEN, NUM_SLOTS, STEMS = 1024, 8, 5
    COMMON = 300  # tokens, before stems part in the middle of a page
    OPERATIONS = ("grow",) * 9 + ("fork", "truncate") * 2 + ("open", "adopt", "park", "close")

    def __init__(self, driver: VmemDriver, seed: int) -> None:
        self.random = random.Random(seed)
        self.device = driver.device
        # 16 KiB a token: 128 tokens a page, and the pool holds half of what the slots could.
        geometry = LayerGeometry(num_kv_heads=8, key_dim=256, value_dim=256)
        layout = KVLayout((geometry,), torch.float32, self.MAX_LEN, driver.page_bytes)
        limit = self.NUM_SLOTS * layout.num_pages(self.MAX_LEN) // 2 * layout.page_bytes
        self.cache = KVCache(layout, PagePool(driver, limit), num_slots=self.NUM_SLOTS)
        self.keys, self.values = self.cache.layer(0)
        shape = (self.STEMS, self.MAX_LEN)
        tokens = torch.randint(1000, shape, generator=torch.Generator().manual_seed(seed))
        tokens[1:, : self.COMMON] = tokens[0, : self.COMMON]
        self.tokens = tokens.tolist()
        self.rows = (tokens * 4096 + torch.arange(self.MAX_LEN)).float().to(self.device)
        self.live: list[tuple[Slot, int]] = []  # and the stem of each
        self.mismatches = torch.zeros((), dtype=torch.int64, device=self.device)

    def step(self) -> None:
        if self.random.random() < 0.01:
            keep_busy(self.device, 0.5)
        if self.random.random() < 0.002:
            self.cache.trim()
        name = self.random.choice(self.OPERATIONS)
        try:
            if name in ("open", "adopt"):
                getattr(self, name)()
            elif self.live:
                getattr(self, name)(self.random.randrange(len(self.live)))
        except Shortage:
            if self.live:
                self.close(0)
        if self.live:
            self.compare(*self.random.choice(self.live))

    def open(self) -> None:
        self.live.append((self.cache.open(), self.random.randrange(self.STEMS)))

    def adopt(self) -> None:
        stem = self.random.randrange(self.STEMS)
        tokens = self.tokens[stem][: self.random.randint(0, self.MAX_LEN)]
        self.live.append((self.cache.adopt(tokens)[0], stem))

    def grow(self, which: int) -> None:
        slot, stem = self.live[which]
        start = slot.num_tokens
        end = min(self.MAX_LEN, start + self.random.choice([1, 1, 3, 60, 300]))
        self.cache.grow(slot, end)
        for part in (self.keys, self.values):
            part[slot.index, start:end] = self.rows[stem, start:end, None, None]
        if self.random.random() < 0.3:
            self.cache.look_ahead(slot, end + 150)

    def fork(self, which: int) -> None:
        slot, stem = self.live[which]
        child = self.cache.fork(slot, self._some(slot))
        self.live.append((child, self._continued(child, stem)))

    def truncate(self, which: int) -> None:
        slot, stem = self.live[which]
        self.cache.truncate(slot, self._some(slot))
        self.live[which] = slot, self._continued(slot, stem)

    def park(self, which: int) -> None:
        slot, stem = self.live.pop(which)
        self.cache.park(slot, self.tokens[stem][: slot.num_tokens])

    def close(self, which: int) -> None:
        self.cache.close(self.live.pop(which)[0])

    def compare(self, slot: Slot, stem: int) -> None:
        """The rows of one request with what it wrote or took over."""
        expected = self.rows[stem, : slot.num_tokens, None, None]
        for part in (self.keys, self.values):
            self.mismatches += (part[slot.index, : slot.num_tokens] != expected).sum()

    def _continued(self, slot: Slot, stem: int) -> int:
        """The stem that a slot goes on with: any, while it holds what is common to all."""
        return self.random.randrange(self.STEMS) if slot.num_tokens <= self.COMMON else stem

    def _some(self, slot: Slot) -> int:
        """All of the slot's tokens, what is common to all stems, or any part."""
        count = slot.num_tokens
        return self.random.choice([count, min(count, self.COMMON), self.random.randint(0, count)])


TRAFFIC_S = float(os.environ.get("VKV_TRAFFIC_S", "60"))  # on a GPU; 200,000 operations at most


@pytest.mark.timeout(max(120, 3 * TRAFFIC_S))
def test_random_traffic_with_kernels_in_flight(
    driver: VmemDriver, record_property: Callable[[str, object], None]
) -> None:
    """As many operations as there is time for: how long one takes is not known before."""
    on_gpu = driver.device.type == "cuda"
    traffic, until = Traffic(driver, seed=11), time.monotonic() + TRAFFIC_S
    for number in range(200_000 if on_gpu else 1000):
        if on_gpu and number % 500 == 0 and time.monotonic() > until:
            break
        traffic.step()
        if number % 500 == 499:
            traffic.cache.check_invariants()
            assert not traffic.mismatches.item(), f"by operation {number}"
    assert not traffic.mismatches.item()
    record_property("operations", number + 1)
    traffic.cache.shutdown()
    assert (driver.num_pages, driver.reserved_bytes) == (0, 0)
