"""Random interleavings of every operation, shortages and injected failures included.

Hypothesis drives a pool and the caches through their lives; after each step the model of
`allocator_model` compares every byte that a request may read, and recounts every page.
"""

from collections import Counter

import pytest
from allocator_model import (
    KINDS,
    MAX_LEN,
    PAGE,
    FlakyHostDriver,
    FlakyStandInDriver,
    Model,
    SavedTokens,
    make_cache,
    make_paged,
    one_thread,
    shown_words,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vkv.allocator import PagePool
from vkv.allocator.transfer.channels.wire import close_all
from vkv.vmem import segment_of
from vkv.vmem.errors import DriverError, InvalidOperation, OutOfPages, Shortage

__all__ = ["one_thread"]  # a fixture

VARIANTS = st.sampled_from(["", "", "", "adapter"])
OWNERS = st.sampled_from([None, None, "ann", "bob"])
SANITIZE = st.sampled_from(["never", "tenants", "zero"])
MACHINE = settings(
    max_examples=100,
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a plain list of who claims and who holds how much."""

    @initialize(
        low=st.integers(0, 5),
        sanitize=SANITIZE,
    )
    def build(self, low, sanitize):
        self.driver = FlakyHostDriver(PAGE)
        self.pool = PagePool(
            self.driver,
            20 * PAGE + 17,
            low_watermark=low,
            sanitize=sanitize,
        )
        self.claims = []
        self.held = []  # a page once for each reference
        self.owned = {}  # of pages that had an owner since the system gave them, the last

    def teardown(self):
        if hasattr(self, "driver"):
            self.driver.fail_after = None
            self.driver.close()

    @rule(num_pages=st.integers(0, 25), again=st.booleans())
    def reserve(self, num_pages, again):
        available = self.pool.num_available
        claim = self.claims[-1] if again and self.claims else None
        if num_pages > available:
            with pytest.raises(OutOfPages):
                self.pool.reserve(num_pages, into=claim)
            return
        before = claim.num_pages if claim else 0
        result = self.pool.reserve(num_pages, into=claim)
        assert result.num_pages == before + num_pages
        if claim is None:
            self.claims.append(result)

    @rule(data=st.data(), fail=st.booleans())
    def commit(self, data, fail):
        claim = self._draw_claim(data)
        count = data.draw(st.integers(0, claim.num_pages + 1))
        reserved, short = claim.num_pages, count > claim.num_pages
        self.driver.fail_after = 0 if fail else None
        self.driver.fail_short = True
        try:
            pages = self.pool.commit(claim, count)
        except InvalidOperation:
            assert short
            assert claim.num_pages == reserved
        except OutOfPages:
            assert fail
            assert claim.num_pages == reserved
        else:
            assert len(set(pages)) == count
            assert not set(pages) & set(self.held)
            assert not self.pool.needs_zero(set(pages) - self.owned.keys())
            self._check_owners(pages)
            self.held.extend(pages)
            if data.draw(st.booleans()):
                owner = data.draw(OWNERS)
                self.pool.restore(claim, pages, owner)
                assert claim.num_pages == reserved
                for page in pages:  # without an owner they are as they were
                    self.owned[page] = owner or self.owned.get(page)
                self._drop(pages)
        self.driver.fail_after = None

    @rule(data=st.data())
    def cancel(self, data):
        claim = self._draw_claim(data)
        count = data.draw(st.none() | st.integers(-1, claim.num_pages + 1))
        reserved = claim.num_pages
        if count is not None and not 0 <= count <= reserved:
            with pytest.raises(InvalidOperation):
                self.pool.cancel(claim, count)
            return
        self.pool.cancel(claim, count)
        assert claim.num_pages == (0 if count is None else reserved - count)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def retain(self, data):
        pages = data.draw(st.lists(st.sampled_from(self.held), max_size=4))
        self.pool.retain(pages)
        self.held.extend(pages)

    @rule(data=st.data())
    def retain_a_free_page(self, data):
        with pytest.raises(InvalidOperation):
            self.pool.retain([*self.held[:1], max(self.held, default=0) + 1000])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        order = data.draw(st.permutations(range(len(self.held))))
        chosen = order[: data.draw(st.integers(0, len(order)))]
        pages = [self.held[index] for index in chosen]
        owner = data.draw(OWNERS)
        self.pool.release(pages, *filter(None, [owner]))
        self._drop(pages)
        self.owned.update((page, owner) for page in pages if page not in self.held)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release_too_often(self, data):
        page = data.draw(st.sampled_from(self.held))
        with pytest.raises(InvalidOperation):
            self.pool.release([page] * (self.held.count(page) + 1))

    @rule(fail=st.booleans())
    def refill(self, fail):
        free, created = self.pool.num_free, self.pool.num_created
        self.driver.fail_after = 0 if fail else None
        self.driver.fail_short = True
        try:
            added = self.pool.refill()
        except OutOfPages:
            assert fail
            assert (free, created) == (self.pool.num_free, self.pool.num_created)
        else:
            room = self.pool.limit_pages - created
            assert added == max(0, min(self.pool.low_watermark - free, room))
        self.driver.fail_after = None

    @rule(keep=st.integers(0, 4))
    def trim(self, keep):
        free = self.pool.num_free
        assert self.pool.trim(keep) == max(0, free - keep)
        assert self.pool.num_free == min(free, keep)

    @invariant()
    def the_counts_are_those_of_the_list(self):
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        pool.check_invariants()
        assert Counter(self.held) == pool._references
        assert pool.num_held == len(set(self.held))
        assert pool.num_reserved == sum(claim.num_pages for claim in self.claims)
        assert pool.num_available == 20 - pool.num_held - pool.num_reserved
        assert pool.num_created == self.driver.num_pages <= 20
        there = pool._references.keys() | set(pool._free)
        self.owned = {page: owner for page, owner in self.owned.items() if page in there}
        assert all(pool.references(page) == self.held.count(page) for page in self.held)

    def _check_owners(self, pages):
        before = [self.owned[page] for page in pages if page in self.owned]
        clears = {"never": False, "zero": bool(before)}
        for owner in ("ann", "bob"):
            foreign = any(last != owner for last in before)
            expected = clears.get(self.pool.sanitize, foreign)
            assert self.pool.needs_zero(pages, owner) == expected

    def _draw_claim(self, data):
        if not self.claims:
            self.claims.append(self.pool.reserve(0))
        return data.draw(st.sampled_from(self.claims))

    def _drop(self, pages):
        for page in pages:
            self.held.remove(page)
        self.pool.check_invariants()


class CacheMachine(RuleBasedStateMachine):
    """What every cache goes through; `build` says which."""

    model = None
    sanitize = "never"
    can_attach = False

    @initialize(
        sanitize=SANITIZE,
        max_parked=st.sampled_from([0, 3]),
        rows=st.sampled_from([1.0, 2.5, 9.0]),
        data=st.data(),
    )
    def start(self, sanitize, max_parked, rows, data):
        self.sanitize = sanitize
        cache = self.build(data, sanitize=sanitize, max_parked=max_parked, rows=rows)
        self.model = Model(cache)
        self.saved = []

    def build(self, data, **options):
        raise NotImplementedError

    def stop_failing(self):
        pass

    def teardown(self):
        if self.model is None:
            return
        self.stop_failing()
        pool = self.model.cache.pool
        for pin in list(self.model.pins):
            self.model.unpin(pin)
        self.model.cache.shutdown()
        assert (pool.num_held, pool.num_reserved) == (0, 0)

    @rule(variant=VARIANTS, owner=OWNERS)
    def open(self, variant, owner):
        self.model.open(variant, owner)

    @rule(data=st.data(), variant=VARIANTS, owner=OWNERS)
    def adopt(self, data, variant, owner):
        # Few different tokens, so that prefixes meet.
        tokens = data.draw(st.lists(st.integers(0, 1), max_size=12))
        tokens = (tokens * MAX_LEN)[: data.draw(st.integers(0, MAX_LEN))]
        self.model.adopt(tokens, variant, owner)

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), num_tokens=st.integers(0, MAX_LEN))
    def reserve(self, data, num_tokens):
        self.model.reserve(self._draw(data), num_tokens)

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data, token):
        request = self._draw(data)
        count = data.draw(st.integers(0, MAX_LEN - len(request.tokens)))
        self.model.grow(request, [token] * count)

    @precondition(lambda self: self.model.live)
    @rule(data=st.data())
    def grow_within_the_promise(self, data):
        request = self._draw(data)
        room = request.slot.promised_tokens - len(request.tokens)
        self.model.grow(request, [0] * data.draw(st.integers(0, max(0, room))))

    @precondition(lambda self: self.model.live)
    @rule(data=st.data())
    def truncate(self, data):
        request = self._draw(data)
        least = request.slot.pinned_tokens
        if least:
            with pytest.raises(InvalidOperation):
                self.model.cache.truncate(request.slot, least - 1)
        self.model.truncate(request, data.draw(st.integers(least, len(request.tokens))))

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), owner=OWNERS)
    def fork(self, data, owner):
        request = self._draw(data)
        self.model.fork(request, data.draw(st.integers(0, len(request.tokens))), owner)

    @precondition(lambda self: self.can_attach and self.model.live)
    @rule(data=st.data())
    def save(self, data):
        self.saved = [*self.saved[-2:], SavedTokens(self.model.cache, self._draw(data))]

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def attach(self, data):
        saved = data.draw(st.sampled_from(self.saved))
        self.model.attach(saved, data.draw(st.integers(0, len(saved.tokens))))

    @precondition(lambda self: self.model.live)
    @rule(data=st.data())
    def park(self, data):
        request = self._draw(data)
        self.model.park(request, data.draw(st.integers(0, len(request.tokens))))

    @precondition(lambda self: self.model.live)
    @rule(data=st.data())
    def close(self, data):
        self.model.close(self._draw(data))

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), num_tokens=st.integers(0, MAX_LEN + 9))
    def look_ahead(self, data, num_tokens):
        self.model.look_ahead(self._draw(data), num_tokens)

    @precondition(lambda self: self.model.live and len(self.model.pins) < 3)
    @rule(data=st.data())
    def pin(self, data):
        request = self._draw(data)
        if request.slot.loan is not None:
            with pytest.raises(InvalidOperation):
                self.model.cache.pin(request.slot, 0)
            return
        self.model.pin(request, data.draw(st.integers(0, len(request.tokens))))

    @precondition(lambda self: self.model.pins)
    @rule(data=st.data())
    def unpin(self, data):
        pin = data.draw(st.sampled_from(self.model.pins))
        if pin.slot.loan is None:  # or its pin is the loan's
            self.model.unpin(pin)

    @rule(data=st.data(), variant=VARIANTS)
    def find(self, data, variant):
        tokens = data.draw(st.lists(st.integers(0, 1), max_size=12))
        self.model.find((tokens * MAX_LEN)[: data.draw(st.integers(0, MAX_LEN))], variant)

    @rule()
    def trim(self):
        self.model.trim()

    @invariant()
    def everybody_reads_what_they_wrote(self):
        if self.model is None:
            return
        self.model.check()
        if self.sanitize != "never":
            self.model.check_isolation()

    def _draw(self, data):
        return data.draw(st.sampled_from(self.model.live))


class KVCacheMachine(CacheMachine):
    """The contiguous cache, with failing calls and few mappings."""

    Driver = FlakyHostDriver
    kinds = tuple(KINDS)
    can_attach = True
    movable = False

    def build(self, data, **options):
        self.driver = self.Driver()
        if data.draw(st.booleans()):
            self.driver._max_mappings = 40
        kind = data.draw(st.sampled_from(self.kinds))
        return make_cache(kind, self.driver, movable=self.movable, **options)

    def stop_failing(self):
        self.driver.fail_after = None

    def teardown(self):
        super().teardown()
        if self.model is not None:
            assert (self.driver.num_pages, self.driver.reserved_bytes) == (0, 0)
            self.driver.close()

    @rule(calls=st.integers(0, 12), short=st.booleans())
    def let_a_call_fail(self, calls, short):
        self.driver.fail_after, self.driver.fail_short = calls, short


class MovableMachine(KVCacheMachine):
    """The contiguous cache whose slots have segments of their own."""

    movable = True

    @invariant()
    def a_segment_that_grows_is_one_slots(self):
        if self.model is None:
            return
        for slot in [*(r.slot for r in self.model.live), *self.model.cache._table.parked]:
            own = {page for pages in slot.pages for page in pages}
            for page in self.driver._map_counts:
                if slot.segment is not None and segment_of(page) == slot.segment:
                    assert page in own or page in self.model.cache.pool._free
                    assert self.model.cache.pool.references(page) <= 1


class LoanMachine(MovableMachine):
    """Two movable caches, between which pages change hands, or nearly do."""

    zoo = tuple(KINDS)
    shows_memory = True

    def build(self, data, **options):
        self.kinds = (data.draw(st.sampled_from(self.zoo)),)
        far = super().build(data, **options)
        self.far, self.far_driver = Model(far), self.driver
        self.loan = None
        return super().build(data, **options)

    def teardown(self):
        if self.model is not None:
            self.driver.fail_after = self.far_driver.fail_after = None
            self._give_up()
            self.exchange_the_caches()
            super().teardown()
            self.exchange_the_caches()
        super().teardown()

    @rule()
    def exchange_the_caches(self):
        """What one does to the one, one does to the other."""
        self.far._identities = self.model._identities
        self.model, self.far = self.far, self.model
        self.driver, self.far_driver = self.far_driver, self.driver

    @precondition(lambda self: self.model.live and self.loan is None)
    @rule(data=st.data(), whole=st.booleans())
    def lend(self, data, whole):
        request = self._draw(data)
        if request.slot.num_pins:
            return
        count = len(request.tokens)
        pin = self.model.pin(request, count if whole else data.draw(st.integers(0, count)))
        try:
            lent = self.model.cache.loans.lend(request.slot, len(pin.prefixes))
        except (DriverError, Shortage):
            assert self.driver.fail_after is None
            assert request.slot.loan is None
            self.model.unpin(pin)
            return
        for fd in lent.descriptors if self.shows_memory else ():
            with shown_words(fd) as words:
                assert words <= request.written, "others' bytes can be seen"
        tokens = request.tokens[: len(pin.prefixes)]
        self.loan = (self.model, request, pin, lent, tokens, set(request.written))

    @precondition(lambda self: self.loan is not None)
    @rule()
    def give_up(self):
        self._give_up()

    def _give_up(self):
        if self.loan is None:
            return
        near, _, pin, lent, *_ = self.loan
        self.loan = None
        close_all(lent.descriptors)
        near.cache.loans.take_back(pin.slot)
        near.unpin(pin)

    @precondition(lambda self: self.loan is not None and self.loan[0] is self.model)
    @rule(keep=st.booleans(), more=st.integers(0, 40), fails=st.none() | st.integers(0, 6))
    def deliver(self, keep, more, fails):
        near, _, _, lent, tokens, _ = self.loan
        far = self.far
        far._identities = near._identities
        self.far_driver.fail_after = fails
        try:
            with far._refusable(lambda: far.live):
                slot = far.cache.open()
                try:
                    far.cache.reserve(slot, min(MAX_LEN, len(tokens) + more))
                    targets = far.cache.loans.borrow(slot, lent.parcel, lent.descriptors)
                except BaseException:
                    self.far_driver.fail_after = None
                    far.cache.close(slot)
                    raise
                self.far_driver.fail_after = None
                for source, target in zip(lent.copied, targets, strict=True):
                    target.copy_(source)
                if keep:
                    self._end_well(far, slot)
                else:
                    far.cache.close(slot)
        finally:
            self.far_driver.fail_after = None
        far.check()

    def _end_well(self, far, slot):
        near, request, pin, lent, tokens, written = self.loan
        written |= request.written  # it may have gone on within the pages that move
        self.loan = None
        close_all(lent.descriptors)
        far.cache.loans.keep(slot)
        near.pins.remove(pin)
        with near._refusable(lambda: [r for r in near.live if r is not request]):
            near.cache.loans.leave(pin.slot)
        if request in near.live:
            near._forget(request, 0)
            assert request.slot.num_tokens == 0
            near.close(request)
        moved = far._admit(slot, tokens, request.variant)
        moved.written |= written
        far._left[slot.owner] |= written  # its own, behind the tokens that moved


class StandInMachine(KVCacheMachine):
    """The contiguous cache over the CUDA driver, and that over the stand-in for its library."""

    Driver = FlakyStandInDriver
    can_attach = False
    kinds = tuple(kind for kind in KINDS if kind.name != "wide")  # larger pages, larger tokens


class StandInLoanMachine(LoanMachine):
    """Pages of the stand-in's, each of which goes by itself."""

    Driver = FlakyStandInDriver
    can_attach = False
    zoo = StandInMachine.kinds
    shows_memory = False  # a descriptor names a page and is none


class PagedKVCacheMachine(CacheMachine):
    """The paged cache, where nothing is mapped and the blocks are scattered."""

    def build(self, data, **options):
        return make_paged(block_tokens=data.draw(st.sampled_from([1, 7, 16])), **options)


def test_page_pool():
    run_state_machine_as_test(PoolMachine, settings=MACHINE)


def test_kv_cache():
    run_state_machine_as_test(KVCacheMachine, settings=MACHINE)


def test_movable_kv_cache():
    run_state_machine_as_test(MovableMachine, settings=MACHINE)


def test_pages_that_change_hands():
    run_state_machine_as_test(LoanMachine, settings=MACHINE)


def test_kv_cache_on_the_standin(cuda_standin):
    run_state_machine_as_test(StandInMachine, settings=settings(MACHINE, max_examples=50))


def test_pages_that_change_hands_on_the_standin(cuda_standin):
    run_state_machine_as_test(StandInLoanMachine, settings=settings(MACHINE, max_examples=50))


def test_paged_kv_cache():
    run_state_machine_as_test(PagedKVCacheMachine, settings=MACHINE)
