"""What a cache holds at one moment, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KVStats:
    """A snapshot of a KV cache.

    Attributes:
        virtual_bytes: address space reserved for the slots.
        physical_bytes: memory that exists for KV now: held, parked and free pages.
        page_bytes: size of a page.
        growth_tokens: tokens covered by one page of every range.
        pages_held: pages that live requests need for their tokens, a shared page once.
        pages_ahead: pages mapped behind live requests' tokens that were promised or asked ahead.
        pages_parked: pages that no live request needs: those of parked slots, and those that a
            slot taken over from one has beyond its new owner's need. Reclaimed when others want
            them, returned by `trim`.
        pages_free: pages that exist and are nobody's.
        pages_of_files: pages that are stretches of files and mapped by slots; no memory of the
            pool's, under no limit, and not among the others.
        pages_reserved: pages promised to requests and not yet taken.
        pages_limit: the most pages the pool may hold.
        tokens_held: tokens of live requests.
        tokens_parked: tokens whose KV parked slots still hold.
        slots_open, slots_parked: slots by state.
        num_mappings: mappings in use, in the unit that the system limits.
        mapping_time_s: time that callers spent waiting for memory, so far.
        background_time_s: time that the look-ahead thread spent instead, so far.
        background_failures: its jobs that failed, so far; `grow` maps what they did not.
        driver_calls: system or driver calls so far, by kind.
    """

    virtual_bytes: int
    physical_bytes: int
    page_bytes: int
    growth_tokens: int
    pages_held: int
    pages_ahead: int
    pages_parked: int
    pages_free: int
    pages_of_files: int
    pages_reserved: int
    pages_limit: int
    tokens_held: int
    tokens_parked: int
    slots_open: int
    slots_parked: int
    num_mappings: int
    mapping_time_s: float
    background_time_s: float
    background_failures: int
    driver_calls: dict[str, int]
