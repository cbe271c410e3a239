"""The instances of a cluster, and the picture of them that a policy sees."""

import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ...vmem.errors import InvalidOperation
from ..engine.migration.arbiter import Arbiter
from ..engine.migration.ownership import Owned
from ..engine.stats import EngineStats
from ..link.face import Face
from ..link.messages import Pulse
from ..request.spec import AdapterKey, RequestSpec
from .instances.instance_link import InstanceLink
from .snapshot import (
    ClusterSnapshot,
    Costs,
    InstanceSnapshot,
    Loan,
    Newcomer,
    RequestSnapshot,
    Role,
)
from .stats import Done, Member

Ending = Literal["died", "drained", "failed", "closed"]
"""Why an instance ends: "failed" with others that were to start with it, "closed" with all."""


class Members:
    """Instances that are connected, by id. Of one event loop, but for what says otherwise.

    Args:
        arbiter: knows what each has to do.

    Attributes:
        scaled_s, switched_s: as of `ClusterSnapshot`.
    """

    def __init__(self, arbiter: Arbiter) -> None:
        self._arbiter = arbiter
        self._members: dict[int, Member] = {}
        self._links: dict[int, InstanceLink] = {}
        self._ended = Done()
        self._leaving = threading.Lock()  # between being there and having been
        self.scaled_s: float | None = None
        self.switched_s: float | None = None
        self._snapshot: tuple[InstanceSnapshot, ...] | None = None
        self._measured = Costs()

    def add(self, member: Member, link: InstanceLink) -> None:
        """An instance is connected."""
        self._members[member.id] = member
        self._links[member.id] = link
        self.changed()

    def remove(self, instance: int, why: Ending) -> None:
        """Hang up on an instance. Without effect on one that is not there."""
        end = Done(num_died=int(why == "died"), num_drained=int(why == "drained"))
        with self._leaving:
            member = self._members.pop(instance, None)
            if member is not None:
                self._ended = self._ended.plus([Done.of(member), end])
        link = self._links.pop(instance, None)
        if link is not None:
            link.close()
        self.changed()

    def of(self, instance: int) -> Member:
        """Raises InvalidOperation if there is none of that number."""
        if instance not in self._members:
            there = ", ".join(map(str, sorted(self._members))) or "none"
            raise InvalidOperation(f"instance {instance} is not there; there are: {there}")
        return self._members[instance]

    def link(self, instance: int) -> InstanceLink | None:
        """The way to it."""
        return self._links.get(instance)

    def links(self) -> list[InstanceLink]:
        """The ways to all of them."""
        return list(self._links.values())

    def all(self) -> list[Member]:
        """As they are now; copies."""
        return [replace(member) for member in self._members.values()]

    def report(self) -> tuple[list[Member], Done]:
        """The instances, and what they and those before them have done; from any thread."""
        with self._leaving:
            members = [replace(member) for member in list(self._members.values())]
            return members, self._ended.plus(map(Done.of, members))

    def now(self) -> list[Member]:
        """As they are; from any thread, and not to be changed."""
        return list(self._members.values())

    @property
    def is_apart(self) -> bool:
        """Whether some compute prompts alone."""
        return any(member.role == "prefill" for member in self._members.values())

    def meet(self, instance: int, face: Face) -> None:
        """An instance has said what it is."""
        if instance in self._members:
            self._members[instance].face = face
            self.changed()

    def note(self, instance: int, pulse: Pulse) -> bool:
        """An instance has said what it holds. Returns whether it can lend, as was not known."""
        member = self._members.get(instance)
        is_new = member is not None and member.lending is None and pulse.lending is not None
        if member is not None:
            member.stats = pulse.stats
            member.carried_bytes, member.handed_pages = pulse.carried_bytes, pulse.handed_pages
            member.lending = pulse.lending
            self.changed()
        return is_new

    def gave(self, instance: int, newcomer: Newcomer) -> None:
        """An instance was given a newcomer. Others' pictures stay, or many that come at once would
        have all of them drawn again for each."""
        if self._snapshot is not None:
            self._snapshot = tuple(
                one.with_given(newcomer) if one.id == instance else one for one in self._snapshot
            )

    def switch(self, instance: int, role: Role, time_s: float) -> None:
        """An instance has another role from now on. One that does both remembers its own."""
        member = self.of(instance)
        member.home = (member.home or member.role) if role == "both" else None
        member.role = role
        self.switched_s = time_s
        self.changed()

    def named(self, name: str) -> int | None:
        """The instance that borrowers call so; None if it is gone."""
        return next((m.id for m in self.now() if m.name == name), None)

    def loans(self) -> tuple[Loan, ...]:
        """What instances have of each other's requests; from any thread."""
        members = self.now()
        ids = {member.name: member.id for member in members}
        return tuple(
            Loan(member.id, ids[held.creditor], held.num_tokens, held.answer_s)
            for member in members
            if member.lending is not None
            for held in member.lending.loans
            if held.creditor in ids
        )

    def changed(self) -> None:
        """Something in the next picture is another."""
        self._snapshot = None

    def needs(self, spec: RequestSpec) -> Mapping[str, int]:
        """As of `Newcomer`: what a request computes with beside the model."""
        key = spec.adapter
        if key is None:
            return {}
        sizes = (
            one.num_bytes
            for member in self._members.values()
            if member.stats is not None
            for one in member.stats.adapters
            if one.key == key
        )
        return {resident_name(key): next(sizes, 1)}

    def snapshot(self, *, num_dispatched: int) -> ClusterSnapshot:
        """The cluster now: what instances said last, and what was given to them since."""
        loans = self.loans()
        if self._snapshot is None:
            by_owner: dict[str, list[Owned]] = {}
            for sequence in self._arbiter.unfinished:
                if sequence.owner is not None:
                    by_owner.setdefault(sequence.owner, []).append(sequence)
            # What an idle one said last is of before it was idle.
            refusing = {
                name
                for member in self._members.values()
                if member.lending is not None and str(member.id) in by_owner
                for name in member.lending.refusing
            }
            self._snapshot = tuple(
                self._picture(member, by_owner.get(str(member.id), []), loans, refusing)
                for member in self._members.values()
            )
            self._measured = _costs(self._members.values())
        faces = [member.face for member in self._members.values() if member.face is not None]
        return ClusterSnapshot(
            time_s=time.monotonic(),
            instances=self._snapshot,
            token_bytes=faces[0].token_bytes if faces else 0,
            num_dispatched=num_dispatched,
            scaled_s=self.scaled_s,
            switched_s=self.switched_s,
            loans=loans,
            costs=self._measured,
        )

    def _picture(
        self,
        member: Member,
        sequences: list[Owned],
        loans: Sequence[Loan],
        refusing: Collection[str],
    ) -> InstanceSnapshot:
        """One instance. It is known of a request that its prompt is computed by its first token."""
        stats, face = member.stats, member.face
        spread = member.long_requests
        elsewhere = sum(loan.num_tokens for loan in loans if loan.debtor == member.id)
        lent = sum(loan.num_tokens for loan in loans if loan.creditor == member.id)
        num_waiting = 0 if stats is None else stats.num_waiting
        begun = [s for s in sequences if s.output_token_ids]
        fresh = [s for s in sequences if not s.output_token_ids]
        num_running = len(sequences) - min(num_waiting, len(fresh))
        requests = [
            RequestSnapshot(
                sequence.key,
                num_tokens=len(sequence.spec.prompt_token_ids) + len(sequence.output_token_ids),
                num_uncomputed=1
                if sequence.output_token_ids
                else len(sequence.spec.prompt_token_ids),
                priority=sequence.spec.priority,
                is_waiting=place >= num_running,
                waited_s=max(0.0, time.monotonic() - sequence.spec.arrival_time_s),
                is_migratable=sequence.key not in spread
                and self._arbiter.handshake(sequence.key) is None,
                most_tokens=most_tokens(sequence.spec) or _most_without_end(member, sequence),
            )
            for place, sequence in enumerate([*begun, *fresh])
        ]
        return InstanceSnapshot(
            id=member.id,
            capacity_tokens=0 if face is None else face.capacity_tokens,
            role=member.role,
            node=member.node,
            home=member.home,
            is_alive=face is not None,
            is_draining=member.is_draining,
            used_tokens=max(0, sum(r.num_tokens for r in requests if not r.is_waiting) - elsewhere)
            + lent,
            parked_tokens=0 if stats is None else stats.kv.tokens_parked,
            num_running=num_running,
            num_waiting=len(sequences) - num_running,
            max_running=None if face is None else face.max_seqs,
            queued_tokens=sum(len(s.spec.prompt_token_ids) for s in fresh),
            residents=_residents(stats, sequences),
            requests=tuple(requests),
            **_lending(member, lent, is_full=member.name in refusing),
        )


def _lending(member: Member, lent: int, *, is_full: bool) -> dict[str, Any]:
    """What a picture says of an instance's lending, which has so many tokens of others, and takes
    in no more if it `is_full`."""
    lending = member.lending
    if lending is None:
        return {}
    most, lacking = lending.max_lent_tokens, lending.lacking
    return {
        "max_lent_tokens": min(lent, most) if is_full else most,
        "max_local_tokens": lending.max_local_tokens,
        "tier_tokens": lending.tier_tokens,
        "lacking": None if lacking is None else (lacking.key, lacking.num_tokens),
        "layer_s": lending.layer_s,
    }


def _costs(members: Iterable[Member]) -> Costs:
    """Of what instances have done so far."""
    stats = [member.stats for member in members if member.stats is not None]
    read = [one for s in stats for one in s.adapters if one.load_s]
    step_s, load_s = sum(s.step_time_s for s in stats), sum(one.load_s for one in read)
    num_tokens = sum(s.num_computed_tokens for s in stats)
    return Costs(
        tokens_per_s=num_tokens / step_s if step_s else 0.0,
        load_bytes_per_s=sum(one.num_bytes for one in read) / load_s if load_s else 0.0,
    )


def most_tokens(spec: RequestSpec) -> int:
    """Those that a sequence may have in the end; 0 if that is not known."""
    most = spec.params.max_tokens
    return 0 if most is None else len(spec.prompt_token_ids) + most


def _most_without_end(member: Member, sequence: Owned) -> int:
    """Tokens of a sequence whose number nobody gave; 0 while its instance takes it for short."""
    num_tokens = len(sequence.spec.prompt_token_ids) + len(sequence.output_token_ids)
    lending = member.lending
    if lending is None or num_tokens < lending.max_local_tokens:
        return 0
    return (member.longest or 0) + 1


def _residents(stats: EngineStats | None, sequences: Sequence[Owned]) -> frozenset[str]:
    """What is in an instance's memory beside the model, or comes there for its requests."""
    here = [] if stats is None else [one.key for one in stats.adapters if one.is_here]
    used = [s.spec.adapter for s in sequences if s.spec.adapter is not None]
    return frozenset(map(resident_name, (*here, *used)))


def resident_name(adapter: AdapterKey) -> str:
    """What it is called among all that an instance has in memory."""
    return f"adapter {adapter.digest} {adapter.name}"
