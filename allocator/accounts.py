"""What a cache holds: its statistics, from counters, and the recount that proves them."""

from collections import Counter

from ..vmem import Page, is_of_file
from .backing import Backing
from .ledger import Use
from .slot import SlotState
from .slot_table import SlotTable
from .stats import KVStats


def snapshot(
    backing: Backing,
    table: SlotTable,
    *,
    virtual_bytes: int,
    mapping_time_s: float,
    background_time_s: float,
    background_failures: int,
) -> KVStats:
    """The statistics of a cache with these slots. Takes time for each slot, not for each page."""
    ledger, live, parked = backing.ledger, table.live.values(), table.parked
    for slot in live:
        ledger.settle(slot)  # `ahead_tokens` may have changed since
    pool = backing.pool
    return KVStats(
        virtual_bytes=virtual_bytes,
        physical_bytes=pool.num_created * pool.driver.page_bytes,
        page_bytes=pool.driver.page_bytes,
        growth_tokens=backing.geometry.growth_tokens,
        pages_held=ledger.count(Use.NEEDED),
        pages_ahead=ledger.count(Use.PROMISED, Use.AHEAD),
        pages_parked=ledger.count(Use.IDLE, Use.PARKED),
        pages_free=pool.num_free,
        pages_of_files=pool.num_of_files,
        pages_reserved=pool.num_reserved,
        pages_limit=pool.limit_pages,
        tokens_held=sum(slot.num_tokens for slot in live),
        tokens_parked=sum(slot.num_tokens for slot in parked),
        slots_open=len(live),
        slots_parked=len(parked),
        num_mappings=pool.driver.num_mappings,
        mapping_time_s=mapping_time_s,
        background_time_s=background_time_s,
        background_failures=background_failures,
        driver_calls=dict(pool.driver.counters),
    )


def recount(backing: Backing, table: SlotTable) -> None:
    """Compare slots, pool and memory; AssertionError names what does not add up."""
    pool, geometry, live, parked = backing.pool, backing.geometry, table.live, table.parked
    pool.check_invariants()
    table.check_invariants()
    slots = [*live.values(), *parked]
    references: Counter[Page] = Counter()
    for slot in slots:
        needed = geometry.pages_per_range(slot.num_tokens)
        for pages, count in zip(slot.pages, needed, strict=True):
            assert len(pages) >= count, f"{slot} lacks pages for its tokens"
            references.update(pages)
        for pages, count in zip(slot.pages, slot.file_pages, strict=True):
            assert not any(map(is_of_file, pages[count:])), f"{slot} has a file behind its own"
    for page, count in references.items():
        assert count <= pool.references(page), f"page {page} is under-counted"
    reserved = sum(slot.reservation.num_pages for slot in slots)
    assert reserved <= pool.num_reserved, "a reservation is not in the pool's count"
    for index, slot in live.items():
        assert slot.index == index, f"{slot} is filed as slot {index}"
        assert slot.state is SlotState.OPEN, f"{slot} is filed as open"
        lacking = backing.lacking(slot, slot.promised_tokens)
        assert lacking <= slot.reservation.num_pages, f"{slot} was promised more"
        if slot.ready_tokens > slot.num_tokens:
            assert not backing.lacking(slot, slot.ready_tokens), f"{slot} is not ready"
    for slot in parked:
        assert slot.state is SlotState.PARKED, f"{slot} is filed as parked"
        assert parked.num_tokens(slot) == slot.num_tokens, f"{slot} is tagged otherwise"
        assert not slot.reservation.num_pages, f"{slot} is parked and claims pages"
    backing.ledger.check(slots)
    backing.check(slots)
