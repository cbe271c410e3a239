"""Two hundred thousand random operations, every one followed by a recount of everything.

Hypothesis finds small counterexamples; this goes far from the start, at full speed. A failure
prints the seed and the number of the operation, which reproduce it.
"""

import random

import pytest
from allocator_model import KIND, MAX_LEN, PAGE, FlakyHostDriver, Model, make_cache, make_paged

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
    "trim": 1,
}


class Fuzz:
    """Does one random operation after another on a model."""

    def __init__(self, model: Model, seed: int, *, failures: float = 0.0) -> None:
        self.model = model
        self.random = random.Random(seed)
        self.failures = failures
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
        self.model.adopt(self.random.choice(self.stems)[: self.random.randint(0, MAX_LEN)])

    def park(self) -> None:
        if request := self._request():
            self.model.park(request, self._up_to(len(request.tokens)))

    def truncate(self) -> None:
        if request := self._request():
            self.model.truncate(request, self._up_to(len(request.tokens)))

    def fork(self) -> None:
        if request := self._request():
            self.model.fork(request, self._up_to(len(request.tokens)))

    def reserve(self) -> None:
        if request := self._request():
            self.model.reserve(request, self.random.randint(0, MAX_LEN))

    def close(self) -> None:
        if request := self._request():
            self.model.close(request)

    def open(self) -> None:
        self.model.open()

    def look_ahead(self) -> None:
        if request := self._request():
            self.model.look_ahead(request, len(request.tokens) + self.random.randint(0, 30))

    def trim(self) -> None:
        self.model.trim()

    def _request(self):
        return self.random.choice(self.model.live) if self.model.live else None

    def _up_to(self, count: int) -> int:
        """Mostly all of `count`, sometimes any part of it."""
        return count if self.random.random() < 0.5 else self.random.randint(0, count)


def run(model: Model, seed: int, num_operations: int, *, failures: float = 0.0) -> None:
    fuzz = Fuzz(model, seed, failures=failures)
    isolated = model.cache.pool.sanitize == "zero"
    for number in range(num_operations):
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


@pytest.mark.parametrize("name", KIND)
def test_contiguous(name):
    with FlakyHostDriver(PAGE) as driver:
        run(Model(make_cache(KIND[name], driver)), 1, 8000)
        assert (driver.num_pages, driver.reserved_bytes) == (0, 0)


@pytest.mark.parametrize("name", ["ragged", "tiles"])
def test_contiguous_with_failing_calls(name):
    with FlakyHostDriver(PAGE) as driver:
        cache = make_cache(KIND[name], driver, low_watermark=3, high_watermark=9)
        run(Model(cache), 2, 8000, failures=0.2)
        assert (driver.num_pages, driver.reserved_bytes) == (0, 0)


@pytest.mark.parametrize("name", ["split", "wide"])
def test_contiguous_and_isolated(name):
    with FlakyHostDriver(PAGE) as driver:
        run(Model(make_cache(KIND[name], driver, sanitize="zero")), 3, 4000, failures=0.02)


def test_contiguous_with_few_mappings():
    with FlakyHostDriver(PAGE, max_mappings=20) as driver:
        run(Model(make_cache(KIND["windows"], driver)), 4, 8000)


@pytest.mark.parametrize("sanitize", ["never", "zero"])
def test_paged(sanitize):
    run(Model(make_paged(sanitize=sanitize)), 5, 20_000)
