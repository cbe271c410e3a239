"""What the slots of all instances hold, and which requests are on their way between them."""

from collections.abc import Mapping, Sequence

import msgspec

from ..cluster.instances.maps import Seen
from ..cluster.stats import ClusterStats, Member, instance_of
from ..engine.memory.memory_map import Counters, MemoryMap, added, short_name, side_by_side


class InstanceMap(msgspec.Struct, frozen=True):
    """An instance's part of a `ClusterMap`.

    Attributes:
        id, role: as of `Member`.
        state: as of `Member`, or "silent": it answers nothing, and is shown as it was.
        first_slot, num_slots: its slots in the map; none before it has answered.
        num_running, num_waiting: its live requests by state.
        physical, limit: its memory for keys and values in bytes, and the most that it may be.
    """

    id: int
    role: str
    state: str
    first_slot: int
    num_slots: int = 0
    num_running: int = 0
    num_waiting: int = 0
    physical: int = 0
    limit: int = 0


class Moving(msgspec.Struct, frozen=True):
    """A request on its way, called as in the strips, from one instance to another."""

    request: str
    source: int
    target: int


class Loans(msgspec.Struct, frozen=True):
    """What an instance has lent another, or may.

    Attributes:
        debtor, creditor: the instances.
        num_loans, num_tokens: now.
        num_steps, num_bytes: as of `Traffic`.
    """

    debtor: int
    creditor: int
    num_loans: int
    num_tokens: int
    num_steps: int
    num_bytes: int


class ClusterMap(msgspec.Struct, frozen=True):
    """The slots of all instances in one map, one's behind the other's, and whose they are.

    Attributes:
        num_moved, num_recomputed: sequences so far.
        loans: between instances, those of none now included where there were some.
    """

    map: MemoryMap
    instances: tuple[InstanceMap, ...]
    moves: tuple[Moving, ...] = ()
    num_moved: int = 0
    num_recomputed: int = 0
    loans: tuple[Loans, ...] = ()


class ClusterMaps:
    """Draws maps of a cluster whose counters never run backwards, whoever ends."""

    def __init__(self) -> None:
        self._last: dict[int, Counters] = {}
        self._ended: list[Counters] = []  # one at most: their sum

    def draw(self, seen: Mapping[int, Seen], stats: ClusterStats) -> ClusterMap | None:
        """The map of now; None before any instance has answered."""
        for number in [number for number in self._last if number not in seen]:
            self._ended = [added(Counters, [*self._ended, self._last.pop(number)])]
        self._last |= {number: one.map.counters for number, one in seen.items()}
        known = [member for member in stats.instances if member.id in seen]
        if not known:
            return None
        maps = _named({member.id: seen[member.id].map for member in known})
        whole = side_by_side(list(maps.values()))
        counters = added(Counters, [*self._ended, *self._last.values()])
        return ClusterMap(
            map=msgspec.structs.replace(whole, counters=counters),
            instances=_parts(stats.instances, seen),
            moves=tuple(Moving(short_name(m.key), m.source, m.target) for m in stats.moves),
            num_moved=stats.num_migrations,
            num_recomputed=stats.num_recomputed,
            loans=_loans(maps),
        )


def _named(maps: Mapping[int, MemoryMap]) -> dict[int, MemoryMap]:
    """The maps, with the names of requests that instances lend to, where their own instances are
    there to tell."""
    names = {
        (instance_of(one.holder), one.loan): one.request
        for drawn in maps.values()
        for one in drawn.borrowed
    }
    return {number: _with_names(number, drawn, names) for number, drawn in maps.items()}


def _with_names(
    number: int, drawn: MemoryMap, names: Mapping[tuple[int | None, int], str]
) -> MemoryMap:
    if not drawn.lent:
        return drawn
    known = {one.slot: names.get((number, one.loan), "") for one in drawn.lent}
    strips = tuple(
        msgspec.structs.replace(strip, request=known.get(strip.slot, strip.request))
        for strip in drawn.strips
    )
    return msgspec.structs.replace(drawn, strips=strips)


def _loans(maps: Mapping[int, MemoryMap]) -> tuple[Loans, ...]:
    found: list[Loans] = []
    for debtor, drawn in maps.items():
        for one in drawn.traffic:
            lent = [s.num_tokens for s in drawn.borrowed if s.holder == one.holder]
            creditor = instance_of(one.holder)
            if creditor is not None and (lent or one.num_steps):
                found.append(
                    Loans(debtor, creditor, len(lent), sum(lent), one.num_steps, one.num_bytes)
                )
    return tuple(found)


def _parts(members: Sequence[Member], seen: Mapping[int, Seen]) -> tuple[InstanceMap, ...]:
    parts: list[InstanceMap] = []
    first = 0
    for member in members:
        one = seen.get(member.id)
        if one is None:
            parts.append(InstanceMap(member.id, member.role, "loading", first))
            continue
        part = InstanceMap(
            id=member.id,
            role=member.role,
            state="silent" if one.is_silent else member.state,
            first_slot=first,
            num_slots=one.map.num_slots,
            num_running=one.map.num_running,
            num_waiting=one.map.num_waiting,
            physical=one.map.totals.physical,
            limit=one.map.totals.limit,
        )
        parts.append(part)
        first += one.map.num_slots
    return tuple(parts)
