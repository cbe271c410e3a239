"""To where what a newcomer needs is already: adapters, blocks, the beginning of its prompt.

Source of the choice between routing, moving and computing again: Hu et al., BlockLLM,
arXiv:2404.18322.
"""

from collections.abc import Iterator
from typing import Literal

import msgspec

from ..snapshot import ClusterSnapshot, InstanceSnapshot, Link, Newcomer
from .scaling import Scaling
from .simple import LeastLoaded

KVWay = Literal["there", "moved", "computed"]
"""How the beginning of a prompt comes to an instance: it is there, or is brought from another, or
is computed again."""


class Way(msgspec.Struct, frozen=True):
    """A way for a newcomer to get its first token.

    Attributes:
        instance: computes it.
        kv: how that comes by the beginning of the prompt.
        source: who has it, if it is moved.
        time_s: until the first token is there.
    """

    instance: int
    kv: KVWay
    source: int | None
    time_s: float


class LeastTime(LeastLoaded):
    """To where a newcomer's first token comes soonest, by what things were measured to take.

    That is the time until the queue there is computed and, if no slot or memory is free, until
    requests before it have ended; then what loading takes of what it needs and is not in memory;
    then what its prompt takes. Its beginning is on the instance, or is moved there from another
    that has it, if that takes less time than computing it. Of equal times, and while nothing was
    measured, it goes by `LeastLoaded`.

    Args:
        moves_prefixes: whoever asks has beginnings moved, by `way`. A running cluster does not: a
            beginning is used where it is, or computed.
        scaling: how many instances there should be; None for as many as there are.
    """

    name = "least_time"

    def __init__(self, *, moves_prefixes: bool = False, scaling: Scaling | None = None) -> None:
        super().__init__(scaling)
        self.moves_prefixes = moves_prefixes

    def dispatch(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> int | None:
        if not snapshot.costs.tokens_per_s:
            return super().dispatch(snapshot, newcomer)
        way = self.way(snapshot, newcomer)
        return way.instance if way is not None else None

    def way(self, snapshot: ClusterSnapshot, newcomer: Newcomer) -> Way | None:
        """The fastest; None if no instance takes newcomers."""
        scores = self._scores.of(snapshot.instances)
        ways = [
            (way.time_s, -score, number, way)
            for instance, score in zip(snapshot.instances, scores, strict=True)
            if instance.is_for_prompts
            for number, way in enumerate(self._ways(snapshot, newcomer, instance))
        ]
        return min(ways, key=lambda found: found[:3])[3] if ways else None

    def _ways(
        self, snapshot: ClusterSnapshot, newcomer: Newcomer, instance: InstanceSnapshot
    ) -> Iterator[Way]:
        """Those of one instance; of equals the first moves least."""
        costs = snapshot.costs
        ready_s = _wait_s(snapshot, newcomer, instance)
        ready_s += costs.loading_s(instance.missing_bytes(newcomer))
        here = newcomer.prefixes.get(instance.id, 0)
        left_s = costs.computing_s(max(1, newcomer.num_tokens - here))
        yield Way(instance.id, "there" if here else "computed", None, ready_s + left_s)
        if not self.moves_prefixes:
            return
        for other in snapshot.instances:
            length = newcomer.prefixes.get(other.id, 0)
            link = _link(snapshot, other, instance)
            if length > here and other.is_alive and link is not None:
                moving_s = link.time_s((length - here) * snapshot.token_bytes)
                left_s = costs.computing_s(max(1, newcomer.num_tokens - length))
                yield Way(instance.id, "moved", other.id, ready_s + moving_s + left_s)


def _wait_s(snapshot: ClusterSnapshot, newcomer: Newcomer, instance: InstanceSnapshot) -> float:
    """Until an instance could begin with a newcomer."""
    costs = snapshot.costs
    queue_s = costs.computing_s(instance.queued_tokens)
    has_room = instance.has_free_slot and instance.free_tokens >= newcomer.num_tokens
    if has_room and not instance.num_waiting:
        return queue_s
    ends_s = costs.request_s / max(1, instance.num_running)  # between two requests that end
    return queue_s + ends_s * (instance.num_waiting + 1)


def _link(
    snapshot: ClusterSnapshot, source: InstanceSnapshot, target: InstanceSnapshot
) -> Link | None:
    """The way from one to another; None if nothing is known of what copying takes."""
    known = snapshot.links.get((source.id, target.id))
    if known is not None or snapshot.is_copied(source, target):
        return known
    return Link()
