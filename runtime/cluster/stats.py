"""What a cluster holds and has done, as plain data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Self

from ..engine.memory.lending import LendingReport
from ..engine.stats import EngineStats
from ..link.addresses import Address
from ..link.face import Face
from ..request.spec import SequenceKey
from .snapshot import Role

_HOLDER = "instance "


def holder_name(instance: int) -> str:
    """What an instance is called by those that it lends to."""
    return f"{_HOLDER}{instance}"


def instance_of(holder: str) -> int | None:
    """The instance that is called so; None if it is none."""
    number = holder.removeprefix(_HOLDER)
    return int(number) if number != holder and number.isdecimal() else None


@dataclass(kw_only=True)
class Member:
    """An instance.

    Attributes:
        id: names it as long as the cluster exists.
        role, home: as of `InstanceSnapshot`.
        pid: of its process, on its node.
        node: Ray's name of the machine that it is on.
        is_draining: it takes nothing, and hands over what it has.
        face: what it is; None until it has said so.
        lends_at: where others borrow from it; None if it lends nothing.
        lending: what it last said of its loans; None until then, and where it has none.
        longest: tokens of the longest request that it takes with what others lend it; None without
            that.
        stats: what it last said of itself.
        carried_bytes, handed_pages: of sequences that left it, copied and as they were, so far.
    """

    id: int
    role: Role
    pid: int
    node: str = ""
    home: Role | None = None
    is_draining: bool = False
    face: Face | None = None
    lends_at: Address | None = None
    lending: LendingReport | None = None
    longest: int | None = None
    stats: EngineStats | None = None
    carried_bytes: int = 0
    handed_pages: int = 0

    @property
    def has_arrived(self) -> bool:
        """Whether it has said all that must be known to give it work."""
        has_terms = self.lends_at is None or self.longest is not None
        return self.face is not None and has_terms

    @property
    def name(self) -> str:
        """What those that borrow from it call it."""
        return holder_name(self.id)

    @property
    def long_requests(self) -> frozenset[SequenceKey]:
        """Those of which not all is in its memory: they do not move."""
        segments = None if self.stats is None else self.stats.segments
        told = () if segments is None else segments.keys
        return frozenset(told if self.lending is None else (*told, *self.lending.spread))

    @property
    def state(self) -> str:
        """ "loading", "working" or "draining"."""
        if self.face is None:
            return "loading"
        return "draining" if self.is_draining else "working"


@dataclass(frozen=True, kw_only=True)
class Done:
    """What instances have done so far, as they last said. Sums only grow.

    Attributes:
        num_bytes_copied, num_pages_moved: of sequences that left them: copied, and as they were.
        num_prompt_tokens, num_output_tokens, num_preemptions: as of `EngineStats`.
        lent_tokens, moved_on_tokens, came_home_tokens: that others took in, that moved from one of
            them to another, and that came back.
        num_called, num_called_back, num_lost, mended_tokens, redone_tokens: as of `SegmentStats`.
        num_died, num_drained: how many of them have ended, for want of life and by order.
    """

    num_bytes_copied: int = 0
    num_pages_moved: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    lent_tokens: int = 0
    moved_on_tokens: int = 0
    came_home_tokens: int = 0
    num_called: int = 0
    num_called_back: int = 0
    num_lost: int = 0
    mended_tokens: int = 0
    redone_tokens: int = 0
    num_died: int = 0
    num_drained: int = 0

    @classmethod
    def of(cls, member: Member) -> Self:
        """By an instance."""
        found = cls(num_bytes_copied=member.carried_bytes, num_pages_moved=member.handed_pages)
        if (stats := member.stats) is not None:
            found = replace(
                found,
                num_prompt_tokens=stats.num_prompt_tokens,
                num_output_tokens=stats.num_output_tokens,
                num_preemptions=stats.num_preemptions,
            )
        if stats is not None and (segments := stats.segments) is not None:
            found = replace(
                found,
                lent_tokens=segments.lent.num_tokens,
                moved_on_tokens=segments.moved_on.num_tokens,
                came_home_tokens=segments.came_home.num_tokens,
                num_called=segments.num_called,
                num_called_back=segments.num_called_back,
                num_lost=segments.num_lost,
                mended_tokens=segments.mended_tokens,
                redone_tokens=segments.redone_tokens,
            )
        return found

    def plus(self, others: Iterable["Done"]) -> "Done":
        """Together with others."""
        all_of_them = [self, *others]
        return Done(
            **{
                one.name: sum(getattr(done, one.name) for done in all_of_them)
                for one in fields(self)
            }
        )


@dataclass(frozen=True, kw_only=True)
class MoveUnderWay:
    """A sequence on its way, from one instance to another."""

    key: SequenceKey
    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class LoanStats:
    """What one instance has of another's requests, and may have.

    Attributes:
        debtor, creditor: the instances.
        num_loans, num_tokens: that are there.
        credit_tokens: that may be there.
        bytes_a_step: of queries and results, in the mean of all steps that asked there.
        answer_s: for how long the debtor waits for an answer in a layer, by the median.
        is_shunned: it is not asked for a while, as it was slow or could not be reached.
    """

    debtor: int
    creditor: int
    num_loans: int = 0
    num_tokens: int = 0
    credit_tokens: int = 0
    bytes_a_step: float = 0.0
    answer_s: float | None = None
    is_shunned: bool = False


@dataclass(frozen=True, kw_only=True)
class ClusterStats:
    """What a cluster has done, and what its instances hold. No count gets smaller when one ends.

    Attributes:
        num_migrations: sequences that moved to another instance and went on there.
        num_stayed: migrations that were begun and came to nothing; their sequences went on.
        num_recomputed: sequences that were computed again, since their instance had died, or was
            drained and they do not move.
        done: by all instances, those that have ended included.
        instances: as each was a moment ago.
        requests: unfinished sequences, and the instance that has each.
        moves: under way.
        loans: of memory, one a debtor and creditor.
    """

    num_migrations: int
    num_stayed: int
    num_recomputed: int
    done: Done
    instances: tuple[Member, ...]
    requests: Mapping[SequenceKey, int | None] = field(default_factory=dict)
    moves: tuple[MoveUnderWay, ...] = ()
    loans: tuple[LoanStats, ...] = ()

    @property
    def num_bytes_copied(self) -> int:
        """Of keys and values, by migrations."""
        return self.done.num_bytes_copied

    @property
    def num_pages_moved(self) -> int:
        """That changed hands in migrations, of which no byte was copied."""
        return self.done.num_pages_moved
