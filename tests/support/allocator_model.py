"""What requests must see of a cache, kept beside it as plain lists: the allocator tests' oracle.

The keys and values of a token depend on every token before it and on the request's variant, so the
model stores the identity of the whole prefix: equal prefixes of one variant have equal content,
whoever computed them, and no others do.
The same oracle serves the state machines, the long fuzz and the tests of single operations.
"""

import contextlib
import mmap
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from page_maps import check_page_map
from standin import StandInCudaDriver
from vkv.allocator import (
    KVCache,
    KVLayout,
    LayerGeometry,
    PagedKVCache,
    PagedLayout,
    PagePool,
    Slot,
    SlotCache,
)
from vkv.vmem import HostDriver, VmemDriver, is_of_file
from vkv.vmem.errors import DriverError, Shortage

PAGE = 4096
MAX_LEN = 150
NUM_SLOTS = 5
DTYPE = torch.int32  # as wide as float32, and exact
_PLACES, _ELEMENTS = 16, 64  # (layer, key or value) and elements told apart in one number


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where a test module imports this, tensors as small as here are not cut up for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Flaky:
    """Mixed into a driver: lets one system or driver call fail, the next but `fail_after`."""

    fail_after: int | None = None
    fail_short = False  # with the shortage that the call could meet, instead of a DriverError
    spared = frozenset[str]()  # kinds of calls that never fail

    def _call(self, kind, function, *args, shortage=DriverError):
        if self.fail_after is not None and kind not in self.spared:
            if not self.fail_after:
                self.fail_after = None
                raise (shortage if self.fail_short else DriverError)(f"injected into {kind}")
            self.fail_after -= 1
        return super()._call(kind, function, *args, shortage=shortage)


class FlakyHostDriver(Flaky, HostDriver):
    """The host, with pages of 4 KiB unless told otherwise."""

    def __init__(self, page_bytes: int = PAGE, max_mappings: int | None = None) -> None:
        super().__init__(page_bytes, max_mappings)


class FlakyStandInDriver(Flaky, StandInCudaDriver):
    """The CUDA driver over the stand-in for its library."""

    spared = frozenset({"release", "wait"})  # what these refuse to take back is lost for good


def _layers(*dims: tuple[int, int, int], windows: Sequence[int | None] = ()) -> tuple:
    windows = windows or [None] * len(dims)
    return tuple(
        LayerGeometry(num_kv_heads=heads, key_dim=key, value_dim=value, window=window)
        for (heads, key, value), window in zip(dims, windows, strict=True)
    )


@dataclass(frozen=True)
class Kind:
    """A geometry to test, for pages of 4 KiB; larger pages get proportionally wider heads."""

    name: str
    layers: tuple[LayerGeometry, ...]
    options: dict = field(default_factory=dict)

    def layout(self, page_bytes: int, max_len: int = MAX_LEN) -> KVLayout:
        factor = page_bytes // PAGE
        layers = tuple(
            LayerGeometry(
                num_kv_heads=layer.num_kv_heads,
                key_dim=layer.key_dim * factor,
                value_dim=layer.value_dim * factor,
                window=layer.window,
            )
            for layer in self.layers
        )
        return KVLayout(layers, DTYPE, max_len, page_bytes, **self.options)


KINDS = [
    Kind("even", _layers((2, 8, 8), (2, 8, 8))),  # 16 tokens a page
    Kind("ragged", _layers((1, 5, 3), (1, 5, 3), (3, 7, 2))),  # no whole number of tokens a page
    Kind("tiles", _layers((2, 16, 8), (2, 16, 8)), {"over_read_tokens": 64}),
    Kind(
        "split",
        _layers((1, 24, 5), (1, 24, 5), (1, 24, 5)),
        {"split_kv": True, "layers_per_range": 2},
    ),
    Kind(
        "windows",
        _layers((1, 9, 9), (4, 8, 8), (1, 9, 9), (4, 8, 8), windows=(None, 32, None, 32)),
        {"layers_per_range": 1, "over_read_tokens": 16},
    ),
    Kind("wide", _layers((8, 48, 32), (8, 48, 32))),  # a token spans pages
]
KIND = {kind.name: kind for kind in KINDS}


def make_cache(
    kind: Kind,
    driver: VmemDriver | None = None,
    *,
    rows: float = 2.5,
    num_slots: int = NUM_SLOTS,
    max_parked: int = 3,
    max_len: int = MAX_LEN,
    movable: bool = False,
    **pool_options,
) -> KVCache:
    """A contiguous cache whose pool holds about `rows` full slots."""
    driver = driver or FlakyHostDriver()
    layout = kind.layout(driver.page_bytes, max_len)
    limit = int(rows * layout.num_pages(max_len)) * driver.page_bytes
    pool = PagePool(driver, limit, **pool_options)
    return KVCache(layout, pool, num_slots=num_slots, max_parked=max_parked, movable=movable)


def make_paged(
    *,
    block_tokens: int = 7,
    rows: float = 2.5,
    num_slots: int = NUM_SLOTS,
    max_parked: int = 3,
    **options,
) -> PagedKVCache:
    """A paged cache whose pool holds about `rows` full slots."""
    layout = PagedLayout(KIND["ragged"].layers, DTYPE, MAX_LEN, block_tokens)
    limit = int(rows * layout.num_pages(MAX_LEN)) * layout.page_bytes
    return PagedKVCache(layout, limit, num_slots=num_slots, max_parked=max_parked, **options)


@dataclass(eq=False)
class Request:
    """A live request: its tokens, and the identity of every prefix of them."""

    slot: Slot
    variant: str = ""
    tokens: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    written: set[int] = field(default_factory=set)  # all prefixes this request has had


@dataclass(eq=False)
class Pin:
    """Tokens of a slot that stay readable, whatever becomes of the request that wrote them."""

    slot: Slot
    prefixes: list[int]


class SavedTokens:
    """What a request had at one time, in a file, each stream from a whole 4 KiB on."""

    def __init__(self, cache: SlotCache, request: Request) -> None:
        self.variant = request.variant
        self.tokens, self.prefixes = list(request.tokens), list(request.prefixes)
        self.fd = os.memfd_create("tokens")
        weakref.finalize(self, os.close, self.fd)
        self.offsets: list[int] = []
        end = 0
        for pieces in cache.spans(request.slot, 0, len(self.tokens)):
            content = b"".join(piece.numpy().tobytes() for piece in pieces)
            self.offsets.append(end)
            os.pwrite(self.fd, content, end)
            end += -(-len(content) // PAGE) * PAGE
            os.ftruncate(self.fd, end)
        self.content = os.pread(self.fd, end, 0)

    def write_rest(self, cache: SlotCache, slot: Slot, starts: Sequence[int]) -> None:
        """What of each stream is not mapped."""
        spans = cache.spans(slot, 0, slot.num_tokens)
        for (span,), start, offset in zip(spans, starts, self.offsets, strict=True):
            rest = self.content[offset + start : offset + len(span)]
            span[start:] = torch.frombuffer(bytearray(rest), dtype=torch.uint8) if rest else 0


class Model:
    """A cache and its live requests.

    Every operation is a method that does it, lets the request write what it was granted, and,
    where it was refused, proves that nobody else's memory has changed.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.live: list[Request] = []
        self.pins: list[Pin] = []
        self._left: dict[object, set[int]] = {}  # by owner, all prefixes that its requests had
        self._identities: dict[tuple[int | str, int], int] = {}
        self._factors = _factors(cache)

    # -- operations --------------------------------------------------------------------------

    def open(self, variant: str = "", owner: str | None = None) -> Request | None:
        with self._refusable(lambda: self.live):
            return self._admit(self.cache.open(owner or variant), [], variant)
        return None

    def adopt(
        self, tokens: Sequence[int], variant: str = "", owner: str | None = None
    ) -> Request | None:
        with self._refusable(lambda: self.live):
            slot, num_cached = self.cache.adopt(tokens, variant, owner=owner)
            assert 0 <= num_cached <= len(tokens)
            assert slot.num_tokens == num_cached
            return self._admit(slot, tokens[:num_cached], variant)
        return None

    def reserve(self, request: Request, num_tokens: int) -> bool:
        with self._refusable(lambda: self.live):
            self.cache.reserve(request.slot, num_tokens)
            return True
        return False

    def grow(self, request: Request, tokens: Sequence[int]) -> bool:
        total = len(request.tokens) + len(tokens)
        promised = request.slot.promised_tokens
        with self._refusable(lambda: self.live, may_fail=total > promised or self._may_meet_limits):
            self.cache.grow(request.slot, total)
            self._append(request, tokens)
            return True
        return False

    def attach(self, saved: SavedTokens, num_tokens: int) -> Request | None:
        """A request whose first tokens are mapped from a file that one like it was saved to."""
        with self._refusable(lambda: self.live):
            slot = self.cache.open(saved.variant)
            try:
                starts = self.cache.attach(slot, saved.fd, saved.offsets, num_tokens)
            except BaseException:
                assert (slot.num_tokens, slot.promised_tokens, slot.num_pages) == (0, 0, 0)
                self.cache.close(slot)
                raise
            saved.write_rest(self.cache, slot, starts)
            return self._admit(slot, saved.tokens[:num_tokens], saved.variant)
        return None

    def truncate(self, request: Request, num_tokens: int) -> None:
        others = [r for r in self.live if r is not request]
        with self._refusable(lambda: others):
            self.cache.truncate(request.slot, num_tokens)
        self._forget(request, num_tokens)

    def fork(self, request: Request, num_tokens: int, owner: str | None = None) -> Request | None:
        with self._refusable(lambda: self.live):
            slot = self.cache.fork(request.slot, num_tokens, owner)
            return self._admit(slot, request.tokens[:num_tokens], request.variant)
        return None

    def park(self, request: Request, num_tokens: int) -> bool:
        others = [r for r in self.live if r is not request]
        with self._refusable(lambda: others):
            self.cache.park(request.slot, request.tokens[:num_tokens], request.variant)
            self.live.remove(request)
            return True
        self._forget(request, request.slot.num_tokens)
        return False

    def close(self, request: Request) -> bool:
        others = [r for r in self.live if r is not request]
        with self._refusable(lambda: others):
            self.cache.close(request.slot)
            self.live.remove(request)
            return True
        self._forget(request, request.slot.num_tokens)
        return False

    def pin(self, request: Request, num_tokens: int) -> Pin:
        self.cache.pin(request.slot, num_tokens)
        self.pins.append(Pin(request.slot, request.prefixes[:num_tokens]))
        return self.pins[-1]

    def unpin(self, pin: Pin) -> None:
        self.pins.remove(pin)  # also if what was closed meanwhile cannot be unmapped now
        with self._refusable(lambda: self.live):
            self.cache.unpin(pin.slot)

    def find(self, tokens: Sequence[int], variant: str = "") -> None:
        length = self.cache.prefix_length(tokens, variant)
        match = self.cache.find(tokens, variant)
        assert length == (match.num_tokens if match else 0)

    def look_ahead(self, request: Request, num_tokens: int) -> None:
        flaky, failures = self._is_flaky, self.cache._look_ahead.num_failures
        with self._refusable(lambda: self.live):
            self.cache.look_ahead(request.slot, num_tokens)
            self.cache._look_ahead.drain()
            assert flaky or failures == self.cache._look_ahead.num_failures

    def trim(self) -> None:
        with self._refusable(lambda: self.live):
            self.cache.trim()
            pinned = {pin.slot for pin in self.pins} - {request.slot for request in self.live}
            assert self.cache.stats().slots_parked == len(pinned)
            for request in self.live:
                state = self._state(request.slot)
                assert state[-1] == request.slot.pages  # nothing beyond the promise

    # -- proof -------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare all that live requests can read, and recount every page from scratch."""
        self.cache.check_invariants()
        self.check_content(self.live)
        self._check_prefixes([(pin.slot, pin.prefixes) for pin in self.pins])
        self._recount()

    def check_content(self, requests: Sequence[Request]) -> None:
        """Every token of `requests`, in every layer, holds what its request wrote or adopted."""
        lengths = [len(r.tokens) for r in requests]
        assert lengths == [r.slot.num_tokens for r in requests]
        self._check_prefixes([(request.slot, request.prefixes) for request in requests])

    def _check_prefixes(self, expected: Sequence[tuple[Slot, list[int]]]) -> None:
        lengths = [len(prefixes) for _, prefixes in expected]
        if not sum(lengths):
            return
        where = self.cache.locate([slot for slot, _ in expected], [0] * len(expected), lengths)
        prefixes = torch.tensor([p for _, some in expected for p in some], dtype=DTYPE)
        for found, factor in self._factors:
            content = found[where].flatten(1)
            assert torch.equal(content, prefixes[:, None] * (_PLACES * _ELEMENTS) + factor)

    def check_isolation(self) -> None:
        """Whatever a slot's memory shows was written by its own request, or is zero; or, where
        memory is cleared between owners only, by a request of the same."""
        by_owner = self.cache.pool.sanitize == "tenants"
        for request in self.live:
            known = self._left[request.slot.owner] if by_owner else request.written
            for words in visible_words(self.cache, request.slot):
                shown = np.unique(words.numpy() // (_PLACES * _ELEMENTS))
                assert known.issuperset(shown[shown != 0].tolist())

    def _recount(self) -> None:
        cache, pool = self.cache, self.cache.pool
        parked = list(cache._table.parked)
        references = Counter(
            page
            for slot in [*(r.slot for r in self.live), *parked]
            for pages in slot.pages
            for page in pages
        )
        of_files = Counter({p: n for p, n in references.items() if is_of_file(p)})
        references -= of_files
        assert references == pool._references
        assert of_files == pool._file_references
        assert pool.num_reserved == sum(r.slot.reservation.num_pages for r in self.live)
        stats = cache.stats()
        assert stats.slots_open == len(self.live)
        assert stats.slots_parked == len(parked)
        assert stats.tokens_held == sum(len(r.tokens) for r in self.live)
        held, ahead, idle, reclaimable = self._uses()
        assert (stats.pages_held, stats.pages_ahead, stats.pages_parked) == (held, ahead, idle)
        assert held + ahead + idle == len(references)
        assert cache.num_obtainable() == pool.num_available + reclaimable
        assert stats.pages_of_files == len(of_files)
        assert stats.physical_bytes == pool.num_created * stats.page_bytes
        check_page_map(cache, [*(r.slot for r in self.live), *parked])

    def _uses(self) -> tuple[int, int, int, int]:
        """Pages held, ahead, idle or parked, and reclaimable: by listing every page."""
        to_pages = self.cache.layout.pages_per_range
        held, promised, ahead, rest = (set() for _ in range(4))
        for slot in (r.slot for r in self.live):
            promise = max(slot.num_tokens, slot.promised_tokens)
            ends = [slot.num_tokens, promise, min(max(promise, slot.ahead_tokens), MAX_LEN)]
            for pages, *counts in zip(slot.pages, *map(to_pages, ends), strict=True):
                held.update(pages[: counts[0]])
                promised.update(pages[: counts[1]])
                ahead.update(pages[: counts[2]])
                rest.update(pages)
        for slot in self.cache._table.parked:
            for pages, count in zip(slot.pages, to_pages(slot.pinned_tokens), strict=True):
                rest.update(pages)
                for known in (held, promised, ahead):
                    known.update(pages[:count])
        for pages in (held, promised, ahead, rest):
            pages.difference_update([page for page in pages if is_of_file(page)])
        return len(held), len(ahead - held), len(rest - ahead), len(rest - promised)

    # -- inside ------------------------------------------------------------------------------

    @property
    def _may_meet_limits(self) -> bool:
        """True if the driver may refuse what the pool has promised."""
        budget = getattr(self.cache.pool.driver, "max_mappings", 1 << 30)
        return self._is_flaky or budget < 1000

    @property
    def _is_flaky(self) -> bool:
        return getattr(self.cache.pool.driver, "fail_after", None) is not None

    @contextlib.contextmanager
    def _refusable(
        self, bystanders: Callable[[], list[Request]], *, may_fail: bool = True
    ) -> Iterator[None]:
        """An operation may run short, or meet an injected failure; `bystanders` keep all."""
        before = [self._state(request.slot) for request in bystanders()]
        flaky = self._is_flaky
        try:
            yield
        except Shortage:
            assert may_fail, "a promise was broken"
            assert before == [self._state(request.slot) for request in bystanders()]
        except DriverError:
            assert flaky, "a call failed that was not meant to"
            assert before == [self._state(request.slot) for request in bystanders()]
        finally:
            if flaky:
                self.cache.pool.driver.fail_after = None

    def _state(self, slot: Slot) -> tuple:
        """What a request has; pages mapped ahead of its promise may be taken back any time."""
        promised = self.cache.layout.pages_per_range(max(slot.num_tokens, slot.promised_tokens))
        pages = [p[:count] for p, count in zip(slot.pages, promised, strict=True)]
        reserved = slot.reservation.num_pages
        return slot.index, slot.state, slot.num_tokens, slot.promised_tokens, reserved, pages

    def _admit(self, slot: Slot, tokens: Sequence[int], variant: str = "") -> Request:
        request = Request(slot, variant)
        self._remember(request, tokens)
        self.live.append(request)
        return request

    def _append(self, request: Request, tokens: Sequence[int]) -> None:
        """The request stores the keys and values of `tokens` behind those it has."""
        start = len(request.tokens)
        self._remember(request, tokens)
        where = self.cache.locate([request.slot], [start], [len(tokens)])
        prefixes = torch.tensor(request.prefixes[start:], dtype=DTYPE)
        for target, factor in self._factors:
            content = prefixes[:, None] * (_PLACES * _ELEMENTS) + factor
            target[where] = content.view(-1, *target.shape[2:])

    def _remember(self, request: Request, tokens: Sequence[int]) -> None:
        last = request.prefixes[-1] if request.prefixes else request.variant
        for token in tokens:
            last = self._identities.setdefault((last, token), len(self._identities) + 1)
            request.prefixes.append(last)
        request.tokens.extend(tokens)
        request.written.update(request.prefixes)
        self._left.setdefault(request.slot.owner, set()).update(request.prefixes)

    @staticmethod
    def _forget(request: Request, num_tokens: int) -> None:
        del request.tokens[num_tokens:], request.prefixes[num_tokens:]


def _factors(cache: SlotCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor of the cache, and what tells its elements from all others of a token."""
    tensors = [t for index in range(len(cache.layout.layers)) for t in cache.layer(index)]
    return [
        (
            tensor,
            place * _ELEMENTS
            + torch.arange(tensor.shape[2] * tensor.shape[3], dtype=DTYPE) % _ELEMENTS,
        )
        for place, tensor in enumerate(tensors)
    ]


@contextlib.contextmanager
def shown_words(fd: int) -> Iterator[set[int]]:
    """The identities that all memory behind a descriptor shows."""
    size, end = os.fstat(fd).st_size, 0
    words: set[int] = set()
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # nothing follows
            break
        end = os.lseek(fd, start, os.SEEK_HOLE)
        with mmap.mmap(fd, end - start, prot=mmap.PROT_READ, offset=start) as view:
            found = torch.frombuffer(bytearray(view), dtype=DTYPE)
        words |= set((found // (_PLACES * _ELEMENTS)).unique().tolist())
    yield words - {0}


def visible_words(cache: SlotCache, slot: Slot) -> Iterator[torch.Tensor]:
    """All that is backed of a slot, far ends and padding included."""
    if isinstance(cache, KVCache):
        layout, driver = cache.layout, cache.pool.driver
        first = cache.layer(0)[0].data_ptr() - layout.key_geometry(0).offset_bytes
        for geometry, pages in zip(layout.ranges, slot.pages, strict=True):
            address = first + slot.index * layout.slot_bytes + geometry.offset
            num_words = len(pages) * layout.page_bytes // DTYPE.itemsize
            yield driver.tensor(address, (num_words,), (1,), DTYPE)
    elif slot.num_pages:
        table = cache.block_tables([slot])
        assert table is not None
        for index in range(len(cache.layout.layers)):
            for tensor in cache.layer(index):
                yield tensor[table[0, : slot.num_pages]]
