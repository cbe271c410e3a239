"""What every slot of an engine holds, as plain data for a picture that is drawn as it changes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

import msgspec

from ....allocator import KVStats, Lane, PagedKVCache, PageRuns, SlotPages
from ...adapters.adapters import AdapterStats
from ...request.request import Request
from ...request.spec import SequenceKey
from ..engine import Engine
from ..stats import EngineStats

_SHORT = 12  # characters of a request's name

StripState = Literal["live", "parked", "arriving", "leaving", "lent"]
MovingSlots = Mapping[int, tuple[StripState, SequenceKey | None]]
"""Slots of sequences that come from another engine, or have stopped here to go on there."""

_LENT: tuple[StripState, None] = "lent", None


class Strip(msgspec.Struct, frozen=True):
    """A slot that is not free.

    Attributes:
        slot: its index.
        state: a live request's; or parked: kept for a request that begins with the same tokens; or
            of a request that comes from another engine, or goes there; or lent to one of another
            engine, for some of its tokens.
        request: the end of the request's name, apart from all others'; empty where it is parked,
            and where it is not known.
        num_tokens: with keys and values in the slot.
        num_prompt_tokens: of the live request.
        num_promised: pages set aside for it and not mapped yet, over all ranges.
        runs: of one range of each lane.
        adapter: the name of the one that the request uses; empty for the model alone.
    """

    slot: int
    state: StripState
    request: str
    num_tokens: int
    num_prompt_tokens: int
    num_promised: int
    runs: tuple[PageRuns, ...]
    adapter: str = ""


class LentSlot(msgspec.Struct, frozen=True):
    """A slot with tokens of another engine's request, and what that knows it by."""

    slot: int
    loan: int


class Stretch(msgspec.Struct, frozen=True):
    """Tokens of a request that another engine has.

    Attributes:
        request: as of `Strip`.
        holder: the name of who has them.
        loan: what that knows them by.
    """

    request: str
    holder: str
    loan: int
    num_tokens: int


class Traffic(msgspec.Struct, frozen=True):
    """Between an engine and one that has tokens of its requests, so far.

    Attributes:
        holder: the name of who has them.
        num_steps: in which it was asked.
        num_bytes: of queries and results.
    """

    holder: str
    num_steps: int
    num_bytes: int


class AdapterShown(msgspec.Struct, frozen=True):
    """An adapter.

    Attributes:
        num_bytes: that its weights take, where they are in memory.
        num_here: engines that have it in memory.
        num_requests: unfinished ones that use it.
        is_leaving: it was unloaded, and stays until those have ended.
    """

    name: str
    num_bytes: int
    num_here: int
    num_requests: int
    is_leaving: bool


class Totals(msgspec.Struct, frozen=True):
    """Bytes, in sum; a page that several slots share counts once.

    Attributes:
        virtual: address space of all slots.
        limit: the most that may be backed.
        physical: that exists: what follows, and free pages.
        held, ahead, parked: as of `PageRuns`; shared pages count by their best use.
        promised: set aside and not mapped yet.
    """

    virtual: int
    limit: int
    physical: int
    held: int
    ahead: int
    parked: int
    promised: int


class Counters(msgspec.Struct, frozen=True):
    """What was done since the engine began; rates come of two of them.

    Attributes:
        prompt_tokens, output_tokens, steps: work done.
        cached_tokens: prompt tokens that were found in slots.
        preemptions: requests whose slot was taken away to be computed again.
        driver_calls: of the system or the driver.
        mapping_time_s: that steps waited for memory.
        background_time_s: that mapping ahead took meanwhile.
        called_back, lost: as of `SegmentStats`.
    """

    prompt_tokens: int
    output_tokens: int
    steps: int
    cached_tokens: int
    preemptions: int
    driver_calls: int
    mapping_time_s: float
    background_time_s: float
    called_back: int = 0
    lost: int = 0


class MemoryMap(msgspec.Struct, frozen=True):
    """What an engine's slots hold at one moment. Equal maps look the same.

    Attributes:
        kind: "virtual", or "paged" for the baseline, whose slots are lists of blocks.
        num_slots: in all; those without a strip are free.
        max_len: tokens that a slot can hold.
        page_bytes: of a page, or of a block.
        growth_tokens: that one page of every range covers.
        num_running, num_waiting: live requests by state.
        lanes: what ranges a slot is made of.
        strips: the slots that are not free, by index.
        lent: those among them that are lent.
        borrowed: what others have of this engine's requests.
        traffic: with those that have, or may have, some.
        adapters: that were loaded.
    """

    kind: Literal["virtual", "paged"]
    num_slots: int
    max_len: int
    page_bytes: int
    growth_tokens: int
    num_running: int
    num_waiting: int
    lanes: tuple[Lane, ...]
    strips: tuple[Strip, ...]
    totals: Totals
    counters: Counters
    lent: tuple[LentSlot, ...] = ()
    borrowed: tuple[Stretch, ...] = ()
    traffic: tuple[Traffic, ...] = ()
    adapters: tuple[AdapterShown, ...] = ()


def draw_memory(engine: Engine, moving: MovingSlots) -> MemoryMap:
    """The map of now, for whoever drives the engine. Takes time a slot, not a page."""
    pages = engine.cache.page_map()
    stats = engine.stats(pages.stats)
    running = engine.scheduler.running
    loans = {} if engine.lender is None else engine.lender.loans
    lent = tuple(LentSlot(loan.slot.index, number) for number, loan in loans.items())
    return MemoryMap(
        kind="paged" if isinstance(engine.cache, PagedKVCache) else "virtual",
        num_slots=engine.cache.num_slots,
        max_len=engine.cache.max_len,
        page_bytes=stats.page_bytes,
        growth_tokens=stats.growth_tokens,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        lanes=pages.lanes,
        strips=_strips(pages.slots, running, {**moving, **{one.slot: _LENT for one in lent}}),
        totals=_totals(pages.stats),
        counters=_counters(stats),
        lent=lent,
        borrowed=tuple(
            Stretch(short_name(request.key), one.holder, one.loan, one.stop - one.start)
            for request in running
            for one in request.all_lent
        ),
        traffic=_traffic(stats),
        adapters=tuple(map(_adapter, stats.adapters)),
    )


def _strips(
    slots: Iterable[SlotPages], running: Iterable[Request], moving: MovingSlots
) -> tuple[Strip, ...]:
    owners = {slot.index: request for request in running for slot in request.slots}
    return tuple(_strip(one, owners.get(one.slot), moving.get(one.slot)) for one in slots)


def _strip(
    pages: SlotPages, owner: Request | None, moving: tuple[StripState, SequenceKey | None] | None
) -> Strip:
    state: StripState = "parked" if pages.is_parked else "live"
    key = None if owner is None else owner.key
    if owner is None and moving is not None:
        state, key = moving
    return Strip(
        slot=pages.slot,
        state=state,
        request="" if key is None else short_name(key),
        num_tokens=pages.num_tokens,
        num_prompt_tokens=0 if owner is None else owner.num_prompt_tokens,
        num_promised=pages.num_promised,
        runs=pages.runs,
        adapter="" if owner is None or owner.adapter is None else owner.adapter.name,
    )


def short_name(key: SequenceKey) -> str:
    """The end of a request's name, and which of its outputs it is if that is not the first."""
    request_id, index = key
    return request_id[-_SHORT:] + (f"/{index}" if index else "")


def _totals(stats: KVStats) -> Totals:
    return Totals(
        virtual=stats.virtual_bytes,
        limit=stats.pages_limit * stats.page_bytes,
        physical=stats.physical_bytes,
        held=stats.pages_held * stats.page_bytes,
        ahead=stats.pages_ahead * stats.page_bytes,
        parked=stats.pages_parked * stats.page_bytes,
        promised=stats.pages_reserved * stats.page_bytes,
    )


def _counters(stats: EngineStats) -> Counters:
    return Counters(
        prompt_tokens=stats.num_prompt_tokens,
        output_tokens=stats.num_output_tokens,
        steps=stats.num_steps,
        cached_tokens=stats.prefix_hit_tokens,
        preemptions=stats.num_preemptions,
        driver_calls=sum(stats.driver_calls.values()),
        mapping_time_s=stats.mapping_time_s,
        background_time_s=stats.background_time_s,
        called_back=0 if stats.segments is None else stats.segments.num_called_back,
        lost=0 if stats.segments is None else stats.segments.num_lost,
    )


def _traffic(stats: EngineStats) -> tuple[Traffic, ...]:
    return tuple(
        Traffic(one.holder, one.num_steps, one.sent_bytes + one.received_bytes)
        for one in (() if stats.segments is None else stats.segments.borrowed)
    )


def _adapter(one: AdapterStats) -> AdapterShown:
    return AdapterShown(one.name, one.num_bytes, int(one.is_here), one.num_requests, one.is_leaving)


def side_by_side(maps: Sequence[MemoryMap]) -> MemoryMap:
    """The slots of several engines of one model in one map, one engine's behind the other's."""
    strips: list[Strip] = []
    lent: list[LentSlot] = []
    first = 0
    for one in maps:
        lent += [msgspec.structs.replace(slot, slot=first + slot.slot) for slot in one.lent]
        strips += [msgspec.structs.replace(s, slot=first + s.slot) for s in one.strips]
        first += one.num_slots
    return msgspec.structs.replace(
        maps[0],
        num_slots=first,
        num_running=sum(one.num_running for one in maps),
        num_waiting=sum(one.num_waiting for one in maps),
        strips=tuple(strips),
        totals=added(Totals, [one.totals for one in maps]),
        counters=added(Counters, [one.counters for one in maps]),
        lent=tuple(lent),
        borrowed=tuple(one for of_one in maps for one in of_one.borrowed),
        traffic=(),
        adapters=_adapters([one for of_one in maps for one in of_one.adapters]),
    )


def _adapters(every: Sequence[AdapterShown]) -> tuple[AdapterShown, ...]:
    """One for each name, which may have been unloaded and loaded anew."""
    found: dict[str, list[AdapterShown]] = {}
    for one in every:
        found.setdefault(one.name, []).append(one)
    return tuple(
        AdapterShown(
            name,
            max(one.num_bytes for one in several),
            sum(one.num_here for one in several),
            sum(one.num_requests for one in several),
            all(one.is_leaving for one in several),
        )
        for name, several in found.items()
    )


_Sums = TypeVar("_Sums", Totals, Counters)


def added(kind: type[_Sums], all_of_them: Sequence[_Sums]) -> _Sums:
    """Field by field."""
    names = kind.__struct_fields__
    return kind(*(sum(getattr(one, name) for one in all_of_them) for name in names))
