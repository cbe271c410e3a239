"""The beginning of a sequence moves to another cache, part by part, and stays itself."""

from collections.abc import Iterator

import pytest
import torch
from allocator_model import (
    KIND,
    NUM_SLOTS,
    FlakyHostDriver,
    make_cache,
    one_thread,
    visible_words,
)
from vkv.allocator import Exits, KVCache, Slot
from vkv.allocator.transfer import SegmentTier, put_before, split_off
from vkv.allocator.transfer.transfers import Spans
from vkv.vmem.errors import DriverError, InvalidOperation, OutOfPages, Shortage

__all__ = ["one_thread"]  # a fixture

_PART = 16


class Grown:
    """A sequence that grows in the near cache; its token `t` is filled with `t + seed`."""

    def __init__(self, tier: SegmentTier, seed: int = 0) -> None:
        self.tier = tier
        self.seed = seed
        self.num_tokens = 0
        self.segment = tier.begin(())
        self.slot = tier.near.open()

    @property
    def num_local(self) -> int:
        return self.num_tokens - self.segment.num_tokens

    def grow(self, count: int) -> None:
        first = self.num_local
        self.tier.near.grow(self.slot, first + count)
        write(self.tier.near, self.slot, first, self.num_tokens + self.seed, count)
        self.num_tokens += count

    def move(self) -> None:
        """Move all whole parts; raises what the tier does, with nothing changed."""
        count = self.tier.whole_parts(self.num_local)
        near, exits = self.tier.near, Exits(self.tier.near)
        fresh = split_off(near, exits, self.slot, count, self.num_local)
        try:
            self.tier.append(self.segment, self.slot, count)
        except (Shortage, DriverError):
            exits.let_go(fresh)
            raise
        old, self.slot = self.slot, fresh
        exits.let_go(old)

    def check(self) -> None:
        start = self.segment.num_tokens
        assert start % _PART == 0
        check(self.tier.far, self.segment.slot, self.seed, start)
        check(self.tier.near, self.slot, start + self.seed, self.num_local)
        self.tier.near.check_invariants()
        self.tier.far.check_invariants()

    def close(self) -> None:
        self.tier.near.close(self.slot)
        self.tier.release(self.segment, ())


def write(cache: KVCache, slot: Slot, row: int, value: int, count: int) -> None:
    values = torch.arange(value, value + count, dtype=torch.float32)[:, None, None]
    for layer in range(len(cache.layout.layers)):
        for tensor in cache.layer(layer):
            tensor[slot.index, row : row + count] = values.to(tensor.dtype)


def check(cache: KVCache, slot: Slot, value: int, count: int) -> None:
    expected = torch.arange(value, value + count, dtype=torch.float32)[:, None, None]
    for layer in range(len(cache.layout.layers)):
        for tensor in cache.layer(layer):
            found = tensor[slot.index, :count].float()
            assert torch.equal(found, expected.expand_as(found))


def _tier(
    kind: str = "even", near: FlakyHostDriver | None = None, far: FlakyHostDriver | None = None
) -> SegmentTier:
    near_cache = make_cache(KIND[kind], near)
    far_cache = make_cache(KIND[kind], far, max_parked=NUM_SLOTS)
    return SegmentTier(near_cache, far_cache, _PART)


@pytest.fixture
def tier() -> Iterator[SegmentTier]:
    tier = _tier()
    yield tier
    _close(tier)


def _close(tier: SegmentTier) -> None:
    for cache in (tier.near, tier.far):
        cache.shutdown()
        driver = cache.pool.driver
        assert (driver.num_pages, driver.reserved_bytes) == (0, 0)
        driver.close()


@pytest.mark.parametrize("kind", ["even", "ragged", "split", "windows", "wide"])
def test_a_sequence_is_itself_in_two_places(kind: str) -> None:
    tier = _tier(kind)
    sequence = Grown(tier)
    for count in (5, 40, 16, 3, 33):
        sequence.grow(count)
        if sequence.num_local >= _PART:
            sequence.move()
            assert sequence.num_local < _PART
        sequence.check()
    sequence.close()
    _close(tier)


def test_what_is_released_is_found_by_its_tokens(tier: SegmentTier) -> None:
    tokens = list(range(100))
    sequence = Grown(tier)
    sequence.grow(50)
    sequence.move()
    tier.near.close(sequence.slot)
    tier.release(sequence.segment, tokens, "salt")
    assert tier.begin(tokens).num_tokens == 0
    again = tier.begin([*tokens[:40], 7, 8], "salt", num_reserved=96)
    assert again.num_tokens == 32  # whole parts of the common ones
    check(tier.far, again.slot, 0, 32)
    tier.release(again, ())


def test_a_slot_that_others_share_is_left_as_it_is(tier: SegmentTier) -> None:
    sequence = Grown(tier)
    sequence.grow(60)
    other = tier.near.fork(sequence.slot, 48)
    sequence.move()
    sequence.grow(20)
    sequence.check()
    check(tier.near, other, 0, 48)
    tier.near.close(other)
    sequence.close()


def test_promises_are_kept_for_who_begins(tier: SegmentTier) -> None:
    most = tier.far.num_obtainable()
    segment = tier.begin((), num_reserved=128)
    assert tier.far.num_obtainable() == most - tier.far.num_pages(128)
    other = tier.far.open()
    with pytest.raises(OutOfPages):
        tier.far.pool.reserve(most, into=other.reservation)
    tier.far.close(other)
    tier.far.grow(segment.slot, 128)
    tier.release(segment, ())
    assert tier.far.num_obtainable() == most


@pytest.mark.parametrize(
    ("which", "copies"),
    [("near", True), ("far", True), ("far", False)],
    ids=["near", "far", "far, and copies fail"],
)
@pytest.mark.parametrize("short", [False, True])
def test_any_call_may_be_refused(
    which: str, short: bool, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in turn: what cannot move stays, and nothing is lost."""
    for call in range(1000):
        drivers = {"near": FlakyHostDriver(), "far": FlakyHostDriver()}
        tier = _tier("even", **drivers)
        sequence = Grown(tier)
        sequence.grow(40 if copies else 48)  # with a rest that is copied here, or without
        drivers[which].fail_after, drivers[which].fail_short = call, short
        with monkeypatch.context() as patch:
            if not copies:
                patch.setattr("vkv.allocator.transfer.copier._copy", _refuse)
            try:
                sequence.move()
                assert copies
            except (Shortage, DriverError):
                assert sequence.segment.num_tokens == 0
        was_reached = drivers[which].fail_after is None
        drivers[which].fail_after = None
        tier.exits.retry()
        sequence.check()
        sequence.grow(9)
        sequence.move()
        sequence.check()
        sequence.close()
        _close(tier)
        if not was_reached:
            break
    assert call


def _refuse(*args: object) -> None:
    raise InvalidOperation("no such memory")


def test_other_tokens_are_refused() -> None:
    near, far = make_cache(KIND["even"]), make_cache(KIND["ragged"])
    with near, far, pytest.raises(InvalidOperation, match="cannot be kept as"):
        SegmentTier(near, far, _PART)


# -- whose bytes a slot shows --------------------------------------------------------------------


def _shown(cache: KVCache, slot: Slot) -> set[float]:
    """All values, but 0, in the memory of a slot, in use or not."""
    return {v for words in visible_words(cache, slot) for v in words.unique().tolist()} - {0}


def test_what_comes_home_is_its_tenants() -> None:
    """Its pages, too, are cleared for whoever has them next."""
    cache = make_cache(KIND["ragged"], sanitize="tenants")
    exits = Exits(cache)
    with cache:
        for owner, byte, num_tokens in (("ann", 1, 100), ("bob", 2, 3)):

            def fill(spans: Spans, byte: int = byte) -> None:
                for piece in (piece for stream in spans for piece in stream):
                    piece.fill_(byte)

            slot = cache.open(owner)
            home = put_before(cache, exits, slot, 0, num_tokens, fill)
            rest = split_off(cache, exits, home, 0, num_tokens - 1)
            values = torch.full((4,), byte, dtype=torch.uint8).view(cache.layout.dtype)
            for one in (home, rest):
                assert _shown(cache, one) == set(values.tolist())
                exits.let_go(one)
            exits.let_go(slot)
        cache.check_invariants()


def test_a_segment_is_its_tenants() -> None:
    near = make_cache(KIND["ragged"], sanitize="tenants")
    far = make_cache(KIND["ragged"], sanitize="tenants", max_parked=NUM_SLOTS)
    tier = SegmentTier(near, far, _PART)
    for owner, value, num_parts in (("ann", 1, 5), ("bob", 2, 1)):
        slot = near.open(owner)
        near.grow(slot, num_parts * _PART)
        for layer in range(len(near.layout.layers)):
            for tensor in near.layer(layer):
                tensor[slot.index, : num_parts * _PART] = value
        segment = tier.begin((), owner=owner)
        tier.append(segment, slot, num_parts * _PART)
        assert _shown(far, segment.slot) == {value}
        tier.release(segment, ())
        near.close(slot)
    _close(tier)
