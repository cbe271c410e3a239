"""What an engine holds and has done, as plain data."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Self

from ...allocator import KVStats
from ...allocator.transfer import MoveStats
from ..adapters.adapters import AdapterStats
from ..chains.chains import BlockStats, ChainStats
from ..model.segments import SegmentServer
from ..request.request import Request
from ..request.spec import SequenceKey
from ..scheduling.accounts import TenantStats
from ..scheduling.segments import Segments
from ..scheduling.swapping import Swapping
from ..speculation import SpeculationStats


@dataclass(frozen=True, kw_only=True)
class SwapStats:
    """What another tier of memory holds, and what moved there and back.

    Attributes:
        physical_bytes, limit_bytes: memory of the tier now, and the most that it may be.
        num_tokens: tokens that it has.
        stored, fetched: what was moved, there and back.
        stall_s: that steps waited for copies, so far.
        num_preempted: requests whose slot was taken away, and is kept there until they are back.
        num_computed_instead: times that computing was faster than fetching.
    """

    physical_bytes: int
    limit_bytes: int
    num_tokens: int
    stored: MoveStats
    fetched: MoveStats
    stall_s: float
    num_preempted: int
    num_computed_instead: int

    @classmethod
    def of(cls, swapping: Swapping) -> Self:
        """Those of an engine's tier now."""
        kv = swapping.tier.far.stats()
        return cls(
            physical_bytes=kv.physical_bytes,
            limit_bytes=kv.pages_limit * kv.page_bytes,
            num_tokens=kv.tokens_parked + kv.tokens_held,
            stored=replace(swapping.tier.stored),
            fetched=replace(swapping.tier.fetched),
            stall_s=swapping.stall_s,
            num_preempted=swapping.num_preempted,
            num_computed_instead=swapping.num_computed_instead,
        )


@dataclass(frozen=True, kw_only=True)
class Borrowed:
    """What another engine has of this one's requests.

    Attributes:
        holder: the name of who it is.
        num_loans, num_tokens: now.
        num_steps, sent_bytes, received_bytes, waited_s: as of `Creditor`.
    """

    holder: str
    num_loans: int
    num_tokens: int
    num_steps: int
    sent_bytes: int
    received_bytes: int
    waited_s: float


@dataclass(frozen=True, kw_only=True)
class Lent:
    """What an engine has of others' requests.

    Attributes:
        num_loans, num_tokens: now.
        num_called_back: for want of memory, so far.
        slowest_call_back_s: that giving the memory of one of them back took.
    """

    num_loans: int
    num_tokens: int
    num_called_back: int
    slowest_call_back_s: float

    @classmethod
    def of(cls, server: SegmentServer) -> Self:
        """That of an engine now."""
        loans = server.loans.values()
        return cls(
            num_loans=len(loans),
            num_tokens=sum(loan.stop - loan.start for loan in loans),
            num_called_back=server.num_called_back,
            slowest_call_back_s=server.slowest_call_back_s,
        )


@dataclass(frozen=True, kw_only=True)
class SegmentStats:
    """Requests that are longer than the pool, of which most tokens lie elsewhere.

    Attributes:
        num_requests: that run so now.
        num_tokens: of theirs, elsewhere.
        moved, lent: what moved as they grew, so far: to the tier, and to other processes.
        moved_on, came_home: of what was lent, to another process, and back.
        num_called: loans that left since they were called back, so far.
        num_called_back, num_lost: loans of theirs that others ended, and that went with others, so
            far; their tokens were computed again.
        mended_tokens, redone_tokens: those, by themselves; and all of requests that had to be
            computed from the start for it.
        borrowed: from whom, those included that have nothing now.
        given: to others; None of an engine that lends nothing.
        keys: of those requests; they do not move to another engine.
    """

    num_requests: int
    num_tokens: int
    moved: MoveStats
    lent: MoveStats
    moved_on: MoveStats = field(default_factory=MoveStats)
    came_home: MoveStats = field(default_factory=MoveStats)
    num_called: int = 0
    num_called_back: int = 0
    num_lost: int = 0
    mended_tokens: int = 0
    redone_tokens: int = 0
    borrowed: tuple[Borrowed, ...] = ()
    given: Lent | None = None
    keys: tuple[SequenceKey, ...] = ()

    @classmethod
    def of(
        cls, segments: Segments, running: Sequence[Request], server: SegmentServer | None
    ) -> Self:
        """Those of an engine now, and of what lends its memory."""
        spread = [request for request in running if request.is_spread]
        return cls(
            num_requests=len(spread),
            num_tokens=sum(map(_num_elsewhere, spread)),
            moved=MoveStats() if segments.tier is None else replace(segments.tier.moved),
            lent=replace(segments.loans.lent),
            moved_on=replace(segments.loans.moved_on),
            came_home=replace(segments.loans.came_home),
            num_called=segments.loans.num_called,
            num_called_back=segments.loans.num_called_back,
            num_lost=segments.loans.num_lost,
            mended_tokens=segments.loans.mended_tokens,
            redone_tokens=segments.loans.redone_tokens,
            borrowed=_borrowed(segments, running),
            given=None if server is None else Lent.of(server),
            keys=tuple(request.key for request in spread),
        )


def _num_elsewhere(request: Request) -> int:
    in_tier = 0 if request.segment is None else request.segment.num_tokens
    return in_tier + sum(one.stop - one.start for one in request.all_lent)


def _borrowed(segments: Segments, running: Iterable[Request]) -> tuple[Borrowed, ...]:
    lent = [one for request in running for one in request.all_lent]
    return tuple(
        Borrowed(
            holder=creditor.name,
            num_loans=sum(one.holder == creditor.name for one in lent),
            num_tokens=sum(one.stop - one.start for one in lent if one.holder == creditor.name),
            num_steps=creditor.num_steps,
            sent_bytes=creditor.sent_bytes,
            received_bytes=creditor.received_bytes,
            waited_s=creditor.waited_s,
        )
        for creditor in list(segments.loans.creditors.values())
    )


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine holds now, and what it has done so far.

    Attributes:
        kv: what the cache holds, in its own counts.
        state_bytes: memory of recurrent and convolution state, beside the pages.
        working_bytes: the most that steps take beside weights, pages and state: tensors of the
            largest one, as measured at load, and the workspaces of this process's kernels.
        num_running, num_waiting: live requests by state.
        num_preemptions: requests whose slot was taken away to be computed again.
        prefix_hit_tokens: prompt tokens that needed no computing.
        num_steps, num_prompt_tokens, num_output_tokens: work done.
        num_failed: requests that ended with an error.
        num_recordings: recordings of decode steps that exist.
        num_replays: steps that ran from one.
        num_computed_tokens: tokens that went through the model, those computed again included.
        step_time_s: time of all steps together.
        num_drafted, num_accepted: tokens that were guessed ahead, and those that proved right.
        speculation: more of that, and who guesses; None if nobody does.
        swap: of the tier behind the cache; None without one.
        segments: of requests that are longer than the pool; None where there can be none.
        tenants: what each got, those without a request included as long as they are remembered;
            two hundred or so at most.
        adapters: those that were loaded.
        models, blocks: those that run beside the engine's own model, and what they have of their
            own.
    """

    kv: KVStats
    state_bytes: int
    working_bytes: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    prefix_hit_tokens: int
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_failed: int
    num_recordings: int
    num_replays: int
    num_computed_tokens: int
    step_time_s: float
    num_drafted: int = 0
    num_accepted: int = 0
    speculation: SpeculationStats | None = None
    swap: SwapStats | None = None
    segments: SegmentStats | None = None
    tenants: tuple[TenantStats, ...] = ()
    adapters: tuple[AdapterStats, ...] = ()
    models: tuple[ChainStats, ...] = ()
    blocks: tuple[BlockStats, ...] = ()

    @property
    def virtual_bytes(self) -> int:
        """Address space reserved for the slots."""
        return self.kv.virtual_bytes

    @property
    def pages_of_files(self) -> int:
        """Pages that are stretches of sessions' files, under no limit."""
        return self.kv.pages_of_files

    @property
    def physical_bytes(self) -> int:
        """Memory that exists for keys and values now."""
        return self.kv.physical_bytes

    @property
    def page_bytes(self) -> int:
        """Size of a page."""
        return self.kv.page_bytes

    @property
    def growth_tokens(self) -> int:
        """Tokens that one page of every range covers."""
        return self.kv.growth_tokens

    @property
    def pages_held(self) -> int:
        """Pages that requests hold, live or parked."""
        return self.kv.pages_held + self.kv.pages_ahead + self.kv.pages_parked

    @property
    def pages_parked(self) -> int:
        """Pages among them that only finished requests hold; `trim` returns them."""
        return self.kv.pages_parked

    @property
    def pages_ahead(self) -> int:
        """Pages among them mapped ahead of live requests' tokens."""
        return self.kv.pages_ahead

    @property
    def pages_limit(self) -> int:
        """The most pages there may be."""
        return self.kv.pages_limit

    @property
    def tokens_held(self) -> int:
        """Tokens whose keys and values are held, live or parked."""
        return self.kv.tokens_held + self.kv.tokens_parked

    @property
    def tokens_parked(self) -> int:
        """Tokens among them of finished requests."""
        return self.kv.tokens_parked

    @property
    def mapping_time_s(self) -> float:
        """Time that the step loop waited for memory."""
        return self.kv.mapping_time_s

    @property
    def background_time_s(self) -> float:
        """Time that the look-ahead thread spent on it instead."""
        return self.kv.background_time_s

    @property
    def driver_calls(self) -> dict[str, int]:
        """System or driver calls, by kind."""
        return self.kv.driver_calls


# Of engines that are put together.
_ALIKE = frozenset(("page_bytes", "growth_tokens", "drafter"))
_WORST = frozenset(("slowest_call_back_s",))  # of which the largest counts


def together(all_stats: Sequence[EngineStats]) -> EngineStats:
    """What several engines of one model hold and have done: one at least."""
    return _sum(all_stats)


def _sum(values: Sequence[Any]) -> Any:
    """Field by field, of those that have any; tenants, adapters and holders by their names."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    first = values[0]
    if is_dataclass(first):
        parts: dict[str, Any] = {}
        for one in fields(first):
            of_all = [getattr(value, one.name) for value in values]
            if one.name in _ALIKE:
                parts[one.name] = of_all[0]
            else:
                parts[one.name] = max(of_all) if one.name in _WORST else _sum(of_all)
        return type(first)(**parts)
    if isinstance(first, Mapping):
        return dict(sum((Counter(value) for value in values), Counter()))
    if isinstance(first, tuple):
        return _together([one for value in values for one in value], len(values))
    return None if first is None else sum(values)


def _together(several: Sequence[Any], num_engines: int) -> tuple[Any, ...]:
    if several and isinstance(several[0], tuple):  # names of requests
        return tuple(several)
    if several and isinstance(several[0], AdapterStats):
        return _by_adapter(several, num_engines)
    if several and isinstance(several[0], Borrowed):
        return _by_holder(several)
    if several and isinstance(several[0], ChainStats):
        return _alike(several, "name", "digest")
    if several and isinstance(several[0], BlockStats):
        return _alike(several, "place", "digest")
    return _by_tenant(several)


def _by_tenant(all_tenants: Sequence[TenantStats]) -> tuple[TenantStats, ...]:
    found: dict[str, TenantStats] = {}
    for one in all_tenants:
        before = found.get(one.tenant)
        found[one.tenant] = one if before is None else _added(before, one)
    return tuple(found.values())


def _by_adapter(adapters: Sequence[AdapterStats], num_engines: int) -> tuple[AdapterStats, ...]:
    """Those that all engines have; one that some lack is leaving, or on its way."""
    found: dict[tuple[str, str], list[AdapterStats]] = {}
    for one in adapters:
        found.setdefault((one.name, one.digest), []).append(one)
    return tuple(
        replace(
            several[0],
            num_bytes=sum(one.num_bytes for one in several),
            is_here=any(one.is_here for one in several),
            num_requests=sum(one.num_requests for one in several),
            is_leaving=len(several) < num_engines or any(one.is_leaving for one in several),
        )
        for several in found.values()
    )


def _by_holder(borrowed: Sequence[Borrowed]) -> tuple[Borrowed, ...]:
    found: dict[str, list[Borrowed]] = {}
    for one in borrowed:
        found.setdefault(one.holder, []).append(one)
    numbers = [one.name for one in fields(Borrowed) if one.name != "holder"]
    return tuple(
        Borrowed(
            holder=holder, **{name: sum(getattr(one, name) for one in several) for name in numbers}
        )
        for holder, several in found.items()
    )


def _alike(several: Sequence[Any], *names: str) -> tuple[Any, ...]:
    """Put together what has the same under these names: numbers added, what is stored once."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for one in several:
        found.setdefault(tuple(getattr(one, name) for name in names), []).append(one)
    return tuple(_summed(group) for group in found.values())


def _summed(group: Sequence[Any]) -> Any:
    counted = [one.name for one in fields(group[0]) if one.name.startswith("num_")]
    sums = {name: sum(getattr(one, name) for one in group) for name in counted}
    if isinstance(group[0], ChainStats):
        sums["is_here"] = any(one.is_here for one in group)
    return replace(group[0], **sums)


def _added(before: TenantStats, one: TenantStats) -> TenantStats:
    return TenantStats(
        tenant=one.tenant,
        num_unfinished=before.num_unfinished + one.num_unfinished,
        prompt_tokens=before.prompt_tokens + one.prompt_tokens,
        output_tokens=before.output_tokens + one.output_tokens,
        counter=before.counter + one.counter,
    )
