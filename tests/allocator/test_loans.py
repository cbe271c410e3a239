"""Pages that change hands between two caches: the same memory, nobody else's, and nothing lost."""

import os
from contextlib import suppress
from random import Random

import msgspec
import pytest
from allocator_model import (
    KIND,
    KINDS,
    MAX_LEN,
    PAGE,
    FlakyHostDriver,
    Kind,
    Model,
    Request,
    SavedTokens,
    make_cache,
    one_thread,
    shown_words,
)
from vkv.allocator import KVCache, MemoryLimit, PagePool, SlotState
from vkv.allocator.movable_slots import Lent
from vkv.vmem import segment_of
from vkv.vmem.errors import (
    DriverError,
    InvalidConfig,
    InvalidOperation,
    OutOfPages,
    OutOfSlots,
    Shortage,
    TransferError,
)

__all__ = ["one_thread"]  # a fixture


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def movable(kind: Kind | str = "ragged", **options) -> Model:
    kind = KIND[kind] if isinstance(kind, str) else kind
    return Model(make_cache(kind, movable=True, **options))


@pytest.fixture
def near():
    model = movable()
    yield model
    end(model)


@pytest.fixture
def far(near):
    model = movable()
    model._identities = near._identities
    yield model
    end(model)


def end(model: Model) -> None:
    """Nothing is left of a cache, nor of its driver."""
    driver = model.cache.pool.driver
    driver.fail_after = None
    model.cache.shutdown()
    assert (driver.num_pages, driver.reserved_bytes) == (0, 0)
    assert (model.cache.pool.num_held, model.cache.pool.num_reserved) == (0, 0)
    driver.close()


@pytest.fixture(autouse=True)
def no_descriptor_leaks():
    before = descriptors()
    yield
    assert descriptors() == before


def with_request(model: Model, count: int, first: int = 0) -> Request:
    request = model.open()
    assert request is not None
    assert model.grow(request, [first, *range(1, count)][:count])
    return request


def lend(model: Model, request: Request, num_tokens: int | None = None) -> Lent:
    num_tokens = len(request.tokens) if num_tokens is None else num_tokens
    model.cache.pin(request.slot, num_tokens)
    return model.cache.loans.lend(request.slot, num_tokens)


def borrow(model: Model, lent: Lent, reserved: int = 0) -> tuple:
    """A slot with the pages, the bytes beside them copied."""
    slot = model.cache.open()
    try:
        model.cache.reserve(slot, max(reserved, lent.parcel.num_tokens))
        targets = model.cache.loans.borrow(slot, lent.parcel, lent.descriptors)
    except BaseException:
        model.cache.close(slot)
        raise
    for source, target in zip(lent.copied, targets, strict=True):
        target.copy_(source)
    return slot, sum(map(len, targets))


def close_all(lent: Lent) -> None:
    for fd in lent.descriptors:
        os.close(fd)


def move(near: Model, far: Model, request: Request, reserved: int = 0) -> tuple[Request, int]:
    """Have all of a request change hands; returns it, and the bytes that were copied."""
    lent = lend(near, request)
    slot, num_copied = borrow(far, lent, reserved)
    close_all(lent)
    far.cache.loans.keep(slot)
    near.cache.loans.leave(request.slot)
    assert request.slot.num_tokens == request.slot.num_pages == 0
    near.live.remove(request)
    near.cache.close(request.slot)
    moved = far._admit(slot, request.tokens, request.variant)
    moved.written |= request.written
    near.check()
    far.check()
    return moved, num_copied


# -- the same pages ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_pages_move_and_no_byte_is_copied(kind: Kind) -> None:
    near, far = movable(kind), movable(kind)
    far._identities = near._identities
    request = with_request(near, 70)
    pages = request.slot.num_pages
    moved, num_copied = move(near, far, request)
    assert num_copied == 0
    assert moved.slot.num_pages == pages == far.cache.pool.num_held
    assert near.cache.pool.num_created == 0
    assert far.cache.pool.driver.num_mappings <= far.cache.layout.num_ranges * 2 + 1
    far.grow(moved, [5] * 60)  # and on it goes, in the same segment
    assert len({segment_of(p) for pages in moved.slot.pages for p in pages}) == 1
    far.check()
    end(near)  # whatever becomes of the lender
    far.check()
    back = movable(kind)
    back._identities = far._identities
    again, num_copied = move(far, back, moved)
    assert num_copied == 0
    end(far)
    back.grow(again, [6] * 20)
    back.check()
    end(back)


def test_a_loan_that_is_taken_back_leaves_both_as_before(near, far):
    request = with_request(near, 70)
    segment, held = request.slot.segment, near.cache.pool.num_held
    lent = lend(near, request)
    assert near.grow(request, [3] * 40)  # its owner may go on meanwhile, elsewhere
    slot, _ = borrow(far, lent)
    close_all(lent)
    far.cache.close(slot)
    far.check()
    assert far.cache.pool.num_held == 0
    near.cache.loans.take_back(request.slot)
    near.cache.unpin(request.slot)
    near.check()
    assert request.slot.segment == segment
    assert near.grow(request, [4] * 30)
    near.check()
    assert near.cache.pool.num_held > held
    with pytest.raises(InvalidOperation, match="no pages"):
        near.cache.loans.take_back(request.slot)


def test_what_was_promised_moves_as_a_promise(near, far):
    request = with_request(near, 40)
    assert near.reserve(request, MAX_LEN)
    near.look_ahead(request, 120)
    assert request.slot.ready_tokens >= 120
    moved, _ = move(near, far, request, reserved=MAX_LEN)
    assert moved.slot.promised_tokens == MAX_LEN
    assert far.grow(moved, [2] * (MAX_LEN - 40))
    far.check()


def test_some_of_the_tokens_may_move_and_the_rest_stays_unseen(near, far):
    request = with_request(near, MAX_LEN)
    lent = lend(near, request, 50)
    assert lent.parcel.growing is None  # pages of later tokens lie there
    slot, num_copied = borrow(far, lent)
    assert num_copied == 0
    close_all(lent)
    far.cache.loans.keep(slot)
    near.cache.loans.leave(request.slot)
    near.live.remove(request)
    near.cache.close(request.slot)
    moved = far._admit(slot, request.tokens[:50])
    far.check()
    assert far.grow(moved, [1] * 60)
    far.check()


def test_a_parked_slot_moves_and_is_found_no_more(near, far):
    request = with_request(near, 70)
    near.park(request, 70)
    slot = request.slot
    near.cache.pin(slot, 70)
    lent = near.cache.loans.lend(slot, 70)
    assert near.cache.find(request.tokens) is None
    assert near.cache.prefix_length(request.tokens) == 0
    other = near.adopt(request.tokens)
    assert other is not None
    assert not other.tokens
    near.close(other)
    arrived, _ = borrow(far, lent)
    close_all(lent)
    far.cache.loans.keep(arrived)
    near.cache.loans.leave(slot)
    assert slot.state is SlotState.CLOSED
    near.check()
    far._admit(arrived, request.tokens)
    far.check()


def test_an_owner_may_close_what_is_lent(near, far):
    request = with_request(near, 70)
    lent = lend(near, request)
    near.close(request)
    arrived, _ = borrow(far, lent)
    close_all(lent)
    far.cache.loans.keep(arrived)
    near.cache.loans.leave(request.slot)
    assert near.cache.stats().slots_parked == near.cache.pool.num_held == 0
    near.check()
    far._admit(arrived, request.tokens)
    far.check()


# -- what others have ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_shared_pages_are_copied_and_stay_with_those_who_share_them(kind: Kind) -> None:
    near, far = movable(kind, rows=9), movable(kind, rows=9)
    far._identities = near._identities
    parent = with_request(near, 90)
    child = near.fork(parent, 60)
    assert child is not None
    near.grow(parent, [7] * 50)
    near.grow(child, [8] * 50)
    whole = near.cache.layout.whole_pages_per_range(60)
    moved, num_copied = move(near, far, child)
    assert num_copied == sum(whole) * PAGE  # what the child does not share is its own
    assert far.grow(moved, [9] * 40)
    far.check()
    _, num_copied = move(near, far, parent)  # nobody shares with it any more
    assert num_copied == 0
    far.check()
    end(near)
    far.check()
    end(far)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_parent_moves_whole_and_its_children_get_copies_of_what_they_share(kind: Kind) -> None:
    """That is less than what the parent would have to leave behind."""
    near, far = movable(kind, rows=9), movable(kind, rows=9)
    far._identities = near._identities
    parent = with_request(near, 140)
    children = [near.fork(parent, 40), near.fork(parent, 60)]
    near.grow(children[0], [8] * 60)
    near.grow(parent, [7] * 10)
    lent = lend(near, parent)
    shared = sum(near.cache.layout.whole_pages_per_range(60))
    assert lent.num_parted_bytes == shared * PAGE
    assert not lent.copied
    near.check()
    if near.cache.layout.whole_pages_per_range(40)[0]:  # which both children had
        assert near.cache.pool.references(children[0].slot.pages[0][0]) == 2
    slot, num_copied = borrow(far, lent)
    close_all(lent)
    assert num_copied == 0
    far.cache.loans.keep(slot)
    near.cache.loans.leave(parent.slot)
    near.live.remove(parent)
    near.cache.close(parent.slot)
    near.check()
    far._admit(slot, parent.tokens)
    far.check()
    for child in children:
        near.close(child)
    end(near)
    far.check()
    end(far)


def test_a_parent_keeps_what_it_wrote_after_a_fork_to_itself(near, far):
    """Its first segment is the child's as well; what follows lies in another, and moves."""
    parent = with_request(near, 90)
    child = near.fork(parent, 90)
    near.grow(parent, [7] * 60)
    near.cache.pool.limit_pages, limit = 0, near.cache.pool.limit_pages  # no copies for the child
    lent = lend(near, parent)
    near.cache.pool.limit_pages = limit
    assert lent.num_parted_bytes == 0
    whole = near.cache.layout.whole_pages_per_range(90)
    assert sum(map(len, lent.copied)) > 0
    assert lent.parcel.num_lent_pages
    assert sum(whole)
    slot, _ = borrow(far, lent)
    close_all(lent)
    far.cache.loans.keep(slot)
    near.cache.loans.leave(parent.slot)
    near.live.remove(parent)
    near.cache.close(parent.slot)
    near.check_content([child])
    far._admit(slot, parent.tokens)
    far.check()


def test_tokens_of_a_file_are_copied(near, far):
    saved = SavedTokens(near.cache, with_request(near, 90))
    request = near.attach(saved, 80)
    assert request is not None
    moved, num_copied = move(near, far, request)
    assert num_copied
    far.check_content([moved])
    del saved


# -- nobody sees others' bytes -------------------------------------------------------------------


def test_a_descriptor_shows_what_its_request_has_and_no_more(near):
    """However often the slot changed its owner, and whatever it shares."""
    first = with_request(near, MAX_LEN, first=3)
    near.park(first, MAX_LEN)
    second = near.adopt([3, *range(1, 80), 7])  # takes it over: most is common
    assert second is not None
    assert len(second.tokens) == 80
    near.look_ahead(second, 120)
    sharer = near.fork(second, 30)
    assert near.grow(second, [7, 7, 7])
    assert near.grow(sharer, [6] * 60)
    near.truncate(second, 75)
    assert near.grow(second, [5] * 60)
    lent = lend(near, second)
    assert lent.descriptors
    for fd in lent.descriptors:
        with shown_words(fd) as words:
            assert words <= second.written | set(second.prefixes)
            assert not words & (set(first.prefixes[80:]) | set(sharer.prefixes[30:]))
    close_all(lent)
    near.cache.loans.take_back(second.slot)
    near.cache.unpin(second.slot)
    near.check()


def test_a_segment_never_had_what_other_slots_gave_back(near):
    near.close(with_request(near, MAX_LEN, first=4))
    request = with_request(near, 100)
    lent = lend(near, request)
    (fd,) = lent.descriptors
    with shown_words(fd) as words:
        assert words == set(request.prefixes)
    assert os.fstat(fd).st_blocks * 512 == request.slot.num_pages * PAGE
    close_all(lent)
    near.cache.loans.take_back(request.slot)
    near.cache.unpin(request.slot)


# -- memory --------------------------------------------------------------------------------------


def test_a_parked_slot_that_left_is_not_found_where_others_could_not_be_closed(
    near, far, monkeypatch
):
    """Whoever found it would write into pages that the borrower goes on with."""
    request = with_request(near, 70)
    near.park(request, 70)
    lent = lend(near, request)
    slot, _ = borrow(far, lent)
    close_all(lent)
    far.cache.loans.keep(slot)

    def refuse(count):
        raise DriverError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(near.cache._table, "_make_places", refuse)
        with pytest.raises(DriverError):
            near.cache.loans.leave(request.slot)
    assert near.cache.prefix_length(request.tokens) == 0
    assert near.cache.pool.num_held == 0
    near.check()
    far._admit(slot, request.tokens)
    far.check()


def test_memory_is_counted_where_it_is_owned():
    near, far = movable("even", rows=9), movable("even")
    far._identities = near._identities
    request = with_request(near, 100)
    held = near.cache.stats().physical_bytes
    moved, _ = move(near, far, request)
    assert near.cache.stats().physical_bytes == 0
    assert far.cache.stats().physical_bytes == held
    far.close(moved)
    far.check()
    assert far.cache.stats().physical_bytes == 0  # at once: it serves nobody else
    end(near)
    end(far)


def test_who_has_no_memory_for_them_gets_no_pages(near):
    far = movable(rows=1)
    request = with_request(near, 100)
    occupant = with_request(far, 100)
    lent = lend(near, request)
    with pytest.raises(OutOfPages):
        borrow(far, lent)
    far.check()
    far.close(occupant)
    slot, _ = borrow(far, lent)
    far.cache.close(slot)
    close_all(lent)
    near.cache.loans.take_back(request.slot)
    near.cache.unpin(request.slot)
    near.check()
    end(far)


def test_free_pages_give_way_to_others(near):
    """What an undone growth leaves in one slot's segment serves another as memory."""
    request = with_request(near, 20)
    driver, pool = near.cache.pool.driver, near.cache.pool
    driver.fail_after = 1  # the pages are there, and cannot be mapped
    assert not near.grow(request, [1] * 100)
    near.check()
    assert pool.num_free
    others = [with_request(near, MAX_LEN), with_request(near, 90)]
    near.check()
    assert pool.num_created <= pool.limit_pages
    for other in others:
        near.close(other)


@pytest.mark.parametrize(("here", "there"), [(64, 1), (1, 64), (64, 16)])
def test_caches_may_read_further_than_each_other(here: int, there: int) -> None:
    """Pages behind the tokens that the one needs and the other does not are spare."""
    kinds = [Kind("tiles", KIND["tiles"].layers, {"over_read_tokens": n}) for n in (here, there)]
    near, far = movable(kinds[0], rows=9), movable(kinds[1], rows=9)
    far._identities = near._identities
    for count in (1, 65, 100):
        request = with_request(near, count)
        lent = lend(near, request)
        slot, num_copied = borrow(far, lent, reserved=count + 10)
        close_all(lent)
        assert num_copied == 0
        far.cache.check_invariants()
        far.cache._supply.reclaim_all()  # what is spare goes, to nobody's harm
        far.cache.loans.keep(slot)
        near.cache.loans.leave(request.slot)
        near.live.remove(request)
        near.cache.close(request.slot)
        near.check()
        moved = far._admit(slot, request.tokens)
        far.check()
        assert far.grow(moved, [3] * 20)
        far.check()
        far.close(moved)
    end(near)
    end(far)


@pytest.mark.parametrize("seed", range(4))
def test_movable_caches_keep_a_limit_together(seed: int) -> None:
    """Whatever is asked of them, and whatever moves between them."""
    random = Random(seed)
    limit = MemoryLimit(40 * PAGE)
    models: list[Model] = []
    for kind in ("even", "even", "ragged"):
        driver = FlakyHostDriver()
        cache = KVCache(
            KIND[kind].layout(PAGE),
            PagePool(driver, limit, sanitize=random.choice(["never", "tenants", "zero"])),
            num_slots=5,
            movable=True,
        )
        models.append(Model(cache))
    models[1]._identities = models[0]._identities
    for _ in range(150):
        model = random.choice(models)
        request = random.choice(model.live) if model.live else None
        match random.choice(["adopt", "grow", "grow", "fork", "park", "close", "trim", "move"]):
            case "adopt":
                model.adopt([random.randint(0, 1)] * random.randint(0, MAX_LEN))
            case "grow" if request:
                room = MAX_LEN - len(request.tokens)
                model.grow(request, [random.randint(0, 1)] * random.randint(0, room))
            case "fork" if request:
                model.fork(request, random.randint(0, len(request.tokens)))
            case "park" if request:
                model.park(request, len(request.tokens))
            case "close" if request:
                model.close(request)
            case "trim":
                model.trim()
            case "move" if request and model is not models[2]:
                other = models[1] if model is models[0] else models[0]
                lent = lend(model, request)
                try:
                    slot, _ = borrow(other, lent)
                except Shortage:
                    model.cache.loans.take_back(request.slot)
                    model.cache.unpin(request.slot)
                else:
                    other.cache.loans.keep(slot)
                    model.cache.loans.leave(request.slot)
                    model.live.remove(request)
                    model.cache.close(request.slot)
                    other._admit(slot, request.tokens, request.variant)
                finally:
                    close_all(lent)
        for each in models:
            each.cache.check_invariants()
            each.check_content(each.live)
        created = sum(each.cache.pool.num_created for each in models)
        assert created <= 40
    for model in models:
        end(model)


# -- what is refused -----------------------------------------------------------------------------


def test_only_who_waits_for_pages_of_this_kind_gets_them(near):
    request = with_request(near, 70)
    lent = lend(near, request)
    for other in (movable("even"), Model(make_cache(KIND["ragged"], FlakyHostDriver(2 * PAGE)))):
        with pytest.raises(InvalidOperation, match="copy"):
            borrow(other, lent)
        end(other)
    close_all(lent)
    near.cache.loans.take_back(request.slot)
    near.cache.unpin(request.slot)


@pytest.mark.parametrize(
    "change",
    [
        {"stretches": ()},
        {"num_tokens": 71 * 5},
        {"num_tokens": -1},
        {"growing": 1},
        {"num_descriptors": 2},
        {"page_bytes": 8192},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_a_parcel_that_contradicts_itself_is_refused(near, far, change):
    request = with_request(near, 70)
    lent = lend(near, request)
    far.cache.reserve(slot := far.cache.open(), MAX_LEN)
    wrong = msgspec.structs.replace(lent.parcel, **change)
    with pytest.raises((InvalidOperation, TransferError)):
        far.cache.loans.borrow(slot, wrong, lent.descriptors)
    wrong = msgspec.structs.replace(lent.parcel, stretches=lent.parcel.stretches * 2)
    with pytest.raises((InvalidOperation, TransferError)):
        far.cache.loans.borrow(slot, wrong, lent.descriptors)
    for moved in lent.parcel.stretches:
        stretches = tuple(
            msgspec.structs.replace(s, place=s.place + 1) if s is moved else s
            for s in lent.parcel.stretches
        )
        wrong = msgspec.structs.replace(lent.parcel, stretches=stretches)
        with pytest.raises(TransferError, match="not at its place"):
            far.cache.loans.borrow(slot, wrong, lent.descriptors)
    assert slot.num_pages == 0
    far.cache.close(slot)
    close_all(lent)
    near.cache.loans.take_back(request.slot)
    near.cache.unpin(request.slot)


def test_a_slot_is_lent_to_one_and_read_by_nobody_else(near):
    request = with_request(near, 70)
    with pytest.raises(InvalidOperation, match="must be pinned"):
        near.cache.loans.lend(request.slot, 70)
    near.cache.pin(request.slot, 70)
    near.cache.pin(request.slot, 70)
    with pytest.raises(InvalidOperation, match="2 times"):
        near.cache.loans.lend(request.slot, 70)
    near.cache.unpin(request.slot)
    lent = near.cache.loans.lend(request.slot, 70)
    close_all(lent)
    with pytest.raises(InvalidOperation, match="not be lent"):
        near.cache.loans.lend(request.slot, 70)
    with pytest.raises(InvalidOperation, match="cannot pin"):
        near.cache.pin(request.slot, 10)
    with pytest.raises(OutOfSlots, match="changing hands"):
        near.cache.fork(request.slot, 10)
    near.cache.loans.take_back(request.slot)
    near.cache.unpin(request.slot)


def test_a_cache_that_is_not_movable_says_how_it_would_be():
    model = Model(make_cache(KIND["even"]))
    request = with_request(model, 20)
    assert not model.cache.loans.are_possible
    model.cache.pin(request.slot, 20)
    with pytest.raises(InvalidOperation, match="movable=True"):
        model.cache.loans.lend(request.slot, 20)
    model.cache.unpin(request.slot)
    end(model)


def test_more_slots_than_files_are_refused(monkeypatch):
    monkeypatch.setattr("vkv.vmem.linux.max_open_files", lambda: 66)
    with FlakyHostDriver() as driver, pytest.raises(InvalidConfig, match="ulimit"):
        make_cache(KIND["even"], driver, movable=True)


def test_ranges_of_too_many_pages_are_refused():
    kind = KIND["wide"]
    with FlakyHostDriver() as driver, pytest.raises(InvalidConfig, match="larger pages"):
        make_cache(kind, driver, movable=True, max_len=1 << 22)


# -- every call failed in turn -------------------------------------------------------------------


def state(model: Model) -> tuple:
    cache, driver = model.cache, model.cache.pool.driver
    return (
        dict(cache.pool._references),
        cache.pool.num_reserved,
        dict(driver._page_table),
        sorted(cache._table.free),
        descriptors(),
    )


@pytest.mark.parametrize("short", [False, True])
def test_borrowing_is_all_or_nothing(short):
    for call in range(100):
        near, far = movable("split", rows=12, num_slots=8), movable("split", rows=12)
        far._identities = near._identities
        parent = with_request(near, 60)
        child = near.fork(parent, 40)
        near.grow(child, [5] * 50)
        lent = lend(near, child)
        driver = far.cache.pool.driver
        slot = far.cache.open()
        far.cache.reserve(slot, 120)
        before = state(far)
        driver.fail_after, driver.fail_short = call, short
        try:
            targets = far.cache.loans.borrow(slot, lent.parcel, lent.descriptors)
        except (DriverError, Shortage, InvalidOperation):
            far.cache.pool.trim()  # of pages that were made for nothing
            assert state(far) == before
            far.cache.check_invariants()
            targets = far.cache.loans.borrow(slot, lent.parcel, lent.descriptors)
        is_over = driver.fail_after is not None
        driver.fail_after = None
        for source, target in zip(lent.copied, targets, strict=True):
            target.copy_(source)
        close_all(lent)
        far.cache.loans.keep(slot)
        near.cache.loans.leave(child.slot)
        near.live.remove(child)
        near.cache.close(child.slot)
        far._admit(slot, child.tokens)
        far.check()
        near.check()
        end(near)
        end(far)
        if is_over:
            break
    assert call > 3


@pytest.mark.parametrize("short", [False, True])
def test_lending_and_leaving_may_fail_and_be_repeated(short):
    for call in range(100):
        near, far = movable("split", rows=12, num_slots=8), movable("split", rows=12)
        far._identities = near._identities
        request = with_request(near, 60)
        near.reserve(request, 140)
        near.look_ahead(request, 120)
        driver = near.cache.pool.driver
        near.cache.pin(request.slot, 60)
        driver.fail_after, driver.fail_short = call, short
        try:
            lent = near.cache.loans.lend(request.slot, 60)
        except (DriverError, Shortage):
            assert request.slot.loan is None
            near.check()
            lent = near.cache.loans.lend(request.slot, 60)
        slot, _ = borrow(far, lent)
        close_all(lent)
        far.cache.loans.keep(slot)
        with suppress(DriverError, Shortage):
            near.cache.loans.leave(request.slot)
        is_over = driver.fail_after is not None
        driver.fail_after = None
        assert request.slot.num_tokens == 0
        near.live.remove(request)
        near.cache.close(request.slot)
        far._admit(slot, request.tokens)
        far.check()
        near.check()
        end(near)
        far.check()
        end(far)
        if is_over:
            break
    assert call > 3
