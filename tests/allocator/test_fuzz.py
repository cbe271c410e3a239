"""Eighty thousand random operations, every one followed by a recount of everything.

Hypothesis finds small counterexamples; this goes far from the start, at full speed. A failure
prints the seed and the number of the operation, which reproduce it. VKV_FUZZ=20 does twenty times
as many.
"""

import os
import random
from collections import Counter

import pytest
from allocator_model import (
    KIND,
    MAX_LEN,
    PAGE,
    FlakyHostDriver,
    FlakyStandInDriver,
    Model,
    SavedTokens,
    make_cache,
    make_paged,
    one_thread,
)
from vkv.allocator import PagePool, Reservation
from vkv.vmem import Page
from vkv.vmem.errors import DriverError, OutOfPages

__all__ = ["one_thread"]  # a fixture

_OPERATIONS = {
    "grow": 30,
    "adopt": 12,
    "park": 10,
    "truncate": 7,
    "fork": 8,
    "reserve": 6,
    "close": 5,
    "open": 3,
    "look_ahead": 4,
    "save": 2,
    "attach": 8,
    "trim": 1,
}


_VARIANTS = ["", "", "", "adapter"]
_TIMES = int(os.environ.get("VKV_FUZZ", "1"))


class Fuzz:
    """Does one random operation after another on a model."""

    def __init__(self, model: Model, seed: int, *, failures: float = 0.0) -> None:
        self.model = model
        self.random = random.Random(seed)
        self.failures = failures
        self.saved: list[SavedTokens] = []
        # What the next requests are about: a few stems, so that prefixes meet and part again.
        self.stems = [[self.random.randrange(3) for _ in range(MAX_LEN)] for _ in range(4)]

    def step(self) -> None:
        (name,) = self.random.choices(list(_OPERATIONS), list(_OPERATIONS.values()))
        if self.random.random() < self.failures:
            driver = self.model.cache.pool.driver
            driver.fail_after = int(self.random.expovariate(0.5))
            driver.fail_short = self.random.random() < 0.5
        getattr(self, name)()

    def grow(self) -> None:
        if request := self._request():
            room = MAX_LEN - len(request.tokens)
            count = min(room, self.random.choice([1, 1, 2, 7, 40, room]))
            stem = self.random.choice(self.stems)
            self.model.grow(request, stem[len(request.tokens) :][:count])

    def adopt(self) -> None:
        tokens = self.random.choice(self.stems)[: self.random.randint(0, MAX_LEN)]
        self.model.adopt(tokens, self.random.choice(_VARIANTS), self._owner())

    def park(self) -> None:
        if request := self._request():
            self.model.park(request, self._up_to(len(request.tokens)))

    def truncate(self) -> None:
        if request := self._request():
            self.model.truncate(request, self._up_to(len(request.tokens)))

    def fork(self) -> None:
        if request := self._request():
            self.model.fork(request, self._up_to(len(request.tokens)), self._owner())

    def reserve(self) -> None:
        if request := self._request():
            self.model.reserve(request, self.random.randint(0, MAX_LEN))

    def close(self) -> None:
        if request := self._request():
            self.model.close(request)

    def open(self) -> None:
        self.model.open(self.random.choice(_VARIANTS), self._owner())

    def look_ahead(self) -> None:
        if request := self._request():
            self.model.look_ahead(request, len(request.tokens) + self.random.randint(0, 30))

    def trim(self) -> None:
        self.model.trim()

    def save(self) -> None:
        if isinstance(self.model.cache.pool.driver, FlakyHostDriver) and (r := self._request()):
            self.saved = [*self.saved[-3:], SavedTokens(self.model.cache, r)]

    def attach(self) -> None:
        if self.saved:
            saved = self.random.choice(self.saved)
            self.model.attach(saved, self._up_to(len(saved.tokens)))

    def _owner(self) -> str | None:
        by_owner = self.model.cache.pool.sanitize == "tenants"
        return self.random.choice(["ann", "bob", None, None]) if by_owner else None

    def _request(self):
        return self.random.choice(self.model.live) if self.model.live else None

    def _up_to(self, count: int) -> int:
        """Mostly all of `count`, sometimes any part of it."""
        return count if self.random.random() < 0.5 else self.random.randint(0, count)


def run(model: Model, seed: int, num_operations: int, *, failures: float = 0.0) -> None:
    fuzz = Fuzz(model, seed, failures=failures)
    isolated = model.cache.pool.sanitize != "never"
    for number in range(_TIMES * num_operations):
        try:
            fuzz.step()
            model.check()
            if isolated:
                model.check_isolation()
        except BaseException as error:
            error.add_note(f"seed {seed}, operation {number}")
            raise
    if hasattr(model.cache.pool.driver, "fail_after"):
        model.cache.pool.driver.fail_after = None
    model.cache.shutdown()
    assert model.cache.pool.num_held == model.cache.pool.num_reserved == 0


@pytest.mark.parametrize("name", ["even", "ragged", "tiles", "split", "windows"])
def test_contiguous(name):
    with FlakyHostDriver() as driver:
        run(Model(make_cache(KIND[name], driver)), 1, 4000)
        assert (driver.num_pages, driver.reserved_bytes) == (0, 0)


def test_contiguous_with_tokens_larger_than_pages():
    with FlakyHostDriver() as driver:
        run(Model(make_cache(KIND["wide"], driver)), 1, 1000)


@pytest.mark.parametrize("name", ["ragged", "tiles"])
def test_contiguous_with_failing_calls(name):
    with FlakyHostDriver() as driver:
        cache = make_cache(KIND[name], driver, low_watermark=3)
        run(Model(cache), 2, 4000, failures=0.2)
        assert (driver.num_pages, driver.reserved_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("name", "sanitize"), [("tiles", "zero"), ("split", "zero"), ("tiles", "tenants")]
)
def test_contiguous_and_isolated(name, sanitize):
    with FlakyHostDriver() as driver:
        run(Model(make_cache(KIND[name], driver, sanitize=sanitize)), 3, 2000, failures=0.02)


def test_contiguous_with_few_mappings():
    with FlakyHostDriver(max_mappings=20) as driver:
        run(Model(make_cache(KIND["windows"], driver)), 4, 4000)


@pytest.mark.parametrize("name", ["ragged", "tiles"])
def test_contiguous_on_the_standin(cuda_standin, name):
    with FlakyStandInDriver() as driver:
        run(Model(make_cache(KIND[name], driver)), 5, 2500, failures=0.1)
        assert (driver.num_pages, driver.reserved_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("sanitize", "num_operations"), [("never", 6000), ("zero", 2000), ("tenants", 2000)]
)
def test_paged(sanitize, num_operations):
    run(Model(make_paged(sanitize=sanitize)), 6, num_operations)


def test_pool():
    with FlakyHostDriver() as driver:
        fuzz = PoolFuzz(driver, seed=7)
        for number in range(_TIMES * 25_000):
            try:
                fuzz.step()
                fuzz.check()
            except BaseException as error:
                error.add_note(f"operation {number}")
                raise


class PoolFuzz:
    """A pool, who claims how much of it, and who holds which page."""

    def __init__(self, driver: FlakyHostDriver, seed: int) -> None:
        self.driver = driver
        self.random = random.Random(seed)
        self.pool = PagePool(driver, 40 * PAGE, low_watermark=4)
        self.claims = [Reservation() for _ in range(5)]
        self.held: list[Page] = []  # a page once for each reference

    def step(self) -> None:
        claim = self.random.choice(self.claims)
        some = self.random.choices(self.held, k=3) if self.held else []
        failing = self.random.random() < 0.1
        self.driver.fail_after, self.driver.fail_short = (0 if failing else None), True
        try:
            match self.random.randrange(8):
                case 0 | 1:
                    self.pool.reserve(self.random.randint(0, 9), into=claim)
                case 2 | 3:
                    self.held += self.pool.commit(claim, self.random.randint(0, claim.num_pages))
                case 4:
                    self.pool.retain(some)
                    self.held += some
                case 5:
                    self.random.shuffle(self.held)
                    count = self.random.randint(0, len(self.held))
                    leaving, self.held = self.held[:count], self.held[count:]
                    self.pool.release(leaving)
                case 6:
                    self.pool.cancel(claim, self.random.randint(0, claim.num_pages))
                case 7:
                    self.random.choice([self.pool.trim, self.pool.refill])()
        except OutOfPages:
            pass  # the limit, or an injected shortage of the device
        except DriverError:
            assert failing
        self.driver.fail_after = None

    def check(self) -> None:
        pool = self.pool
        pool.check_invariants()
        assert pool._references == Counter(self.held)
        assert pool.num_reserved == sum(claim.num_pages for claim in self.claims)
        assert pool.num_created == self.driver.num_pages <= pool.limit_pages
